"""Other registration methods behind the same seam: a Case in, a result to score out.

They come with ``pip install 'icon_nephi[peers]'`` and are imported only when run. Each
but greedy, which starts from the image centres by itself and takes images as they are,
gets both images scaled to [0, 1] on the fixed grid; where the grids differ the moving
image is first shifted by the distance of the mask centroids (without masks: of the
image centres). docs/evaluation.md lists the settings.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import (
    Case,
    array_of,
    geometry,
    geometry_of,
    image_from,
    to_index,
    to_physical,
    version,
)

# Each function below that is a method, and the distribution it needs.
PEERS = {
    "ants_syn": "antspyx",
    "ants_syn_cc": "antspyx",
    "ants_syn_cc_full": "antspyx",
    "elastix": "itk-elastix",
    "elastix_no_affine": "itk-elastix",
    "convexadam": "convexAdam",
    "greedy": "picsl-greedy",
    "greedy_headers": "picsl-greedy",
}
# Unless named.
DEFAULT = ("ants_syn", "ants_syn_cc", "elastix", "convexadam", "greedy")
CT_WINDOW = (-1000.0, 500.0)  # HU that become 0 and 1
PERCENTILES = (0.1, 99.9)  # of any other image


class NotApplicable(ValueError):
    """The method does not suit this pair and was not named: no row for it."""


def missing(name: str) -> str:
    """Return one sentence if the peer of that name is not installed, else nothing."""
    if name in PEERS and version(PEERS[name]) is None:
        return f"{name}: install it with pip install 'icon_nephi[peers]'."
    return ""


# --- what every peer starts from and returns ----------------------------------------


def prepare(pair: Case) -> tuple[Any, Any, np.ndarray]:
    """Return fixed and moving image on the fixed grid in [0, 1], and the shift in mm.

    A fixed point x corresponds to x + shift in the original moving image, before
    anything is registered.
    """
    import itk

    def scaled(image: Any) -> Any:
        voxels = array_of(image)
        ct = pair.modality == "ct"
        low, high = CT_WINDOW if ct else np.percentile(voxels, PERCENTILES)
        unit = np.clip((voxels - low) / max(high - low, 1e-6), 0, 1)
        return image_from(unit.astype(np.float32), image)

    shift = np.zeros(pair.fixed.GetImageDimension())
    fixed, moving = scaled(pair.fixed), scaled(pair.moving)
    grids = zip(geometry(pair.fixed), geometry(pair.moving), strict=True)
    if not all(np.allclose(one, other, atol=1e-4) for one, other in grids):
        masks = pair.fixed_mask, pair.moving_mask
        if None not in masks:
            fixed_centre, moving_centre = (_centroid(mask) for mask in masks)
        else:
            fixed_centre, moving_centre = (_centre(i) for i in (fixed, moving))
        shift = moving_centre - fixed_centre
        translation = itk.TranslationTransform[itk.D, len(shift)].New()
        translation.SetOffset(shift.tolist())
        moving = itk.resample_image_filter(
            moving,
            transform=translation,
            use_reference_image=True,
            reference_image=fixed,
        )
    return fixed, moving, shift


def _centroid(mask: Any) -> np.ndarray:
    return to_physical(mask, np.argwhere(array_of(mask))[:, ::-1].mean(axis=0))


def _centre(image: Any) -> np.ndarray:
    return to_physical(image, (geometry(image)[2] - 1) / 2)


def voxel_centres(image: Any) -> np.ndarray:
    """Return LPS mm of every voxel, ``[*grid, d]`` with x last in the grid."""
    grid = np.indices(array_of(image).shape, np.float32)[::-1]
    return to_physical(image, np.moveaxis(grid, 0, -1))


def read_vectors(image: Any, vectors: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return vectors ``[*grid, d]`` on an image's grid at points, linear in between."""
    from scipy.ndimage import map_coordinates

    index = to_index(image, points)[:, ::-1].T
    read = [
        map_coordinates(vectors[..., axis], index, order=1, mode="nearest")
        for axis in range(points.shape[1])
    ]
    return np.stack(read, axis=1)


@dataclass
class DenseMap:
    """A transform known at the voxel centres of the fixed image.

    Attributes:
        fixed: The fixed image.
        vectors: Computes ``[*grid, d]`` displacements in mm (grid with x last, vectors
            with x first); called when scoring begins, so it costs the method nothing.
        file_size: Bytes of what the method itself keeps.
        inverse: Takes points of the moving image to the fixed one, if there is a way.
    """

    fixed: Any
    vectors: Callable[[], np.ndarray]
    file_size: int
    inverse: Callable[[np.ndarray], np.ndarray] | None = None

    @cached_property
    def displacement(self) -> np.ndarray:
        """The displacements, computed once."""
        return self.vectors()

    def transform_points(self, points: np.ndarray, direction: str) -> np.ndarray:
        """Return moved points; between voxel centres by linear interpolation."""
        if direction == "fixed_to_moving":
            return points + read_vectors(self.fixed, self.displacement, points)
        if self.inverse is None:
            raise NotImplementedError
        return self.inverse(points)

    def phi(self) -> np.ndarray:
        """Return where every voxel centre of the fixed image goes, mm."""
        return voxel_centres(self.fixed) + self.displacement

    def warp_labels(self, labels: Any) -> Any:
        """Return the moving label map on the fixed grid (nearest voxel, 0 outside)."""
        index = np.rint(to_index(labels, self.phi())).astype(np.int32)
        inside = ((index >= 0) & (index < geometry(labels)[2])).all(axis=-1)
        index[~inside] = 0
        values = array_of(labels)[tuple(np.moveaxis(index, -1, 0)[::-1])]
        return image_from(values * inside.astype(values.dtype), self.fixed)

    def fold_fraction(self, points: np.ndarray | None = None) -> float:
        """Return the fraction of voxels with a negative finite-difference determinant.

        Of the forward transform only; ICON's definition.
        """
        if points is not None:
            raise NotImplementedError
        from icon_nephi.report.measure import flips_on_grid

        return flips_on_grid(self.phi(), geometry_of(self.fixed)) / 100

    def inverse_consistency_error(self) -> np.ndarray:
        """Return the distance in mm of 20,000 fixed voxels to where they come back."""
        if self.inverse is None:
            raise NotImplementedError
        size = geometry(self.fixed)[2]
        index = np.random.default_rng(0).integers(size, size=(20_000, len(size)))
        points = to_physical(self.fixed, index)
        back = self.inverse(self.transform_points(points, "fixed_to_moving"))
        return np.linalg.norm(back - points, axis=1)


# --- ANTs ---------------------------------------------------------------------------


def ants_syn(pair: Case, threads: int = 1, asked: bool = True) -> DenseMap:
    """Return ANTs' default: affine, then SyN, both with mutual information."""
    return _ants(pair, type_of_transform="SyN")


def ants_syn_cc(pair: Case, threads: int = 1, asked: bool = True) -> DenseMap:
    """Return SyN without affine, correlation of radius 4, not at full resolution."""
    if pair.fixed.GetImageDimension() == 3 and not asked:
        raise NotApplicable("left out in 3D unless named")
    return _ants(pair, type_of_transform="SyNOnly", syn_metric="CC", syn_sampling=4)


def ants_syn_cc_full(pair: Case, threads: int = 1, asked: bool = True) -> DenseMap:
    """Return the same with 20 iterations at full resolution: minutes in 3D."""
    settings = {"syn_metric": "CC", "syn_sampling": 4, "reg_iterations": (40, 20, 20)}
    return _ants(pair, type_of_transform="SyNOnly", **settings)


def _ants(pair: Case, **settings: Any) -> DenseMap:
    import ants
    import itk
    import pandas

    fixed, moving, shift = prepare(pair)
    dimension = len(shift)

    def to_ants(image: Any) -> Any:
        return ants.from_numpy(
            np.ascontiguousarray(array_of(image).T),
            origin=[float(v) for v in itk.origin(image)],
            spacing=[float(v) for v in itk.spacing(image)],
            direction=itk.array_from_matrix(image.GetDirection()),
        )

    ants.config.set_ants_deterministic(True, seed_value=0)
    folder = tempfile.TemporaryDirectory()
    found = ants.registration(
        to_ants(fixed), to_ants(moving), outprefix=f"{folder.name}/t", **settings
    )
    forward, back = found["fwdtransforms"], found["invtransforms"]
    affine = next((f for f in forward if f.endswith(".mat")), None)
    warp = next(f for f in forward if not f.endswith(".mat"))

    def vectors() -> np.ndarray:
        assert Path(folder.name).is_dir()  # it lives as long as this function
        axes = (*reversed(range(dimension)), dimension)
        moved = ants.image_read(warp).numpy().transpose(axes)  # LPS mm
        if affine:
            transform = ants.read_transform(affine)
            numbers, centre = transform.parameters, transform.fixed_parameters
            matrix = np.reshape(numbers[:-dimension], (dimension, dimension))
            start = voxel_centres(fixed)
            relative = start + moved - centre
            moved = relative @ matrix.T + numbers[-dimension:] + centre - start
        return moved + shift

    def inverse(points: np.ndarray) -> np.ndarray:
        assert Path(folder.name).is_dir()
        names = list("xyz"[:dimension])
        table = pandas.DataFrame(points - shift, columns=names)
        flags = [file.endswith(".mat") for file in back]
        moved = ants.apply_transforms_to_points(
            dimension, table, back, whichtoinvert=flags
        )
        return moved[names].to_numpy()

    size = sum(Path(file).stat().st_size for file in {*forward, *back})
    return DenseMap(fixed, vectors, size, inverse)


# --- elastix ------------------------------------------------------------------------


def elastix(
    pair: Case, threads: int = 1, asked: bool = True, affine: bool = True
) -> DenseMap:
    """Return affine, then a B-spline of 16 mm, 3 levels of 500 iterations each."""
    import itk

    fixed, moving, shift = prepare(pair)
    parameters = itk.ParameterObject.New()
    for kind in ("affine", "bspline") if affine else ("bspline",):
        stage = parameters.GetDefaultParameterMap(kind, 3)
        stage["MaximumNumberOfIterations"] = ["500"]
        stage["NumberOfSpatialSamples"] = ["4096"]
        stage["RandomSeed"] = ["0"]
        stage["WriteResultImage"] = ["false"]
        if kind == "bspline":  # without the bending energy of its default
            stage["Registration"] = ["MultiResolutionRegistration"]
            stage["Metric"] = ["AdvancedMattesMutualInformation"]
            stage["FinalGridSpacingInPhysicalUnits"] = ["16"]
            stage["GridSpacingSchedule"] = ["4", "2", "1"]
        parameters.AddParameterMap(stage)
    method = itk.ElastixRegistrationMethod[type(fixed), type(fixed)].New(
        fixed, moving, parameter_object=parameters, number_of_threads=threads
    )
    method.SetLogToConsole(False)
    method.Update()
    found = method.GetTransformParameterObject()

    def vectors() -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:  # it writes the field there too
            field = itk.transformix_deformation_field(
                moving, found, log_to_console=False, output_directory=folder
            )
            return array_of(field) + shift

    with tempfile.TemporaryDirectory() as folder:
        for number in range(found.GetNumberOfParameterMaps()):
            file = str(Path(folder) / f"{number}.txt")
            itk.ParameterObject.WriteParameterFile(found.GetParameterMap(number), file)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return DenseMap(fixed, vectors, size)


def elastix_no_affine(pair: Case, threads: int = 1, asked: bool = True) -> DenseMap:
    """Return elastix's B-spline alone."""
    return elastix(pair, threads, asked, affine=False)


# --- ConvexAdam ---------------------------------------------------------------------


def convexadam(pair: Case, threads: int = 1, asked: bool = True) -> DenseMap:
    """Return ConvexAdam with MIND features and a search range of 6."""
    import torch
    from convexAdam.convex_adam_MIND import convex_adam_pt

    if pair.fixed.GetImageDimension() != 3:
        raise NotApplicable("left out: it registers 3D images only")
    torch.set_num_threads(threads)
    fixed, moving, shift = prepare(pair)
    voxels = convex_adam_pt(  # [*grid, 3] voxels, vector in the order of the axes
        torch.from_numpy(array_of(fixed).copy()),
        torch.from_numpy(array_of(moving).copy()),
        disp_hw=6,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    _, matrix, _ = geometry(fixed)
    return DenseMap(
        fixed,
        lambda: voxels[..., ::-1] @ matrix.T + shift,
        voxels.astype(np.float32).nbytes,
    )


# --- greedy -------------------------------------------------------------------------


def greedy(
    pair: Case, threads: int = 1, asked: bool = True, start: str = "-ia-image-centers"
) -> DenseMap:
    """Return affine with correlation of radius 4, then greedy's own of radius 2."""
    import itk
    import picsl_greedy

    d = pair.fixed.GetImageDimension()
    run = {2: picsl_greedy.Greedy2D, 3: picsl_greedy.Greedy3D}[d]().execute
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        for side in ("fixed", "moving"):
            itk.imwrite(getattr(pair, side), str(at / f"{side}.mha"))
        same = f"-d {d} -threads {threads} -i {at}/fixed.mha {at}/moving.mha"
        wide, fine = ("x".join([radius] * d) for radius in "42")
        run(f"{same} -a -dof 12 {start} -m NCC {wide} -n 100x50x10 -o {at}/affine.mat")
        run(
            f"{same} -it {at}/affine.mat -m WNCC {fine} -n 100x50x20 "
            f"-s 1.732vox 0.7071vox -o {at}/warp.mha -oinv {at}/back.mha"
        )
        signs = np.diag([-1.0, -1.0, *(1.0,) * (d - 1)])  # greedy's matrix is RAS
        matrix = signs @ np.loadtxt(at / "affine.mat") @ signs
        warp, back = (itk.imread(str(at / f"{name}.mha")) for name in ("warp", "back"))
        size = sum((at / n).stat().st_size for n in ("affine.mat", "warp.mha"))

    def vectors() -> np.ndarray:
        start = voxel_centres(pair.fixed)
        moved = start + array_of(warp)
        return moved @ matrix[:d, :d].T + matrix[:d, d] - start

    def inverse(points: np.ndarray) -> np.ndarray:
        between = np.linalg.solve(matrix[:d, :d], (points - matrix[:d, d]).T).T
        return between + read_vectors(back, array_of(back), between)

    return DenseMap(pair.fixed, vectors, size, inverse)


def greedy_headers(pair: Case, threads: int = 1, asked: bool = True) -> DenseMap:
    """Return the same from where the headers put the images."""
    return greedy(pair, threads, asked, start="-ia-identity")
