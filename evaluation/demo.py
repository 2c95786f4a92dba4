"""Register a synthetic breathing chest and look at the result.

    python -m evaluation.demo --out DIR

Writes the images with their labels, landmarks and a mesh of the lungs (inhale_*, which
moves, and exhale_*, which is fixed), then the result: pair.nephi, transform.hdf5,
warped.nii.gz, report.html and demo.png. Prints how good it is.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from evaluation import (
    DIRECTIONS,
    image_from,
    peak_memory,
    to_physical,
    write_transform,
)
from icon_nephi.report.metrics import landmark_summary, summarize


def main(out: Path, shape: tuple[int, ...] = (96, 80, 96), seed: int = 0) -> None:
    """Register the phantom; write it and the result into a folder."""
    import itk

    import icon_nephi

    moving, fixed, points = chest(shape, seed)
    out.mkdir(parents=True, exist_ok=True)
    write_example(out, moving, fixed, points, seed)
    start, wall = time.process_time(), time.perf_counter()
    result = icon_nephi.register(moving, fixed, modality="ct", seed=seed)
    seconds = time.process_time() - start, time.perf_counter() - wall
    for warning in result.warnings:
        print(f"warning: {warning}")

    before = landmark_summary(points["fixed"], points["moving"])
    print(f"images                  {' x '.join(map(str, shape))} voxels, breathing in")
    print(f"landmarks               {len(points['fixed'])}")
    print(f"TRE before              {_in_mm(before)}")
    for direction in DIRECTIONS:
        source, goal = direction.split("_to_")
        moved = result.transform_points(points[source], direction)
        label = f"TRE {source} to {goal}"
        print(f"{label:23s} {_in_mm(landmark_summary(moved, points[goal]))}")
    print(f"folds                   {100 * result.fold_fraction():.4g} % of voxels")
    errors = summarize(np.asarray(result.inverse_consistency_error()))
    print(f"inverse consistency     {_in_mm(errors)}")
    print(f"registration            {seconds[1]:.1f} s ({seconds[0]:.1f} CPU s)")

    names = ("pair.nephi", "transform.hdf5", "warped.nii.gz", "report.html", "demo.png")
    saved, transform, warped, report, picture = (out / name for name in names)
    result.save(saved)
    write_transform(result.phi_AB, transform)
    image = result.warp(moving)
    itk.imwrite(image, str(warped), compression=True)
    landmarks = {f"landmarks_{name}": rows for name, rows in points.items()}
    result.report(report, **landmarks)
    draw(result, moving, fixed, image, picture)
    memory = peak_memory()
    if memory:
        print(f"peak memory             {memory / 2**20:.0f} MB, everything together")
    for name in names:
        print(f"wrote                   {out / name}")


def write_example(out: Path, moving, fixed, points, seed: int) -> None:
    """Write what there is to register as files: inhale_* moves, exhale_* is fixed."""
    import itk

    from icon_nephi.phantoms import LABELS, breathing_thorax

    phantom = breathing_thorax(np.asarray(fixed).shape, seed=seed)
    both = (
        ("inhale", "moving", moving, phantom.labels_A),
        ("exhale", "fixed", fixed, phantom.labels_B),
    )
    for name, side, image, labels in both:
        organs = image_from(labels[0, 0].numpy(), fixed)
        itk.imwrite(image, str(out / f"{name}.nii.gz"), compression=True)
        itk.imwrite(organs, str(out / f"{name}_labels.nii.gz"), compression=True)
        rows = {"delimiter": ",", "header": "x,y,z", "comments": "", "fmt": "%.4f"}
        np.savetxt(out / f"{name}_points.csv", points[side], **rows)
    lung = itk.binary_mask3_d_mesh_source(organs, object_value=LABELS["right lung"])
    itk.meshwrite(lung, str(out / "exhale_lung.vtk"))


def chest(shape: tuple[int, ...], seed: int) -> tuple:
    """Return moving and fixed ITK images and their landmarks ``[N, d]`` in LPS mm."""
    from icon_nephi.phantoms import breathing_thorax

    phantom = breathing_thorax(shape, seed=seed)
    last = np.array(shape[::-1]) - 1
    images, points = [], {}
    for name, values, unit in (
        ("moving", phantom.image_A, phantom.points_A),
        ("fixed", phantom.image_B, phantom.points_B),
    ):
        image = image_from(values[0, 0].numpy().astype(np.int16))
        image.SetSpacing([float(s) for s in phantom.spacing[::-1]])
        image.SetOrigin((-0.5 * np.array(image.GetSpacing()) * last).tolist())
        images.append(image)
        points[name] = to_physical(image, unit.double().numpy()[:, ::-1] * last)
    return *images, points


def draw(result, moving, fixed, warped, path: Path) -> None:
    """Draw the coronal section through the middle: images, map, differences."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arrays = {
        name: np.asarray(image, dtype=np.float32)
        for name, image in (("moving", moving), ("fixed", fixed), ("warped", warped))
    }
    middle = arrays["fixed"].shape[1] // 2
    slices = {name: array[:, middle] for name, array in arrays.items()}
    field = np.asarray(result.displacement_field())[:, middle]
    determinant = np.asarray(result.jacobian_determinant())[:, middle]
    spacing = tuple(fixed.GetSpacing())
    extent = [0, spacing[0] * field.shape[1], 0, spacing[2] * field.shape[0]]
    section = {"origin": "lower", "extent": extent, "interpolation": "bilinear"}
    ct = {**section, "cmap": "gray", "vmin": -1000, "vmax": 300}
    difference = {**section, "cmap": "RdBu_r", "vmin": -900, "vmax": 900}

    style = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 4, figsize=(13, 6.9), layout="constrained")
        for axis in axes.flat:
            axis.set_axis_off()
            axis.set_aspect("equal")
        for axis, name, title in (
            (axes[0, 0], "moving", "moving (breathed in)"),
            (axes[0, 1], "fixed", "fixed (breathed out)"),
            (axes[0, 2], "warped", "moving, warped onto fixed"),
        ):
            axis.imshow(slices[name], **ct)
            axis.set_title(title)
        bound = max(0.1, float(np.abs(np.log2(np.clip(determinant, 0.05, 20))).max()))
        shown = axes[0, 3].imshow(
            np.log2(np.clip(determinant, 2.0**-bound, 2.0**bound)),
            **{**section, "cmap": "PuOr", "vmin": -bound, "vmax": bound},
        )
        axes[0, 3].set_title(
            f"volume change, least determinant {determinant.min():.2f}"
        )
        figure.colorbar(shown, ax=axes[0, 3], label="log$_2$ det J", shrink=0.75)
        for axis, name, title in (
            (axes[1, 0], "moving", "moving - fixed, before"),
            (axes[1, 1], "warped", "warped - fixed, after"),
        ):
            shown = axis.imshow(slices[name] - slices["fixed"], **difference)
            axis.set_title(title)
        figure.colorbar(shown, ax=axes[1, 1], label="HU", shrink=0.75)
        axes[1, 2].imshow(slices["fixed"], **{**ct, "alpha": 0.35})
        _draw_grid(axes[1, 2], field, spacing)
        axes[1, 2].set_title("where each square goes")
        length = np.linalg.norm(field, axis=-1)
        shown = axes[1, 3].imshow(length, **{**section, "cmap": "magma", "vmin": 0})
        axes[1, 3].set_title(f"displacement, up to {length.max():.1f} mm")
        figure.colorbar(shown, ax=axes[1, 3], label="mm", shrink=0.75)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _draw_grid(axis, field, spacing, every: int = 4) -> None:
    """Draw lines a few voxels apart, moved within the section (its x and z)."""
    rows, columns = field.shape[:2]
    z, x = np.mgrid[:rows, :columns] + 0.5
    x, z = x * spacing[0] + field[..., 0], z * spacing[2] + field[..., 2]
    style = {"color": "tab:blue", "linewidth": 0.7}
    for row in range(0, rows, every):
        axis.plot(x[row], z[row], **style)
    for column in range(0, columns, every):
        axis.plot(x[:, column], z[:, column], **style)
    axis.set_xlim(0, columns * spacing[0])
    axis.set_ylim(0, rows * spacing[2])


def _in_mm(numbers: dict[str, float]) -> str:
    """Return mean and 95th percentile."""
    return f"{numbers['mean']:6.2f} mm mean, {numbers['p95']:6.2f} mm 95th percentile"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    main(parser.parse_args().out)
