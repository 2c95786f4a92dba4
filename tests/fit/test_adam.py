"""The fit's own Adam against torch's."""

import pytest
import torch

from icon_nephi.fit.adam import Adam


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_moves_weights_as_torchs_does(dtype):
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(5, 3, generator=generator, dtype=dtype) for _ in range(3)]
    theirs = [w.clone() for w in ours]
    for w in (*ours, *theirs):
        w.requires_grad_()
    own = Adam(
        [{"params": ours[:2], "lr": 0.1}, {"params": ours[2:], "lr": 0.01}], (0.9, 0.99)
    )
    reference = torch.optim.Adam(
        [{"params": theirs[:2], "lr": 0.1}, {"params": theirs[2:], "lr": 0.01}],
        betas=(0.9, 0.99),
    )
    for step in range(20):
        for optimizer, weights in ((own, ours), (reference, theirs)):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimizer.zero_grad()
            sum((w**4 - w).sum() for w in weights).backward()
            optimizer.step()
    for w, v in zip(ours, theirs, strict=True):
        # 20 steps of a few roundings of numbers about 1
        torch.testing.assert_close(w, v, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_weights_without_gradients_stay_and_moments_wait():
    moved, still = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = Adam([{"params": [moved, still], "lr": 0.1}])
    moved.sum().backward()
    optimizer.step()
    assert torch.equal(still, torch.ones(2))
    torch.testing.assert_close(moved.detach(), torch.full((2,), 0.9))
    optimizer.zero_grad()
    assert moved.grad is None
