"""Another device: the same result as on the processor, and nothing left behind there.

Those marked gpu need a CUDA device; the others look at tensors without numbers.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import icon_nephi
from icon_nephi.fit.refine import refine_pair
from icon_nephi.fit.settings import PRESETS, make_pair
from icon_nephi.losses.features import FeatureDifference, with_features
from icon_nephi.losses.gradient_icon import GradientICONPoints
from icon_nephi.losses.regularity import guarded_term
from icon_nephi.losses.similarities import PatchNCC
from icon_nephi.maps.networks import AffinePair
from icon_nephi.phantoms import breathing_thorax
from icon_nephi.space.frames import identity_map
from icon_nephi.space.images import gaussian_blur
from icon_nephi.space.sampling import Patches, Points

GPU = "cuda"
SHAPES = {2: (28, 24), 3: (20, 24, 22)}
PRESETS_OF = {"grid": 3, "siren": 3, "ct": 3, "detail": 3, "plane": 2}
MIB = 2**20


def a_pair(dimension, features=False):
    """Two smooth images, with their features if asked for."""
    source = torch.Generator().manual_seed(0)
    shape = SHAPES[dimension]
    both = [torch.rand(1, 1, *shape, generator=source) for _ in "AB"]
    both = [gaussian_blur(image, [1.5] * dimension) for image in both]
    return [with_features(image) for image in both] if features else both


def a_loss(preset, dimension, features=False, device="cpu"):
    """A loss as `fit_pair` makes it, small; its fields move."""
    source = torch.Generator().manual_seed(0)
    settings = PRESETS["grid" if preset == "plane" else preset][dimension]
    pair = make_pair(settings, SHAPES[dimension], source)
    for field in (pair.field_AB, pair.field_BA):
        field.last.weight.data.normal_(0, 0.1, generator=source)
    similarity = PatchNCC(1e-3)
    if features:
        similarity = FeatureDifference(similarity, 1, 10.0)
    return GradientICONPoints(
        AffinePair(pair, torch.eye(dimension + 1)).to(device),
        similarity,
        settings.lmbda,
        prior_lmbda=settings.prior_lmbda,
        similarity_sampler=Patches(40, 3, 2.0, corners=True),
        regularity_sampler=Points(60),
        regularity=partial(guarded_term, consistency=300.0, weight=1.0),
        extent=torch.ones(dimension, device=device),
        generator=torch.Generator().manual_seed(0),
    )


@pytest.fixture
def unnumbered(monkeypatch):
    """Tensors without numbers, which autocast has never heard of."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    return "meta"


class OneDevice(TorchDispatchMode):
    """While it is entered, no operator takes tensors of two devices.

    But for what moves them, numbers, and places to look at.
    """

    MOVES = ("_to_copy", "copy_", "index", "index_put_")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in self.MOVES:
            leaves = tree_leaves((args, kwargs or {}))
            devices = {
                t.device for t in leaves if isinstance(t, torch.Tensor) and t.dim()
            }
            assert len(devices) < 2, f"{func} takes tensors of {devices}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", PRESETS_OF)
def test_a_step_elsewhere_leaves_no_tensor_on_the_processor(preset, unnumbered):
    dimension, features = PRESETS_OF[preset], preset == "ct"
    loss = a_loss(preset, dimension, features, unnumbered)
    images = [image.to(unnumbered) for image in a_pair(dimension, features)]
    with OneDevice():
        result = loss(*images)
        result.all_loss.backward()
    assert {t.device.type for t in result} == {"meta"}
    weights = [p for p in loss.parameters() if p.requires_grad and p.numel()]
    assert {w.grad.device.type for w in weights} == {"meta"}


def test_a_training_step_elsewhere_leaves_no_tensor_there(dimension, unnumbered):
    shape = [2, 1, *(24,) * dimension]
    model = icon_nephi.make_network(shape).to(unnumbered)
    with OneDevice():
        result = model(*(torch.empty(shape, device=unnumbered) for _ in "AB"))
        result.all_loss.backward()
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


def test_the_check_sees_two_devices():
    with OneDevice(), pytest.raises(AssertionError, match="takes tensors of"):
        torch.add(torch.ones(3), torch.ones(3, device="meta"))


# --- on a GPU -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def chest():
    return breathing_thorax((32, 28, 30), amplitude=15.0, noise=5.0)


def registered(chest, *devices, **options):
    """The registration of the images on devices, and its mean error in mm."""
    images = [i.to(d) for i, d in zip((chest.image_A, chest.image_B), devices)]  # noqa: B905
    field = replace(PRESETS["grid"][3], steps=120)
    options = {"field": field, "progress": False, "modality": "ct"} | options
    found = icon_nephi.register(*images, **options)
    moved = torch.from_numpy(found.transform_points(chest.points_B.numpy()))
    wrong = chest.millimetres(moved.float()) - chest.millimetres(chest.points_A)
    return found, float(wrong.norm(dim=1).mean())


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS_OF)
def test_a_step_on_a_gpu_is_that_of_the_processor(preset):
    dimension, features = PRESETS_OF[preset], preset == "ct"
    found = []
    for device in ("cpu", GPU):
        loss = a_loss(preset, dimension, features, device)
        result = loss(*(image.to(device) for image in a_pair(dimension, features)))
        result.all_loss.backward()
        slopes = [
            p.grad.cpu().flatten() for p in loss.parameters() if p.grad is not None
        ]
        found.append((float(result.all_loss.detach()), torch.cat(slopes)))
    (loss, slopes), (loss_there, slopes_there) = found
    assert loss_there == pytest.approx(loss, rel=1e-4)
    assert (slopes_there - slopes).norm() < 1e-3 * slopes.norm()


@pytest.mark.gpu
def test_a_registration_on_a_gpu_is_as_good(chest):
    ours, error = registered(chest, "cpu", "cpu")
    theirs, error_there = registered(chest, GPU, GPU)
    before = chest.millimetres(chest.points_B) - chest.millimetres(chest.points_A)
    assert error < 0.7 * before.norm(dim=1).mean()
    assert error_there == pytest.approx(error, rel=0.2)
    assert theirs.map_AB(identity_map((5, 5, 5), device=GPU)).is_cuda
    assert theirs.fold_fraction() == ours.fold_fraction() == 0
    spread = (0.9 * torch.rand(500, 3) + 0.05).numpy()
    there, here = (
        chest.millimetres(torch.from_numpy(r.transform_points(spread)).float())
        for r in (theirs, ours)
    )
    # Other roundings lead elsewhere within what the images leave open.
    assert (there - here).norm(dim=1).mean() < 0.3 * before.norm(dim=1).mean()


@pytest.mark.gpu
def test_images_and_masks_of_two_devices_are_registered_on_the_first(chest, tmp_path):
    mask = torch.ones_like(chest.image_B)
    options = {"time_limit": 3.0, "mask_B": mask}
    found, _ = registered(chest, GPU, "cpu", **options)
    assert found.device.type == GPU
    warped = found.warp(chest.image_A)
    assert warped.shape == chest.image_B.shape
    found.save(tmp_path / "there.nephi")
    again = icon_nephi.load(tmp_path / "there.nephi")
    points = chest.points_B.numpy()
    moved = found.transform_points(points), again.transform_points(points)
    assert abs(moved[0] - moved[1]).max() < 1e-5


@pytest.mark.gpu
def test_a_registration_on_a_gpu_gives_its_memory_back(chest):
    registered(chest, GPU, GPU, time_limit=2.0)  # what is loaded once does not count
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, _ = registered(chest, GPU, GPU, time_limit=2.0)
    assert torch.cuda.max_memory_allocated() - before < 600 * MIB
    del found
    assert torch.cuda.memory_allocated() - before < MIB


@pytest.mark.gpu
def test_refinement_on_a_gpu_is_that_of_the_processor():
    ends = []
    for device in ("cpu", GPU):
        torch.manual_seed(0)
        model = icon_nephi.make_network([1, 1, *SHAPES[3]]).to(device)
        images = [image.to(device) for image in a_pair(3)]
        maps = refine_pair(model, *images, steps=3, progress=False)
        ends.append(([row["all_loss"] for row in maps[2]], maps[0]))
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-2)
    x = identity_map((6, 5, 7))
    torch.testing.assert_close(
        ends[1][1](x.to(GPU)).cpu(), ends[0][1](x), atol=1e-3, rtol=0
    )


@pytest.mark.gpu
def test_chunks_are_larger_on_a_gpu_and_give_the_same():
    pair = make_pair(PRESETS["grid"][3], SHAPES[3], torch.Generator().manual_seed(0))
    pair.field_AB.last.weight.data.fill_(0.01)
    x = torch.rand(1, 3, 20_000, 1, 1)
    with torch.no_grad():
        here = pair(*a_pair(3))[0]
        there = pair.to(GPU)(*(i.to(GPU) for i in a_pair(3)))[0]
    assert there.chunk_size > here.chunk_size
    torch.testing.assert_close(there(x.to(GPU)).cpu(), here(x), atol=1e-5, rtol=1e-4)
