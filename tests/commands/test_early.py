"""Wrong input and --help are answered before torch or ITK is imported."""

import subprocess
import sys

import pytest

CODE = """
import sys
from icon_nephi import cli
try:
    getattr(cli, sys.argv[1])(sys.argv[2:])
except SystemExit as stop:
    print("code", stop.code)
print(*(m for m in ("torch", "itk", "scipy", "icon_registration") if m in sys.modules))
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("register --help", "usage"),
        ("compare --help", "usage"),
        ("register --fixed a.nii --moving b.nii --save p.nephi", "--fixed: a.nii"),
        ("register --fixed a.nii --moving b.nii --save p.txt", "must end in"),
        ("register --fixed a.nii --moving a.nii --seeds 0 --save p.nephi", "--seeds"),
        ("register --pairs none.csv --out_dir .", "none.csv does not exist"),
        ("warp --transform T.h5 --image a.nii --out b.nii", "does not exist"),
        ("jacobian --transform p.nephi --out b.nii", "p.nephi does not exist"),
        ("info none.nephi", "none.nephi does not exist"),
        ("info none.foo", "must end in"),
        ("compare --data none", "is not a folder"),
        ("compare --data . --seconds 0", "--seconds must be"),
    ],
)
def test_nothing_heavy_is_imported(tmp_path, line, said):
    done = subprocess.run(
        [sys.executable, "-c", CODE, *line.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    code, *loaded = done.stdout.rpartition("code ")[2].split()
    assert code == ("0" if "--help" in line else "2")
    assert not loaded
