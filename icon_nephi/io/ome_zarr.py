"""OME-Zarr folders: the levels of a pyramid read, one level written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from icon_nephi.space.chunks import Box, Level
from icon_nephi.space.frames import Array, Geometry, other_order

_UNITS: dict[str | None, float] = {
    **dict.fromkeys(("nanometer", "nm"), 1e-6),
    **dict.fromkeys(("micrometer", "um", "µm", "micron"), 1e-3),
    **dict.fromkeys(("millimeter", "mm", None), 1.0),
    **dict.fromkeys(("centimeter", "cm"), 10.0),
    **dict.fromkeys(("meter", "m"), 1000.0),
}


def zarr_levels(path: Path) -> list[Level]:
    """Return the levels of a folder: see `icon_nephi.io.volumes.open_volume`."""
    try:
        import zarr
    except ImportError as error:
        raise ImportError(
            f"{path} is read with the package zarr; run pip install 'icon_nephi[zarr]'"
        ) from error
    try:
        node: Any = zarr.open(str(path), mode="r")
    except Exception as error:  # zarr raises many kinds
        raise ValueError(f"{path} is not a Zarr array or group") from error
    if isinstance(node, zarr.Array):
        names = [*"zyx"][3 - node.ndim :] if node.ndim < 3 else [*"tczyx"][-node.ndim :]
        return [_level(path, node, names, [1.0] * node.ndim, [0.0] * node.ndim)]
    attributes = dict(node.attrs)
    scales = attributes.get("ome", attributes).get("multiscales")
    if not scales:
        raise ValueError(
            f"{path} is a Zarr group without multiscales metadata; give one of its "
            f"arrays: {sorted(key for key, _ in node.arrays())[:8]}"
        )
    axes = [a if isinstance(a, dict) else {"name": a} for a in scales[0]["axes"]]
    names = [axis["name"] for axis in axes]
    units = np.ones(len(axes))
    for i, axis in enumerate(axes):
        unit = axis.get("unit")
        if axis["name"] in "zyx" and unit not in _UNITS:
            raise ValueError(
                f"{path} has the unit {unit!r} on axis {axis['name']}, expected one of "
                f"{[u for u in _UNITS if u]}; correct its metadata"
            )
        units[i] = _UNITS.get(unit, 1.0)
    levels = []
    for dataset in scales[0]["datasets"]:
        scale, shift = np.ones(len(names)), np.zeros(len(names))
        for source in (dataset, scales[0]):
            for step in source.get("coordinateTransformations", ()):
                numbers = np.array(step.get(step["type"], 1.0), float)
                if step["type"] == "scale":
                    scale, shift = scale * numbers, shift * numbers
                elif step["type"] == "translation":
                    shift = shift + numbers
        array, ends = node[dataset["path"]], (scale * units, shift * units)
        levels.append(_level(path, array, names, *ends))
    return levels


def _level(path: Path, array: Any, names: list[str], scale: Any, shift: Any) -> Level:
    spatial = [i for i, name in enumerate(names) if name in "zyx"]
    others = [n for i, n in enumerate(array.shape) if i not in spatial]
    order = "".join(names[i] for i in spatial)
    if array.ndim != len(names) or not "zyx".endswith(order):
        raise ValueError(
            f"{path} has axes {names} and shape {array.shape}, expected z, y, x (2D: "
            "y, x) last and in this order; convert it"
        )
    if any(n != 1 for n in others):
        raise ValueError(
            f"{path} has axes {names} of shape {tuple(array.shape)}: several images in "
            "one; write the channel and time to register as one of its own"
        )

    def read(box: Box) -> Array:
        index: list[int | slice] = [0] * array.ndim
        for i, part in zip(spatial, box, strict=True):
            index[i] = part
        return np.asarray(array[tuple(index)])

    d = len(spatial)
    geometry = Geometry(
        size=tuple(int(array.shape[i]) for i in spatial),
        spacing=other_order(float(scale[i]) for i in spatial),
        origin=other_order(float(shift[i]) for i in spatial),
        direction=tuple(map(tuple, np.eye(d).tolist())),
    )
    if not min(geometry.spacing) > 0:
        raise ValueError(f"{path} has the scale {list(scale)}; it must be positive")
    chunk = tuple(int(array.chunks[i]) for i in spatial)
    return Level(geometry, chunk, np.dtype(array.dtype), read)


def zarr_writer(
    folder: Path,
    place: Geometry,
    channels: Sequence[int],
    dtype: np.dtype[Any],
    block: int,
) -> Callable[[Box, Array], None]:
    """Make a folder of OME-Zarr 0.4, channels first; return what writes a block."""
    import zarr

    group = zarr.open_group(str(folder), mode="w", zarr_format=2)
    shape = (*channels, *place.size)
    chunks = (*channels, *(min(block, n) for n in place.size))
    array = group.create_array("0", shape=shape, chunks=chunks, dtype=dtype)
    names = "zyx"[3 - place.dimension :]
    axes: list[Any] = [{"name": "c", "type": "channel"}] * len(channels)
    axes += [{"name": n, "type": "space", "unit": "millimeter"} for n in names]
    scale = [1.0] * len(channels) + [*place.tensor_spacing]
    shift = [0.0] * len(channels) + [*other_order(place.origin)]
    steps: list[Any] = [
        {"type": "scale", "scale": scale},
        {"type": "translation", "translation": shift},
    ]
    datasets = [{"path": "0", "coordinateTransformations": steps}]
    scales: Any = {"version": "0.4", "name": "0", "axes": axes, "datasets": datasets}
    group.attrs["multiscales"] = [scales]

    def write(box: Box, values: Array) -> None:
        if channels:
            array[(slice(None), *box)] = np.moveaxis(values, -1, 0)
        else:
            array[box] = values

    return write
