"""A pair split over two processes is the pair in one."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from icon_nephi.folds import guarded_term
from icon_nephi.losses import GradientICONPoints
from icon_nephi.models import GRID, make_pair
from icon_nephi.optimize import Stage, optimize
from icon_nephi.processes import SplitPair
from icon_nephi.sampling import Patches, Points
from icon_nephi.similarities import MutualInformation, PatchNCC


def results(split):
    """Losses and weights of a few steps, by similarity, and a dense map."""
    torch.set_num_threads(1)
    found = {}
    for name, similarity, sampler in (
        # Odd counts: the shares are not equal.
        ("blocks", PatchNCC(), Patches(15, 3, 2.0, corners=True)),
        ("points", MutualInformation(8), Points(61)),
    ):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, 1, 1, 9, 10, 11, generator=generator).double()
        pair = make_pair(GRID, (9.0, 10.0, 11.0), generator).double()
        for field in (pair.field_AB, pair.field_BA):
            torch.nn.init.normal_(field.last.weight, std=0.03, generator=generator)
        loss = GradientICONPoints(
            split(pair),
            similarity,
            1.0,
            prior_lmbda=0.1,
            regularity_sampler=Points(7),
            regularity=partial(guarded_term, consistency=3.0, weight=1.0),
            extent=torch.tensor([9.0, 10.0, 11.0]),
            generator=generator,
        )
        groups = [{"params": list(pair.parameters()), "lr": 1e-2}]
        course = optimize(loss, *images, [Stage(3, sampler)], groups)
        found[name] = [step["all_loss"] for step in course.losses]
        found[f"{name}, weights"] = [p.detach().clone() for p in pair.parameters()]
    loss.assign_identity_map([1, 1, 9, 10, 11])
    with torch.no_grad():
        found["dense"] = loss.phi_AB_vectorfield
    return found


def in_process(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(results(SplitPair), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_make_the_steps_of_one(tmp_path):
    torch.multiprocessing.spawn(in_process, (tmp_path,), nprocs=2)
    expected = results(lambda pair: pair)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, values in expected.items():
            torch.testing.assert_close(
                found[name], values, rtol=1e-9, atol=1e-9, msg=f"{name}, {rank}"
            )


def test_without_processes_it_says_what_to_do():
    with pytest.raises(ValueError, match="torchrun"):
        SplitPair(torch.nn.Linear(1, 1))
