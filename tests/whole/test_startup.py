"""What is imported when: a command or a registration waits for nothing it needs not."""

from tests.whole.readers import loaded_by

# Torch's compiler, and the algebra it needs: a second of work at the first use.
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}


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
