"""Many pairs: finished ones are skipped, bad ones do not stop the rest."""

import csv
import json

import pytest

from icon_nephi import cli
from icon_nephi.commands import batch
from icon_nephi.registration import register as registration
from tests.commands.command_files import make_folder, refused, spoil


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = make_folder(tmp_path, monkeypatch)
    spoil(tmp_path)
    return made


def table(path, *rows, header="name,fixed,moving,fixed_modality"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return ["--pairs", str(path), "--out_dir", "out"]


GOOD = "a,fixed.nrrd,moving.nrrd,ct", "b,moving.nrrd,fixed.nrrd,"
BAD = "bad,nan.nrrd,moving.nrrd,"


def rows_of(path):
    with path.open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_one_bad_pair_does_not_stop_the_rest(folder, capsys):
    flags = table(folder.path / "pairs.csv", GOOD[0], BAD, GOOD[1])
    with pytest.raises(SystemExit) as stop:
        cli.register(flags)
    assert stop.value.code == 1
    out = folder.path / "out"
    names = ["inverse_transform.hdf5", "pair.nephi", "summary.json"]
    names += ["transform.hdf5", "warped.nii.gz"]
    for name in ("a", "b"):
        assert sorted(p.name for p in (out / name).iterdir()) == names
    assert not (out / "bad").exists()
    rows = rows_of(out / "summary.csv")
    assert [r["status"] for r in rows.values()] == ["done", "failed", "done"]
    assert "--fixed has 1 NaN" in rows["bad"]["error"]
    assert float(rows["a"]["folds_percent"]) >= 0
    assert "doubtful" in rows["a"]["warnings"]
    text = capsys.readouterr()
    assert "1 of 3 pairs failed" in text.err
    assert "--fixed has 1 NaN" in text.out
    assert "summary: out/summary.csv" in text.out


def test_finished_pairs_are_skipped_until_the_flags_change(folder, monkeypatch):
    flags = [*table(folder.path / "pairs.csv", *GOOD), "--quiet"]
    counted = []
    fit = registration.fit_pair

    def count(*images, **options):
        counted.append(options["options"].seed)
        return fit(*images, **options)

    monkeypatch.setattr(registration, "fit_pair", count)
    cli.register(flags)
    cli.register(flags)
    assert counted == [0, 0]
    summary = folder.path / "out" / "summary.csv"
    assert {r["status"] for r in rows_of(summary).values()} == {"skipped"}
    assert all(float(r["seconds"]) > 0 for r in rows_of(summary).values())
    (folder.path / "out" / "b" / "summary.json").write_text("{")  # as if cut off
    cli.register(flags)
    assert counted == [0, 0, 0]
    cli.register([*flags, "--seed", "4"])
    assert counted == [0, 0, 0, 4, 4]
    found = json.loads((folder.path / "out" / "a" / "summary.json").read_text())
    assert found["flags"]["fixed_modality"] == "ct"


def test_processes_share_the_pairs(folder, monkeypatch):
    flags = [*table(folder.path / "pairs.csv", *GOOD), "--quiet"]
    out = folder.path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun does
    for rank, name in enumerate("ab"):
        monkeypatch.setenv("RANK", str(rank))
        cli.register(flags)
        assert list(rows_of(out / f"summary_{rank}.csv")) == [name]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    cli.register(flags)
    statuses = [row["status"] for row in rows_of(out / "summary.csv").values()]
    assert statuses == ["skipped", "skipped"]


def test_names_are_numbers_where_none_are_given(folder):
    path = folder.path / "pairs.csv"
    path.write_text("fixed,moving\nfixed.nrrd,moving.nrrd\n")
    (row,) = batch.read_pairs(path)
    assert row["name"] == "pair_001"
    assert row["fixed"] == folder.path / "fixed.nrrd"


TABLES = {
    "no file": (None, "does not exist"),
    "no column": ("fixed,image\na,b\n", "'image' is no column"),
    "no moving": ("name,fixed\na,b\n", "fixed or moving is missing"),
    "no row": ("fixed,moving\n", "a pair a row"),
    "empty": ("", "fixed or moving is missing"),
    "ragged": ("fixed,moving\na\n", "row 1 has 1 cells"),
    "path as name": ("name,fixed,moving\n../x,a,b\n", "the name '../x'"),
    "same name": ("name,fixed,moving\nx,a,b\nX,a,b\n", "'x' twice"),
    "modality": ("fixed,moving,fixed_modality\na,b,pet\n", "fixed_modality 'pet'"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_bad_table_is_refused_at_once(name, folder, capfd):
    text, words = TABLES[name]
    path = folder.path / "pairs.csv"
    if text is not None:
        path.write_text(text)
    flags = ["--pairs", str(path), "--out_dir", "out"]
    refused(cli.register, flags, words, folder.path, capfd)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pairs", "pairs.csv"], "belong together"),
        (["--pairs", "pairs.csv", "--out_dir", "nowhere"], "is not a folder"),
        (
            ["--pairs", "pairs.csv", "--out_dir", "out", "--save", "x.nephi"],
            "--save is for one pair",
        ),
        (
            ["--pairs", "pairs.csv", "--out_dir", "out", "--fixed", "fixed.nrrd"],
            "--fixed is for one pair",
        ),
    ],
)
def test_flags_that_do_not_go_with_a_table(flags, words, folder, capfd):
    table(folder.path / "pairs.csv", *GOOD)
    refused(cli.register, flags, words, folder.path, capfd)
