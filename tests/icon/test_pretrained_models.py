"""The published networks: those of ICON, strict, downloaded whole or not at all."""

import hashlib
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import icon_registration.pretrained_models as icon
import itk
import numpy as np
import pytest
import torch
from icon_registration.network_wrappers import RegistrationModule

from icon_nephi import GradientICONPoints, pretrained_models
from icon_nephi.maps.networks import FunctionFromNeuralField
from icon_nephi.pretrained_models import TASKS, init_network

SMALL = [1, 1, 65, 65, 65]  # the least that ICON's network takes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A working directory where ICON finds "trained" weights; and these weights."""
    folder = tmp_path_factory.mktemp("trained")
    generator = torch.Generator().manual_seed(1)
    state = icon.lung_ct.make_network().regis_net.state_dict()
    for key, value in state.items():
        if value.is_floating_point() and "Convs" not in key:  # else zeros and ones
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise if "batchNorms" in key else (noise - 0.5) / 10)
    path = folder / "network_weights/brain_model/brain_model_weights.trch"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return folder, state


@pytest.fixture(scope="module")
def pair():
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(SMALL, generator=generator) for _ in "AB"]


@pytest.fixture(scope="module")
def ours(trained):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained[0])
        return init_network("brain", neural="none", input_shape=SMALL)


@pytest.fixture(scope="module")
def phi_AB(ours, pair):
    with torch.no_grad():
        return ours.regis_net(*pair)


@pytest.fixture(scope="module")
def zeros():
    """The right names and shapes in a small file."""
    state = pretrained_models._make_network("meta").regis_net.state_dict()
    return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in state.items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(path, state):
    torch.save(state, path)
    return path


# The same network as ICON's


def test_weights_and_maps_are_those_of_icons_own_model(
    trained, ours, pair, phi_AB, monkeypatch
):
    monkeypatch.chdir(trained[0])
    # ICON makes two identity maps of 130x155x130 voxels on the way: seconds.
    assign = RegistrationModule.assign_identity_map
    monkeypatch.setattr(
        RegistrationModule,
        "assign_identity_map",
        lambda net, shape, _=None: assign(net, np.minimum(shape, SMALL)),
    )
    theirs = icon.brain_registration_model().cpu()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert len(mine) == 188
    for key, value in mine.items():
        assert torch.equal(value, other[key]), key
        assert torch.equal(value, trained[1][key.removeprefix("regis_net.")]), key
    assert type(ours) is type(theirs)
    assert ours.lmbda == theirs.lmbda
    assert ours.similarity.sigma == theirs.similarity.sigma
    assert not any(module.training for module in ours.modules())
    with torch.no_grad():
        moved, expected = (
            phi(ours.identity_map) for phi in (phi_AB, theirs.regis_net(*pair))
        )
    assert torch.equal(moved, expected)
    assert (moved - ours.identity_map).abs().max() > 1e-3  # not the identity


class Recorder(torch.nn.Module):
    """In place of a network: what shape is it given?"""

    def assign_identity_map(self, shape):
        self.shape = list(shape)


@pytest.mark.parametrize(
    "name",
    [
        "LungCT_registration_model",
        "brain_registration_model",
        "OAI_knees_gradICON_model",
    ],
)
def test_shapes_are_icons(name, monkeypatch):
    monkeypatch.setattr(icon.lung_ct, "make_network", Recorder)
    mine = getattr(pretrained_models, name)(False, neural="none")
    assert mine.shape == getattr(icon, name)(False).shape


@pytest.mark.parametrize("task", ["unigradicon", "multigradicon"])
def test_unigradicon_is_found_where_it_puts_its_weights(here, zeros, task):
    path = here / f"network_weights/{task}1.0/Step_2_final.trch"
    path.parent.mkdir(parents=True)
    written(path, zeros)
    make = getattr(pretrained_models, f"{task}_registration_model")
    net = make(neural="none", input_shape=SMALL)
    assert list(net.regis_net.state_dict()) == list(zeros)
    assert TASKS[task].grid == (175, 175, 175)


def test_loading_draws_no_random_numbers_and_ignores_the_default_dtype(here, zeros):
    path = written(here / "w", {k: v.half() for k, v in zeros.items()})
    before = torch.get_rng_state()
    net = init_network("lung", neural="none", weights=path, input_shape=SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    weight = net.regis_net.netPsi.net.lastConv.weight
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
    assert weight.is_contiguous()  # nothing shared, as in the file
    assert weight.requires_grad


def test_residual_starts_at_the_trained_map(trained, pair, phi_AB, monkeypatch):
    monkeypatch.chdir(trained[0])
    model = pretrained_models.brain_registration_model(input_shape=SMALL)
    assert isinstance(model, GradientICONPoints)
    assert not model.training
    frozen = model.regis_net.netPhi.net
    assert not any(p.requires_grad for p in frozen.parameters())
    assert any(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        # The map back is the same code; half the time without it.
        monkeypatch.setattr(
            model.regis_net.netPhi, "forward", lambda A, B: (frozen(A, B),) * 2
        )
        points = torch.rand(1, 3, 1000, 1, 1)
        start = model.regis_net(*pair)[0](points)
    torch.testing.assert_close(start, phi_AB(points), rtol=0, atol=1e-6)


def test_last_swaps_the_last_step_and_keeps_the_rest(here, zeros):
    path = written(here / "w", zeros)
    net = init_network("knee", neural="last", weights=path, input_shape=SMALL)
    assert net.swapped_fields == ("regis_net.netPsi",)
    assert isinstance(net.regis_net.netPsi, FunctionFromNeuralField)
    keys = set(net.regis_net.state_dict())
    assert {k for k in zeros if not k.startswith("netPsi.")} < keys
    assert not net.training


# Weights that do not fit


def changed(zeros, what):
    state = dict(zeros)
    if what == "renamed":
        state["netPsi.net.other.weight"] = state.pop("netPsi.net.lastConv.weight")
    elif what == "prefixed":
        state = {f"regis_net.{key}": value for key, value in state.items()}
    elif what == "shape":
        state["netPsi.net.lastConv.bias"] = torch.zeros(2)
    elif what == "architecture":
        state = {f"net.{i}.weight": torch.zeros(1) for i in range(7)}
    elif what == "nested":
        state = {"state_dict": state, "step": 3}
    return state


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("renamed", ["1 missing: netPsi.net.lastConv.weight", "1 unexpected: netPsi"]),
        ("prefixed", ["188 missing", "save net.regis_net.state_dict"]),
        ("shape", [r"netPsi.net.lastConv.bias \[2\] for \[3\]"]),
        ("architecture", ["net.4.weight, ...", "another architecture .7 keys, expect"]),
        ("nested", ["holds a dict that is not names and tensors"]),
    ],
)
def test_other_keys_are_listed(here, zeros, what, words):
    path = written(here / "w.trch", changed(zeros, what))
    for word in words:
        with pytest.raises(ValueError, match=word):
            init_network("lung", weights=path)


def test_other_files_are_refused(here, zeros):
    good = written(here / "good", zeros).read_bytes()
    Path("cut").write_bytes(good[: len(good) // 2])
    Path("page").write_bytes(b"<html>404</html>")
    Path("empty").touch()
    torch.save({"net": torch.nn.Linear(1, 1)}, "code")
    Path("folder").mkdir()
    for name, words in {
        "cut": "is truncated; expected a whole file",
        "page": "is not a weights file",
        "empty": "is not a weights file",
        "code": "holds more than tensors",
        "folder": "not a file",
        "absent": "does not exist",
    }.items():
        with pytest.raises(ValueError, match=f"weights: {name} .*{words}"):
            init_network("lung", weights=name)


def test_a_wrong_task_is_refused(here, zeros):
    with pytest.raises(ValueError, match=r"task must be one of .*'knee'.* got 'liver'"):
        init_network("liver")
    for name in ("brain_model_weights.trch", "brain_model_weights_step_2.trch"):
        path = written(here / name, zeros)
        with pytest.raises(ValueError, match="published brain weights but the task is"):
            init_network("lung", weights=path)
        assert init_network("brain", neural="none", weights=path, input_shape=SMALL)
    path = written(here / "Step_2_final.trch", zeros)
    with pytest.raises(ValueError, match="published unigradicon or multigradicon"):
        init_network("lung", weights=path)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"neural must be one of .* got 'all'"):
        init_network("lung", neural="all")
    with pytest.raises(ValueError, match="pretrained is False"):
        init_network("lung", False, weights="w.trch")
    for shape in ([1, 1, 64, 65, 65], [65, 65, 65], [1, 2, 65, 65, 65]):
        with pytest.raises(ValueError, match=r"input_shape must be .* at least 65"):
            init_network("lung", False, input_shape=shape)


def test_64_voxels_are_indeed_too_few(ours):
    with pytest.raises(RuntimeError, match="smaller than kernel"):
        ours.regis_net(torch.zeros(1, 1, 64, 65, 65), torch.zeros(1, 1, 64, 65, 65))


# Downloads


class Server:
    """Serves ``content``; what it does to the requests is in ``faults``, one each."""

    def __init__(self):
        self.content, self.faults, self.ranges, outer = b"", [], [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                fault = outer.faults.pop(0) if outer.faults else ""
                asked = self.headers["Range"]
                outer.ranges.append(asked)
                outer.answer(self, fault, int(asked[6:-1]) if asked else 0)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/weights.trch"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler, fault, start):
        size = len(self.content)
        if fault == "refuse":
            return handler.send_error(503)
        if "deaf" in fault:
            start = 0
        if start >= size:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{size}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        handler.send_header("Content-Length", str(size - start))
        handler.end_headers()
        end = start + (size - start) // 2 if "cut" in fault else size
        handler.wfile.write(self.content[start:end])
        return None


@pytest.fixture
def server(here, zeros, monkeypatch):
    """The lung weights' release; the working directory is empty."""
    server = Server()
    monkeypatch.setattr(pretrained_models, "_BLOCK", 1024)  # these weights are small
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(TASKS, "lung", replace(TASKS["lung"], url=server.url))
    server.content = written(here / "w", zeros).read_bytes()
    (here / "w").unlink()
    yield server
    server.server.shutdown()
    server.server.server_close()


def download():
    return pretrained_models._published("lung")


def files():
    return sorted(str(path) for path in Path().rglob("*"))


PLACE = "network_weights/lung_model/lung_model_weights.trch"
FOLDERS = ["network_weights", "network_weights/lung_model"]


def test_weights_come_to_icons_place_once(server, zeros):
    net = pretrained_models.LungCT_registration_model(neural="none", input_shape=SMALL)
    assert set(net.regis_net.state_dict()) == set(zeros)
    assert Path(PLACE).read_bytes() == server.content
    assert files() == [*FOLDERS, PLACE]
    download()
    assert server.ranges == [None]


@pytest.mark.parametrize("second", ["", "deaf", "cut"])
def test_a_cut_download_goes_on(server, second, capfd):
    server.faults = ["cut", second]
    download()
    assert Path(PLACE).read_bytes() == server.content
    assert files() == [*FOLDERS, PLACE]
    starts = [int(asked[6:-1]) for asked in server.ranges[1:]]
    assert server.ranges[0] is None
    assert len(starts) == (2 if second == "cut" else 1)
    assert starts[0] > len(server.content) // 4
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "%" in captured.err  # the progress bar


def test_a_later_call_goes_on_too(server):
    server.faults = ["cut", "refuse"]
    with pytest.raises(FileNotFoundError, match="503"):
        download()
    assert files() == [*FOLDERS, f"{PLACE}.part"]
    server.ranges.clear()
    download()
    assert server.ranges[0] is not None
    assert Path(PLACE).read_bytes() == server.content
    assert files() == [*FOLDERS, PLACE]


@pytest.mark.parametrize("extra", [0, 10])
def test_a_part_that_is_not_the_beginning_is_dropped(server, extra):
    Path(PLACE).parent.mkdir(parents=True)
    Path(f"{PLACE}.part").write_bytes(server.content + bytes(extra))
    download()
    assert Path(PLACE).read_bytes() == server.content
    assert files() == [*FOLDERS, PLACE]


def test_a_server_that_always_cuts_and_knows_no_ranges_is_given_up(server):
    server.faults = ["deaf cut"] * 5
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        download()
    assert len(server.ranges) == 2


@pytest.mark.parametrize("what", ["renamed", "truncated", "architecture", "damaged"])
def test_nothing_is_kept_of_a_download_that_does_not_fit(server, here, zeros, what):
    bias = {"netPsi.net.lastConv.bias": torch.full((3,), 1.25)}
    path = written(here / "w", changed(zeros | bias, what))
    server.content = path.read_bytes()
    path.unlink()
    if what == "truncated":
        server.content = server.content[:-1000]
    if what == "damaged":
        three = [torch.tensor([x] * 3).numpy().tobytes() for x in (1.25, 1.5)]
        assert server.content.count(three[0]) == 1
        server.content = server.content.replace(*three)
    words = {"renamed": "1 missing: netPsi.net.lastConv.weight"}.get(what, what)
    with pytest.raises(ValueError, match=f"the file downloaded from http.*{words}"):
        download()
    assert files() == []


def test_a_known_checksum_is_checked(server, monkeypatch):
    lung = TASKS["lung"]
    monkeypatch.setitem(TASKS, "lung", replace(lung, sha256="0" * 64))
    with pytest.raises(ValueError, match="hash"):
        download()
    assert files() == []
    sha256 = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setitem(TASKS, "lung", replace(lung, sha256=sha256))
    download()
    assert files() == [*FOLDERS, PLACE]


def test_offline_says_what_to_download_and_where_to_put_it(server, here):
    server.server.shutdown()
    server.server.server_close()
    with pytest.raises(FileNotFoundError, match="lung weights are not here") as caught:
        download()
    assert server.url in str(caught.value)
    assert str(here / PLACE) in str(caught.value)
    assert files() == []


def test_a_file_of_the_user_is_never_deleted(here, zeros):
    Path(PLACE).parent.mkdir(parents=True)
    written(Path(PLACE), changed(zeros, "renamed"))
    with pytest.raises(
        ValueError, match=r"lung_model_weights.trch .*delete it to have"
    ):
        download()
    assert files() == [*FOLDERS, PLACE]


# Intensities


def an_image(dtype, low, high, seed=0):
    values = np.random.default_rng(seed).integers(low, high, (7, 8, 9)).astype(dtype)
    image = itk.image_from_array(values)
    image.SetSpacing((1, 2, 3))
    image.SetOrigin((4, 5, 6))
    image.SetDirection(itk.matrix_from_array(np.diag([1.0, -1.0, -1.0])))
    return image


def tensor(image):
    return torch.from_numpy(itk.array_from_image(image))[None, None]


def assert_same(mine, image, values):
    """Of the image's kind and place, float32."""
    assert np.allclose(mine, values, rtol=3e-7, atol=1e-7)
    if isinstance(image, torch.Tensor):
        assert (mine.dtype, mine.shape) == (torch.float32, image.shape)
        return
    assert type(mine) is itk.Image[itk.F, 3]
    for what in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(mine, what)() == getattr(image, what)()


kinds = pytest.mark.parametrize("kind", [lambda x: x, tensor], ids=["itk", "tensor"])


@kinds
@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
def test_lung_intensities(dtype, kind):
    preprocess = pretrained_models.lung_network_preprocess
    image, lungs = an_image(dtype, -1200, 400), an_image("uint8", 0, 2, seed=1)
    scaled = (itk.array_from_image(image).clip(-1000, 0) + 1000) / 1000
    inside = itk.array_from_image(lungs)
    assert_same(preprocess(kind(image), kind(lungs)), kind(image), scaled * inside)
    assert_same(preprocess(kind(image)), kind(image), scaled)
    label = an_image("uint8", 3, 4)  # inside, not three times as much
    assert_same(preprocess(kind(image), kind(label)), kind(image), scaled)


@kinds
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_brain_intensities(dtype, kind):
    image = an_image(dtype, 0, 200)
    values = itk.array_from_image(image) * (0.9 / np.max(image))
    mine = pretrained_models.brain_network_preprocess(kind(image))
    assert_same(mine, kind(image), values)


@pytest.mark.slow  # ITK takes six seconds to load the filters that ICON uses
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_intensities_are_icons(dtype):
    image, lungs = an_image(dtype, -1200, 400), an_image("uint8", 0, 2, seed=1)
    theirs = icon.lung_network_preprocess(image, lungs)
    mine = pretrained_models.lung_network_preprocess(image, lungs)
    assert_same(mine, theirs, itk.array_from_image(theirs))
    theirs = icon.brain_network_preprocess(image)
    mine = pretrained_models.brain_network_preprocess(image)
    assert_same(mine, theirs, itk.array_from_image(theirs))


def test_unigradicon_intensities():
    preprocess = pretrained_models.unigradicon_network_preprocess
    image, mask = an_image("int16", -1500, 1500), an_image("uint8", 0, 2, seed=1)
    values, inside = itk.array_from_image(image), itk.array_from_image(mask)
    scaled = (values.clip(-1000, 1000) + 1000) / 2000
    assert np.allclose(preprocess(image, "ct", mask), scaled * inside, atol=1e-7)
    low, high = values.min(), np.sort(values.ravel())[int(0.99 * values.size) - 1]
    scaled = (values.clip(low, high) - low) / (high - low)
    assert np.allclose(preprocess(image, "mri"), scaled, atol=1e-7)
    with pytest.raises(ValueError, match="modality must be 'ct' or 'mri', got 'pet'"):
        preprocess(image, "pet")
    flat = torch.zeros(1, 1, 9, 9, 9)
    flat[..., 0, 0, 0] = 1
    with pytest.raises(ValueError, match="one value in 99 of 100 voxels"):
        preprocess(flat, "mri")


def test_each_item_of_a_batch_is_scaled_by_itself():
    batch = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    batch = batch * torch.tensor([1, 10, 100])[:, None, None, None]
    for preprocess in (
        pretrained_models.brain_network_preprocess,
        lambda image: pretrained_models.unigradicon_network_preprocess(image, "mri"),
    ):
        alone = torch.cat([preprocess(item[None]) for item in batch])
        assert torch.equal(preprocess(batch), alone)


def test_a_mask_on_another_grid_is_read_at_the_voxels_of_the_image():
    image, mask = an_image("int16", -900, -1), an_image("uint8", 1, 2)
    mask.SetOrigin((5, 5, 6))  # one voxel further: the first column is outside
    mine = np.asarray(pretrained_models.lung_network_preprocess(image, mask))
    assert (mine[..., 0] == 0).all()
    assert (mine[..., 1:] > 0).all()


def test_images_that_cannot_be_scaled_are_refused():
    lung = pretrained_models.lung_network_preprocess
    brain = pretrained_models.brain_network_preprocess
    image = torch.rand(1, 1, 5, 6, 7)
    with pytest.raises(TypeError, match="segmentation is Tensor but image is"):
        lung(an_image("int16", -1000, 0), image)
    with pytest.raises(ValueError, match="segmentation has grid"):
        lung(image, image[..., 1:])
    with pytest.raises(ValueError, match="segmentation is empty"):
        lung(image, torch.zeros_like(image))
    with pytest.raises(ValueError, match="constant"):
        brain(torch.ones(1, 1, 5, 6, 7))
    with pytest.raises(ValueError, match="no voxel above zero"):
        brain(image - 2)
    with pytest.raises(ValueError, match="NaN"):
        brain(image / 0 * 0)
    with pytest.raises(TypeError, match="image must be"):
        brain(image.numpy())
