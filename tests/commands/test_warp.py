"""nephi-warp: several files in one call, chains, transforms of others, borders."""

import itk
import numpy as np
import pytest

from icon_nephi import cli
from icon_nephi.commands.inputs import paired
from icon_nephi.io.image_files import read_image
from icon_nephi.io.image_input import read_input
from icon_nephi.io.itk_images import array_of, image_of
from icon_nephi.io.itk_points import inverse_of, rows_through
from icon_nephi.io.itk_transforms import write_transform
from icon_nephi.io.other_transforms import read_any_transform
from icon_nephi.io.point_file import PointFile
from icon_nephi.registration.result import Registration
from icon_nephi.space.frames import Geometry
from tests.commands.command_files import PLACE_A, PLACE_B, write_points
from tests.small_fits import rows_in, small_fit, unit_matrix


def registration(seed=0, first=PLACE_A, second=PLACE_B):
    fit = small_fit(3, unit_matrix(3), seed=seed)
    return Registration(fit, first, second, itk=True)


def ramp(place, slopes=(1.0, -2.0, 0.5), base=100.0):
    """An image that is a linear function of its places: read exactly between voxels."""
    axes = np.meshgrid(*(np.arange(n) for n in place.size), indexing="ij")
    index = np.stack(axes, -1).reshape(-1, 3) / (np.array(place.size) - 1.0)
    frame = place.unit_to_physical().numpy()
    points = index @ frame[:3, :3].T + frame[:3, 3]
    values = (points @ np.array(slopes) + base).reshape(place.size)
    return image_of(values.astype(np.float32), place)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("warp")
    one, two = registration(0), registration(3, PLACE_B, PLACE_A)
    one.save(path / "one.nephi")  # B (fixed) -> A
    two.save(path / "two.nephi")  # A (fixed) -> B
    write_transform(one.phi_AB, path / "one.h5")
    itk.imwrite(one.displacement_field(), str(path / "one_field.nii.gz"))
    itk.imwrite(ramp(PLACE_A), str(path / "A.nrrd"))
    itk.imwrite(ramp(PLACE_B), str(path / "B.nrrd"))
    labels = np.random.default_rng(0).integers(0, 5, PLACE_A.size).astype(np.uint8)
    itk.imwrite(image_of(labels, PLACE_A), str(path / "L.nrrd"))
    points = rows_in(PLACE_B, 40, np.random.default_rng(1), 0.3, 0.7)
    write_points(path / "p.csv", points.tolist())
    return path, one, two, points


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    for file in made[0].iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def warp(text):
    cli.warp([*text.split(), "--quiet"])


def rows(path):
    lines = path.read_text().splitlines()[1:]
    return np.array([[float(x) for x in line.split(",")[:3]] for line in lines])


def test_several_files_are_what_each_is_alone(made, folder):
    (folder / "out").mkdir()
    warp(
        "--transform one.nephi --image A.nrrd --labels L.nrrd --points p.csv "
        "--to fixed --out_dir out"
    )
    warp("--transform one.nephi --image A.nrrd --out a.nrrd")
    warp("--transform one.nephi --labels L.nrrd --out l.nrrd")
    warp("--transform one.nephi --points p.csv --to fixed --out q.csv")
    for one, other in (("a.nrrd", "A.nrrd"), ("l.nrrd", "L.nrrd")):
        both = [read_image("x", folder / f) for f in (one, f"out/{other}")]
        assert (array_of(both[0]) == array_of(both[1])).all()
    assert (rows(folder / "q.csv") == rows(folder / "out/p.csv")).all()
    warp(
        "--transform one.nephi --points p.csv --image A.nrrd A.nrrd --out 1.nrrd "
        "2.nii.gz 3.csv --reference A.nrrd"
    )
    assert array_of(read_image("x", folder / "2.nii.gz")).shape == PLACE_A.size
    assert (folder / "3.csv").exists()


CHAINS = {
    "one": ("--transform one.nephi", lambda a, b: a),
    "two": (
        "--transform one.nephi two.nephi",
        lambda a, b: lambda p: b(a(p)),
    ),
    "an inverse": (
        "--transform one.nephi --inverse_of one.nephi",
        lambda a, b: lambda p: a(a(p), "moving_to_fixed"),
    ),
    "the order typed": (
        "--inverse_of two.nephi --transform two.nephi",
        lambda a, b: lambda p: b(b(p, "moving_to_fixed")),
    ),
    "of ITK": ("--transform one.h5 two.nephi", lambda a, b: lambda p: b(a(p))),
    "a field": ("--transform one_field.nii.gz", lambda a, b: a),
}


@pytest.mark.parametrize("name", CHAINS)
def test_points_go_through_a_chain_in_its_order(name, made, folder):
    _, one, two, points = made
    flags, of = CHAINS[name]
    expected = of(one.transform_points, two.transform_points)(points)
    warp(f"{flags} --points p.csv --out q.csv")
    off = np.abs(rows(folder / "q.csv") - expected).max()
    # A field on a small grid is read linearly between its voxels.
    assert off < (1.0 if name == "a field" else 2e-3)
    assert np.abs(expected - points).max() > 0.1


def test_an_image_comes_through_a_chain_the_other_way(made, folder):
    _, one, two, points = made
    # Points: B -> A -> B; so an image in B comes back onto B.
    warp("--transform one.nephi two.nephi --image B.nrrd --out w.nrrd")
    warped = read_image("x", folder / "w.nrrd")
    index = [
        [int(i) for i in warped.TransformPhysicalPointToIndex(p)]
        for p in points.tolist()
    ]
    centres = np.array([tuple(warped.TransformIndexToPhysicalPoint(i)) for i in index])
    moved = two.transform_points(one.transform_points(centres))
    inside = ~PLACE_B.outside(moved)
    assert inside.sum() > 20
    found = np.array([array_of(warped)[tuple(i[::-1])] for i in index])
    expected = moved @ [1.0, -2.0, 0.5] + 100
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-2)


def test_a_transform_without_an_inverse_is_inverted_by_points(made):
    _, one, _, points = made
    through = rows_through(one.phi_AB)
    np.testing.assert_allclose(through(points), one.transform_points(points), atol=2e-3)
    back = inverse_of(through)(through(points))
    np.testing.assert_allclose(back, points, atol=1e-3)
    flat = inverse_of(lambda p: p * [1.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="no inverse at"):
        flat(points + np.array([0, 0, 5.0]))


def test_many_points_of_every_kind_of_transform(made, tmp_path):
    _, one, _, points = made
    euler = itk.Euler3DTransform[itk.D].New()
    euler.SetCenter([1.0, 2, 3])
    euler.SetRotation(0.1, 0.2, -0.3)
    euler.SetTranslation([4.0, 5, 6])
    field = read_any_transform("x", made[0] / "one_field.nii.gz")
    both = itk.CompositeTransform[itk.D, 3].New()
    for part in (euler, field, one.phi_AB):
        both.AddTransform(part)
    far = points + np.array([400.0, 0, 0])
    for transform in (euler, field, one.phi_AB, both):
        for where in (points, far):
            one_by_one = [tuple(transform.TransformPoint(p)) for p in where.tolist()]
            found = rows_through(transform)(where)
            np.testing.assert_allclose(found, one_by_one, atol=1e-6)


def test_affines_of_other_programs(made, folder):
    affine = itk.AffineTransform[itk.D, 3].New()
    affine.Rotate3D([0.0, 0, 1], 0.3)
    affine.Translate([1.0, 2, 3])
    points = made[3]
    expected = np.array([tuple(affine.TransformPoint(p)) for p in points.tolist()])
    itk.transformwrite(affine, str(folder / "0GenericAffine.mat"))
    warp("--transform 0GenericAffine.mat --points p.csv --out q.csv")
    np.testing.assert_allclose(rows(folder / "q.csv"), expected, atol=1e-5)
    # greedy and c3d: RAS, from the fixed to the moving image.
    turn = np.diag([-1.0, -1, 1, 1])
    matrix = np.eye(4)
    matrix[:3, :3] = itk.array_from_matrix(affine.GetMatrix())
    matrix[:3, 3] = list(affine.GetOffset())
    np.savetxt(folder / "greedy.mat", turn @ matrix @ turn)
    warp("--transform greedy.mat --affine ras --points p.csv --out r.csv")
    np.testing.assert_allclose(rows(folder / "r.csv"), expected, atol=1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
def test_affines_of_flirt_depend_on_both_images(mirrored, tmp_path, monkeypatch):
    """A voxel of -in at known FSL millimetres: worked out by hand, voxel by voxel."""
    monkeypatch.chdir(tmp_path)
    sign = -1.0 if mirrored else 1.0
    # NIfTI's x runs to the left of the patient (LPS x grows) or to the right.
    places = [
        Geometry(size, spacing, (5.0, -7, 2), ((s, 0.0, 0), (0.0, 1, 0), (0.0, 0, 1)))
        for size, spacing, s in (
            ((6, 7, 8), (2.0, 1.5, 3.0), sign),
            ((5, 9, 10), (1.0, 2.5, 2.0), 1.0),
        )
    ]
    for name, place in zip(("ref", "in"), places, strict=True):
        itk.imwrite(image_of(np.zeros(place.size, np.uint8), place), name + ".nrrd")
    flirt = np.array(
        [[0.9, 0.1, 0, 3], [-0.1, 1.1, 0.05, -2], [0, 0, 1, 4], [0, 0, 0, 1]]
    )
    np.savetxt("flirt.mat", flirt)
    voxel = np.array([3.0, 2.0, 4.0])  # of -in

    def fsl(place, voxel):
        # FSL counts x from the other end where the axes are right-handed in RAS:
        # LPS axes with det > 0 are so, because RAS turns two of them.
        scaled = np.array(voxel) * place.spacing
        if np.linalg.det(place.direction) > 0:
            scaled[0] = (place.itk_size[0] - 1 - voxel[0]) * place.spacing[0]
        return scaled

    def lps(place, voxel):
        return np.array(place.origin) + np.array(place.direction) @ (
            np.array(voxel) * place.spacing
        )

    target = flirt @ [*fsl(places[1], voxel), 1]
    start = target[:3] / places[0].spacing  # the voxel of -ref that it falls on
    if np.linalg.det(places[0].direction) > 0:
        start[0] = places[0].itk_size[0] - 1 - start[0]
    write_points(tmp_path / "p.csv", [lps(places[0], start).tolist()])
    warp(
        "--transform flirt.mat --affine fsl --reference ref.nrrd --moving in.nrrd "
        "--points p.csv --out q.csv"
    )
    np.testing.assert_allclose(
        rows(tmp_path / "q.csv")[0], lps(places[1], voxel), atol=1e-5
    )


def test_outside_the_image_both_files_show_the_same(made, folder):
    part = array_of(read_image("x", folder / "A.nrrd"))[: PLACE_A.size[0] // 2] + 1e3
    cut = Geometry(
        part.shape, PLACE_A.spacing, PLACE_A.origin, PLACE_A.direction
    )  # its far half is missing
    itk.imwrite(image_of(part, cut), "part.nrrd")
    for flags, value in (("", part.min()), ("--outside -5.5", -5.5)):
        shown = []
        for transform in ("one.nephi", "one.h5"):
            warp(
                f"--transform {transform} --reference B.nrrd --image part.nrrd {flags} "
                "--out w.nrrd"
            )
            shown.append(array_of(read_image("x", folder / "w.nrrd")))
        missing = shown[0] == np.float32(value)
        assert 0.05 < missing.mean() < 0.95
        assert (np.abs(shown[0] - shown[1]) > 0.1).mean() < 1e-3
        assert ((shown[1] == np.float32(value)) == missing).mean() > 0.999
    warp("--transform one.nephi --labels L.nrrd --outside 255 --out l.nrrd")
    assert (array_of(read_image("x", folder / "l.nrrd")) == 255).any()


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("transform", ["one.nephi", "one.h5 --reference B.nrrd"])
def test_holes_stay_as_large_as_they_are(mode, transform, made, folder):
    whole = array_of(read_image("x", folder / "A.nrrd"))
    holed = whole.copy()
    holed[6, 8, 7], holed[2, 3, 3] = np.nan, np.inf
    itk.imwrite(image_of(holed, PLACE_A), "h.nrrd")
    for name in ("h.nrrd", "A.nrrd"):
        warp(
            f"--transform {transform} --image {name} --interpolation {mode} --outside "
            f"0 --out w_{name}"
        )
    found, full = (array_of(read_image("x", folder / f"w_{n}.nrrd")) for n in "hA")
    bad = ~np.isfinite(found)
    assert 0 < bad.sum() < 4 * 8  # of each the voxels around it
    assert np.abs(found - full)[~bad].max() < (0.01 if mode == "linear" else 2)


def test_colours_are_moved_one_by_one(made, folder):
    colours = np.random.default_rng(0).integers(0, 255, (*PLACE_A.size, 3))
    image = image_of(colours.astype(np.uint8), PLACE_A)
    itk.imwrite(image, "c.mha")
    channels = np.moveaxis(colours.astype(np.uint8), 3, 0)
    for transform in ("one.nephi", "one.h5 --reference B.nrrd"):
        warp(f"--transform {transform} --image c.mha --out w.mha")
        found = array_of(read_image("x", "w.mha", components=True))
        assert found.dtype == np.uint8
        for i, channel in enumerate(channels):
            itk.imwrite(image_of(channel, PLACE_A), "g.mha")
            warp(f"--transform {transform} --image g.mha --outside 0 --out v.mha")
            grey = array_of(read_image("x", "v.mha"))
            inside = grey > 0
            assert np.abs(found[..., i] - grey)[inside].max() <= 0.51


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e6])
def test_masks_are_where_they_are_in_any_unit(unit):
    place = Geometry((60, 64), (unit, unit), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)))
    values = np.random.default_rng(0).normal(size=place.size).astype(np.float32)
    mask = np.zeros(place.size, np.uint8)
    mask[20:40, 20:40] = 1
    for voxels in (10.0, 1e-5):  # shifted, and the rounding of a header
        moved = Geometry(
            place.size, place.spacing, (voxels * unit,) * 2, place.direction
        )
        inside = read_input("B", image_of(values, place), image_of(mask, moved))[1]
        found = np.argwhere(inside[0, 0].numpy())
        first = 20 + round(voxels)
        assert found.min(0).tolist() == [first, first]
        assert found.max(0).tolist() == [first + 19, first + 19]


def file_of(points, names=None):
    return PointFile(np.array(points, float), lambda moved: b"", names=names)


def test_landmarks_are_paired_by_their_names():
    first = file_of([[1, 0, 0], [2, 0, 0], [3, 0, 0]], ["a", "b", "c"])
    turned = file_of([[3, 1, 0], [1, 1, 0], [2, 1, 0]], ["c", "a", "b"])
    fixed, moving, said = paired(first, turned)
    assert (fixed[:, 0] == moving[:, 0]).all()
    assert not said
    fewer = file_of([[3, 1, 0], [1, 1, 0]], ["c", "a"])
    fixed, moving, said = paired(first, fewer)
    assert fixed[:, 0].tolist() == moving[:, 0].tolist() == [1, 3]
    assert "left out are those of one file only: b" in said[0]
    for names in (None, ["x", "y", "z"], ["a", "a", "c"]):
        other = turned._replace(names=names)
        fixed, moving, said = paired(first, other)
        assert (fixed == first.points).all()
        assert (moving == turned.points).all()
        assert "row by row" in said[0]
    nameless = paired(first._replace(names=None), turned._replace(names=None))
    assert not nameless[2]
