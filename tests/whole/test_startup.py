"""What is imported when: a command or a registration waits for nothing it needs not."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Torch's compiler, and the algebra it needs: a second of work at the first use.
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}


def loaded_by(code):
    """The modules that a fresh process has imported after some code."""
    code = f"import sys; sys.argv = ['x']\n{code}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_registration_does_not_import_torchs_compiler():
    loaded = loaded_by(
        """
import torch
import icon_nephi
image = torch.rand(1, 1, 20, 18, generator=torch.Generator().manual_seed(0))
icon_nephi.register(image, image.roll(1, 2), progress=False, time_limit=0.1)
"""
    )
    assert "icon_nephi.fit.from_scratch" in loaded
    assert not COMPILER & loaded


def test_the_parts_of_a_fit_on_torch_do_not_import_it_either():
    loaded = loaded_by(
        """
import os
os.environ["NEPHI_CORE"] = "torch"
import torch
import icon_nephi
image = torch.rand(1, 1, 20, 18, generator=torch.Generator().manual_seed(0))
icon_nephi.register(image, image.roll(1, 2), progress=False, time_limit=0.1)
"""
    )
    # Torch's own gradients of given outputs import sympy.
    assert not (COMPILER - {"sympy"}) & loaded
