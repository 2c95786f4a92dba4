"""An image pair larger than memory: made on disk, registered, warped to disk.

    python -m evaluation.speed.huge_pair --folder DATA --out huge.csv [--size 1024]
        [--memory_limit 4GiB] [--in_memory]

The phantom is a formula in the fixed image's unit box: soft organs with texture from
three voxels to the size of the body, 16 bit, on disk as OME-Zarr pyramids. The moving
image shows it after three shears along z, y and x, tens of voxels at 1024^3, whose
inverse is known too. Landmarks are random points of the body. Made once for a size;
registered in a process of its own, whose peak memory is what is reported.
"""

import argparse
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluation import csv_file, machine, write_csv

BLOCK = 64  # voxels a side of what is made at once, and of a chunk
SPACING = 0.01  # mm
LANDMARKS = 2000
COLUMNS = (
    *("size", "how", "memory_limit", "median_voxels", "p95_voxels", "before_voxels"),
    *("fold_percent", "register_minutes", "register_cpu_minutes", "peak_gib"),
    *("beside_images_gib", "warp_minutes", "warp_cpu_minutes", "warp_peak_gib"),
    *("warp_error_voxels", "warnings", "error", "machine"),
)
# Of each shear: strength in the box, waves along the two other axes, phases.
SHEARS = (
    ((0.020, 1.0, 1.5, 0.3, 1.1), (0.004, 4.0, 3.0, 2.0, 0.5)),
    ((0.016, 1.5, 1.0, 2.2, 0.2), (0.003, 3.0, 5.0, 1.0, 4.0)),
    ((0.012, 1.0, 1.0, 1.4, 5.0), (0.003, 4.0, 4.0, 3.0, 1.7)),
)
# Organs: centre, radii (of the box), brightness.
ORGANS = (
    ((0.50, 0.50, 0.50), (0.46, 0.40, 0.43), 0.45),
    ((0.40, 0.45, 0.30), (0.25, 0.22, 0.14), 0.15),
    ((0.42, 0.46, 0.70), (0.24, 0.22, 0.14), 0.18),
    ((0.75, 0.50, 0.45), (0.13, 0.22, 0.24), 0.65),
    ((0.45, 0.68, 0.52), (0.38, 0.06, 0.07), 0.85),
)


def shear(axis: int, a: Any, b: Any) -> Any:
    """Return how far a point moves along an axis, of its other two coordinates."""
    import torch

    total: Any = 0.0
    for strength, p, q, s, t in SHEARS[axis]:
        waves = torch.sin(2 * np.pi * p * a + s) * torch.cos(2 * np.pi * q * b + t)
        total = total + strength * waves
    return total


def forward(points: np.ndarray) -> np.ndarray:
    """Return where fixed-image points ``[N, 3]`` (z, y, x; unit box) lie in moving."""
    import torch

    z, y, x = torch.from_numpy(points).unbind(1)
    z = z + shear(0, y, x)
    y = y + shear(1, z, x)
    x = x + shear(2, z, y)
    return torch.stack([z, y, x], 1).numpy()


class Scene:
    """Brightness 0 to 1 at points of the box; the texture depends on the size."""

    def __init__(self, size: int, seed: int = 0) -> None:
        import torch
        import torch.nn.functional as F

        generator = torch.Generator().manual_seed(seed)
        self.size, self.tiles = size, []
        for cell in (3.0, size / 64):  # voxels between the nodes of a tile
            noise = torch.randn(1, 1, 64, 64, 64, generator=generator)
            rough = torch.randn(1, 1, 16, 16, 16, generator=generator)
            rough = F.pad(rough, (1,) * 6, mode="circular")
            rough = F.interpolate(rough, scale_factor=4, mode="trilinear")
            both = noise + 1.5 * rough[..., 4:-4, 4:-4, 4:-4]
            tile = F.pad(both, (0, 1) * 3, mode="circular")  # repeats without a seam
            self.tiles.append((size / (64 * cell), tile))

    def __call__(self, z: Any, y: Any, x: Any) -> Any:
        """Return the brightness, float32, at coordinates of one shape."""
        import torch
        import torch.nn.functional as F

        texture: Any = 0.0
        for times, tile in self.tiles:
            at = torch.stack([x, y, z], -1).mul_(times)
            at = at.sub_(at.floor()).mul_(2).sub_(1)[None]
            texture = texture + F.grid_sample(tile, at, align_corners=True)[0, 0]
        value, body, at = torch.full_like(texture, 0.05), 0.0, (z, y, x)
        low = np.array([float(c.amin()) for c in at])
        high = np.array([float(c.amax()) for c in at])
        for number, (centre, radii, level) in enumerate(ORGANS):
            apart = (np.clip(centre, low, high) - centre) / radii
            if (apart**2).sum() > 1.4:
                continue  # it is nowhere here
            parts = [(at[a] - centre[a]).div_(radii[a]).square_() for a in range(3)]
            inside = sum(parts).sub_(1).mul_(-60).sigmoid_()
            value += inside * (level - value)
            body = body if number else inside
        return value + 0.05 * body * texture


def make(folder: Path, size: int, seed: int = 0) -> None:
    """Write moving.zarr, fixed.zarr and landmarks.npz into a folder."""
    import torch
    import zarr

    scene, generator = Scene(size, seed), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    steps = torch.arange(size, dtype=torch.float32) / (size - 1)
    sizes = [size // 2**k for k in range(4)]
    starts = list(product(range(0, size, BLOCK), repeat=3))
    for name in ("moving", "fixed"):
        group = zarr.open_group(str(folder / f"{name}.zarr"), mode="w")
        arrays = [
            group.create_array(
                str(k), shape=(n,) * 3, chunks=(min(BLOCK, n),) * 3, dtype="uint16"
            )
            for k, n in enumerate(sizes)
        ]
        coarse = [np.zeros((n,) * 3, np.uint16) for n in sizes[1:]]
        for start in tqdm(starts, desc=name):
            parts = [slice(s, s + BLOCK) for s in start]
            z, y, x = torch.meshgrid(*(steps[p] for p in parts), indexing="ij")
            if name == "moving":
                x = x - shear(2, z, y)
                y = y - shear(1, z, x)
                z = z - shear(0, y, x)
            values = scene(z, y, x).numpy()
            values += 0.01 * generator.standard_normal(values.shape, np.float32)
            block = (np.clip(values, 0, 1.5) * 40_000).astype(np.uint16)
            arrays[0][tuple(parts)] = block
            means = block.astype(np.float32)
            for k, array in enumerate(coarse, 1):
                n = [m // 2 for m in means.shape]
                means = means.reshape(n[0], 2, n[1], 2, n[2], 2).mean((1, 3, 5))
                array[tuple(slice(p.start >> k, p.stop >> k) for p in parts)] = means
        for array, values in zip(arrays[1:], coarse, strict=True):
            array[:] = values
        levels = [
            {
                "path": str(k),
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1e3 * SPACING * 2**k] * 3},
                    {
                        "type": "translation",
                        "translation": [1e3 * SPACING * (2**k - 1) / 2] * 3,
                    },
                ],
            }
            for k in range(len(sizes))
        ]
        axes = [{"name": n, "type": "space", "unit": "micrometer"} for n in "zyx"]
        scales = [{"name": name, "axes": axes, "datasets": levels}]
        group.attrs["ome"] = {"version": "0.5", "multiscales": scales}
    unit = generator.uniform(0, 1, (20 * LANDMARKS, 3))
    centre, radii, _ = ORGANS[0]
    inside = (((unit - centre) / radii) ** 2).sum(1) < 0.9
    fixed = unit[inside][:LANDMARKS]
    np.savez(folder / "landmarks.npz", fixed=fixed, moving=forward(fixed))


def measure(folder: Path, size: int, limit: str, in_memory: bool) -> dict[str, Any]:
    """Return errors in voxels, minutes and peak memory; saves the registration."""
    import torch

    import icon_nephi
    from evaluation import held_memory, peak_memory
    from icon_nephi.volumes import open_volume

    volumes: list[Any] = [
        open_volume(folder / f"{name}.zarr", limit) for name in ("moving", "fixed")
    ]
    images: list[Any] = list(volumes)
    if in_memory:
        for side, volume in enumerate(volumes):
            image = torch.empty(1, 1, *volume.geometry.size)
            for start in range(0, size, BLOCK):
                rows = slice(start, start + BLOCK)
                whole = (rows, slice(0, size), slice(0, size))
                image[0, 0, rows] = torch.from_numpy(
                    volume.levels[0].read(whole).astype(np.float32)
                )
            images[side] = image
    row: dict[str, Any] = {"size": size, "memory_limit": limit}
    row["how"] = "in memory" if in_memory else "from disk"
    before = held_memory()
    began, cpu = time.monotonic(), time.process_time()
    result = icon_nephi.register(*images, memory_limit=None if in_memory else limit)
    row["register_minutes"] = (time.monotonic() - began) / 60
    row["register_cpu_minutes"] = (time.process_time() - cpu) / 60
    row["peak_gib"] = peak_memory() / 2**30
    row["beside_images_gib"] = (peak_memory() - before) / 2**30
    marks = np.load(folder / "landmarks.npz")
    fixed, moving = marks["fixed"], marks["moving"]
    if in_memory:
        moved = result.transform_points(fixed)
    else:
        mm = (size - 1) * SPACING
        moved = result.transform_points(fixed[:, ::-1] * mm)[:, ::-1] / mm
    errors = np.linalg.norm(moved - moving, axis=1) * (size - 1)
    row["before_voxels"] = float(
        np.median(np.linalg.norm(fixed - moving, axis=1)) * (size - 1)
    )
    row["median_voxels"], row["p95_voxels"] = np.quantile(errors, (0.5, 0.95)).tolist()
    points = np.random.default_rng(1).uniform(0, 1, (100_000, 3))
    points = points if in_memory else points * (size - 1) * SPACING
    row["fold_percent"] = 100 * result.fold_fraction(points)
    row["warnings"] = "; ".join(result.warnings)
    result.save(folder / "result.nephi")
    return row


def warp(folder: Path, size: int, limit: str) -> dict[str, Any]:
    """Return the cost of writing the warped moving image, and its worst error."""
    import icon_nephi
    from evaluation import peak_memory
    from icon_nephi.streaming import warp_to
    from icon_nephi.volumes import open_volume

    result = icon_nephi.load(folder / "result.nephi")
    moving, fixed = (
        open_volume(folder / f"{name}.zarr", limit) for name in ("moving", "fixed")
    )
    began, cpu = time.monotonic(), time.process_time()
    error = warp_to(
        result, moving, folder / "warped.zarr", reference=fixed, memory_limit=limit
    )
    return {
        "warp_minutes": (time.monotonic() - began) / 60,
        "warp_cpu_minutes": (time.process_time() - cpu) / 60,
        "warp_peak_gib": peak_memory() / 2**30,
        "warp_error_voxels": error,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="for the images")
    parser.add_argument("--out", type=csv_file, required=True, help="CSV")
    parser.add_argument("--size", type=int, default=1024, help="voxels a side")
    parser.add_argument("--memory_limit", default="4GiB")
    parser.add_argument("--in_memory", action="store_true", help="hold the images")
    args = parser.parse_args(argv)
    if args.size < BLOCK or args.size % BLOCK:
        parser.error(f"--size must be a multiple of {BLOCK}.")
    from evaluation.speed.bench import alone

    folder = args.folder / str(args.size)
    if not (folder / "landmarks.npz").exists():
        make(folder, args.size)
    row = alone(measure, folder, args.size, args.memory_limit, args.in_memory)
    if "error" not in row and not args.in_memory:
        row |= alone(warp, folder, args.size, args.memory_limit)
    row["machine"] = machine()
    write_csv(args.out, COLUMNS, [row])
    for key in COLUMNS:
        if row.get(key) not in (None, ""):
            print(f"{key:22s} {row[key]}")
    return 1 if "error" in row else 0


if __name__ == "__main__":
    sys.exit(main())
