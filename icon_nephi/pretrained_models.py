"""ICON's trained networks as a starting point: their weights, shapes, intensities.

The functions are named and called as ICON's. Weights are looked for where ICON and
uniGradICON look, below the working directory, else downloaded to that place.

Differs from ICON: a weights file that does not fit is an error (ICON goes on with what
fits, which may be nothing), and so is an unknown task (ICON takes the lung model). The
network stays on the CPU, and a neural field is added unless ``neural`` is ``"none"``.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from icon_nephi._check import check_image, check_mask
from icon_nephi.io.image_input import check_kind, is_itk
from icon_nephi.space.intensities import check_intensities
from icon_nephi.swap import add_neural_residual, swap_fields

NEURAL = ("residual", "last", "none")
# At a quarter of the resolution the U-Net halves an axis four times and then needs two
# voxels: with 64 voxels ICON's network fails, with 65 it runs.
_LEAST = 65
_BLOCK = 2**14  # bytes written at once: what is lost where a connection is cut


@dataclass(frozen=True)
class Published:
    """A published network.

    Attributes:
        url: of its weights.
        place: of the file below the working directory, where ICON looks for it.
        grid: it was trained at.
        sha256: of the file; None: not known, because the release pages state none and
            the files could not be fetched where this was written. Pooch logs the sum
            of a file that it downloads without one: enter it here.
    """

    url: str
    place: str
    grid: tuple[int, int, int]
    sha256: str | None = None


_ICON = "https://github.com/uncbiag/ICON/releases/download/pretrained_models_v1.0.0"
_UNI = "https://github.com/uncbiag/uniGradICON/releases/download"
TASKS = {
    task: Published(
        f"{_ICON}/{task}_model_weights_step_2.trch",
        f"network_weights/{task}_model/{task}_model_weights.trch",
        grid,
    )
    for task, grid in (
        ("lung", (175, 175, 175)),
        ("brain", (130, 155, 130)),
        ("knee", (80, 192, 192)),
    )
} | {
    task: Published(
        f"{_UNI}/{task}_weights/Step_2_final.trch",
        f"network_weights/{task}1.0/Step_2_final.trch",
        (175, 175, 175),
    )
    for task in ("unigradicon", "multigradicon")
}


def init_network(
    task: str,
    pretrained: bool = True,
    *,
    neural: str = "residual",
    weights: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] | None = None,
) -> Any:
    """Return a published network with its identity map, on the CPU, in ``eval()``.

    ``neural="residual"``: frozen, then a neural pair that starts as the identity
    (`add_neural_residual`). ``"last"``: a neural field, which also starts as the
    identity, in place of the last step (`swap_fields`): train it before use.
    ``"none"``: ICON's own ``GradientICONSparse``.

    Args:
        task: one of `TASKS`.
        pretrained: with trained weights, else with new random ones.
        neural: see above.
        weights: a file to use instead of the published one, as
            ``torch.save(net.regis_net.state_dict(), path)`` writes it for ``"none"``.
        input_shape: ``[1, 1, D, H, W]``; default: what it was trained at.

    Raises:
        ValueError: an unknown task or option, a shape too small, or weights that are
            missing, truncated or of another network.
        FileNotFoundError: the published weights cannot be downloaded.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {task!r}")
    if neural not in NEURAL:
        raise ValueError(f"neural must be one of {NEURAL}, got {neural!r}")
    if weights is not None and not pretrained:
        raise ValueError(
            f"weights is {os.fspath(weights)} but pretrained is False; leave one out"
        )
    shape = list(input_shape) if input_shape is not None else [1, 1, *TASKS[task].grid]
    if len(shape) != 5 or shape[1] != 1 or min(shape[2:]) < _LEAST:
        raise ValueError(
            f"input_shape must be [1, 1, D, H, W], at least {_LEAST} voxels an axis, "
            f"got {shape}; leave it out for the published one"
        )
    if pretrained:
        state = _published(task) if weights is None else _given(Path(weights), task)
        net = _make_network("meta").to_empty(device="cpu")
        net.regis_net.load_state_dict(state, strict=True)
    else:
        net = _make_network("cpu")
    net.assign_identity_map(shape)
    if neural == "residual":
        net = add_neural_residual(net, freeze=True)
    elif neural == "last":
        net = swap_fields(net, which="last")
    return net.eval()


LungCT_registration_model = partial(init_network, "lung")
"""`init_network` for lungs in CT; `lung_network_preprocess` is for the images."""
brain_registration_model = partial(init_network, "brain")
"""`init_network` for brain MRI; `brain_network_preprocess` is for the images."""
OAI_knees_gradICON_model = partial(init_network, "knee")
"""`init_network` for knee MRI (OAI)."""
unigradicon_registration_model = partial(init_network, "unigradicon")
"""`init_network` for any anatomy; `unigradicon_network_preprocess` is for the images.
Differs from uniGradICON in the loss: beyond its border a warped image is not zero."""
multigradicon_registration_model = partial(init_network, "multigradicon")
"""As `unigradicon_registration_model`, also between modalities."""


def _make_network(device: str) -> Any:
    """Return ICON's, the same for all tasks; on "meta" it draws no random numbers."""
    from icon_registration.pretrained_models import lung_ct  # imports itk

    with torch.device(device):
        return lung_ct.make_network()


def _given(path: Path, task: str) -> dict[str, Tensor]:
    """Return a user's weights; only the name tells the task, the keys are the same."""
    if not path.is_file():
        raise ValueError(f"weights: {path} does not exist or is not a file")
    names = {k: (Path(t.url).name, Path(t.place).name) for k, t in TASKS.items()}
    owners = [k for k, both in names.items() if path.name in both]
    if owners and task not in owners:
        raise ValueError(
            f"weights: {path} has the name of the published {' or '.join(owners)} "
            f"weights but the task is {task!r}, and nothing inside would tell; pass "
            f"the file for {task!r}, or rename this one if it is"
        )
    return _read(path, f"weights: {path}", "pass another file")


def _read(path: Path, name: str, advice: str) -> dict[str, Tensor]:
    """Return the contents of a file; the name and the advice are for errors."""
    with path.open("rb") as file:  # or an OSError that says why not
        is_archive = file.read(2) == b"PK"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, OSError, ...
        what = "is truncated" if is_archive else "is not a weights file"
        if zipfile.is_zipfile(path):
            what = "holds more than tensors, which is not safe to load"
        raise ValueError(
            f"{name} {what}; expected a whole file written by "
            f"torch.save(net.regis_net.state_dict(), path): {advice}"
        ) from error
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(
            f"{name} holds a {type(state).__name__} that is not names and tensors; "
            "expected net.regis_net.state_dict() alone: save that"
        )
    _check_fit(state, name, advice)
    return state


def _check_fit(state: dict[str, Tensor], name: str, advice: str) -> None:
    """Raise a ValueError with what is missing, unexpected or misshapen, if anything."""
    expected = _make_network("meta").regis_net.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shaped = [
        f"{key} {list(state[key].shape)} for {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if not (missing or unexpected or shaped):
        return
    many = len(missing) + len(shaped) > len(expected) // 2
    what = "it is of another architecture" if many else "some keys were changed"
    why = f"{what} ({len(state)} keys, expected {len(expected)}): {advice}"
    if {key.removeprefix("regis_net.") for key in state} == set(expected):
        why = "it holds the loss too: save net.regis_net.state_dict()"
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shaped}
    odd = "; ".join(
        f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' * (len(keys) > 5)}"
        for kind, keys in kinds.items()
        if keys
    )
    raise ValueError(f"{name} does not fit the network ({odd}); {why}")


def _published(task: str) -> dict[str, Tensor]:
    """Return the published weights, downloaded unless they are here (say, by ICON)."""
    import pooch  # type: ignore[import-untyped]

    published = TASKS[task]
    url, place = published.url, Path(published.place)

    def check(part: Path) -> None:
        name, advice = f"the file downloaded from {url}", "try again later"
        # torch.load does not look at the checksums in the file.
        if zipfile.is_zipfile(part):
            with zipfile.ZipFile(part) as archive:
                if archive.testzip() is not None:
                    raise ValueError(f"{name} is damaged: {advice}")
        _read(part, name, advice)

    if not place.exists():
        part = place.with_name(f"{place.name}.part")
        try:
            pooch.retrieve(
                url,
                known_hash=published.sha256,
                fname=place.name,
                path=place.parent,
                downloader=ResumingDownloader(part, check),
            )
        except OSError as error:  # those of requests among them
            raise FileNotFoundError(
                f"the {task} weights are not here and could not be downloaded "
                f"({type(error).__name__}: {str(error)[:120]}); download {url} and "
                f"save it as {place.absolute()}, or pass its path as weights"
            ) from error
        finally:
            with suppress(OSError):  # folders with something in them stay
                place.parent.rmdir()
                place.parent.parent.rmdir()
    return _read(place, str(place), "delete it to have it downloaded again")


class ResumingDownloader:
    """A pooch downloader that goes on where an earlier one was cut, if the server can.

    Args:
        part: the file as far as it has come, kept when the connection fails.
        check: called with the whole file; one that it refuses is deleted.
    """

    def __init__(self, part: Path, check: Callable[[Path], None]) -> None:
        self.part, self.check = part, check

    def __call__(self, url: str, output_file: str, pooch: Any = None) -> None:
        """Download to ``output_file``, whole and checked.

        Raises:
            OSError: the connection fails, and again with nothing gained.
            ValueError: from ``check``.
        """
        import requests
        from requests.exceptions import ChunkedEncodingError

        while True:
            before = self._size()
            try:
                self._fetch(url)
                break
            except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError):
                if self._size() <= before:
                    raise
        try:
            self.check(self.part)
        except ValueError:
            self.part.unlink()
            raise
        os.replace(self.part, output_file)

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _fetch(self, url: str) -> None:
        """Append what is missing, or get all if the server cannot go on from there."""
        import requests

        start = self._size()
        # Compressed on the way, a range would count other bytes.
        headers = {"Accept-Encoding": "identity"}
        headers |= {"Range": f"bytes={start}-"} if start else {}
        with requests.get(url, headers=headers, stream=True, timeout=30) as response:
            span = response.headers.get("Content-Range", "")
            goes_on = response.status_code == 206 and span.startswith(f"bytes {start}-")
            if start and response.status_code in (206, 416) and not goes_on:
                self.part.unlink()  # what is here is not the beginning of that file
                return self._fetch(url)
            response.raise_for_status()
            start = start if goes_on else 0
            total = start + int(response.headers.get("Content-Length", 0))
            bar = tqdm(initial=start, total=total or None, unit="B", unit_scale=True)
            with bar, self.part.open("ab" if start else "wb") as file:
                for block in response.iter_content(_BLOCK):
                    bar.update(file.write(block))


def lung_network_preprocess(image: Any, segmentation: Any = None) -> Any:
    """Scale lung CT (HU), [-1000, 0] to [0, 1], float32; zero outside a mask.

    Differs from ICON: any pixel type; a label counts as one, not as its number.

    Args:
        image: an ITK image, or a tensor ``[B, 1, *grid]``; the same comes back.
        segmentation: of the same kind, zero outside the lungs.

    Raises:
        TypeError: another kind of image.
        ValueError: an image that is constant or not finite, an empty segmentation.
    """
    return _prepare(image, segmentation, lambda x: (x.clamp(-1000, 0) + 1000) / 1000)


def brain_network_preprocess(image: Any) -> Any:
    """Scale brain MRI, maximum to 0.9, float32; else as `lung_network_preprocess`."""

    def scale(item: Tensor) -> Tensor:
        if item.max() <= 0:
            raise ValueError("image has no voxel above zero; is it a brain MRI?")
        return torch.mul(item, 0.9 / item.max())

    return _prepare(image, None, scale)


def unigradicon_network_preprocess(
    image: Any, modality: str = "ct", mask: Any = None
) -> Any:
    """Scale as uniGradICON, [0, 1], float32; else as `lung_network_preprocess`.

    ``"ct"`` clips Hounsfield units to [-1000, 1000], ``"mri"`` intensities to the 99th
    percentile.
    """
    if modality not in ("ct", "mri"):
        raise ValueError(f"modality must be 'ct' or 'mri', got {modality!r}")

    def scale(item: Tensor) -> Tensor:
        low, high = torch.tensor([-1000.0, 1000.0]).to(item)
        if modality == "mri":
            rank = max(1, int(0.99 * item.numel()))
            low, high = item.min(), item.flatten().kthvalue(rank).values
        if low >= high:
            raise ValueError("image has one value in 99 of 100 voxels; crop it")
        return torch.div(item.clamp(low, high) - low, high - low)

    return _prepare(image, mask, scale)


def _prepare(image: Any, mask: Any, scale: Callable[[Tensor], Tensor]) -> Any:
    """Return the image, each item of the batch scaled, times the mask."""
    if mask is not None:
        check_kind("segmentation", mask, "image", image)
    if is_itk(image):
        from icon_nephi.io import itk_images

        itk_images.check_itk_image("image", image)
        place = itk_images.geometry_of(image)
        if mask is not None:
            itk_images.check_itk_image("segmentation", mask)
            if itk_images.geometry_of(mask) != place:
                mask = itk_images.resample_to(mask, image)
            mask = itk_images.tensor_of(mask)
        scaled = _prepare(itk_images.tensor_of(image), mask, scale)
        return itk_images.image_of(scaled[0, 0].numpy(), place)
    if isinstance(image, Tensor) and not image.is_complex():
        image = image.float()
    check_image("image", image)
    check_intensities("image", image)
    scaled = torch.stack([scale(item) for item in image])
    if mask is not None:
        check_mask("segmentation", mask, image.shape[2:])
        scaled = scaled * mask.to(scaled).clamp(0, 1)
    return scaled
