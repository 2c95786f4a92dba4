"""A field of one's own: registered, fitted, saved, loaded, exported, certified."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import icon_nephi
from icon_nephi.fields import FIELDS, make_field, name_of_field, register_field
from icon_nephi.fields.expansions import linear, sine, through
from icon_nephi.fit.settings import GRID, make_pair
from icon_nephi.io import itk_images
from icon_nephi.phantoms import triangles_and_circles
from icon_nephi.registration.result import Registration
from tests.small_fits import geometry, rows_in, small_fit, unit_matrix

SIZE = 32


class WaveField(nn.Module):
    """Two layers on the code alone; it knows its `arguments` and how to `expand`."""

    def __init__(self, dimension, code_size, *, width=8, gain=1.0, generator=None):
        super().__init__()
        self.arguments = {
            "dimension": dimension,
            "code_size": code_size,
            "width": width,
            "gain": gain,
        }
        self.gain = gain
        self.first = nn.Linear(code_size, width)
        self.last = nn.Linear(width, dimension, bias=False)
        with torch.no_grad():
            self.first.weight.normal_(0, 0.3, generator=generator)
            self.first.bias.normal_(0, 0.3, generator=generator)
            self.last.weight.zero_()

    def forward(self, points, values):
        return self.last(torch.sin(self.gain * self.first(values)))

    def expand(self, points, values):
        hidden = sine(through(self.first, values, self.gain), values.degree)
        return linear(hidden, self.last.weight.to(hidden.rows))


class DumbField(nn.Module):
    """One that knows nothing of itself."""

    def __init__(self, dimension, code_size, *, generator=None):
        super().__init__()
        self.last = nn.Linear(code_size, dimension)

    def forward(self, points, values):
        return self.last(values)


@pytest.fixture(autouse=True)
def names():
    """The fields of these tests, registered while one of them runs."""
    register_field("wave", WaveField)
    register_field("dumb", DumbField)
    yield
    FIELDS.pop("wave", None)
    del FIELDS["dumb"]


SETTINGS = replace(
    GRID,
    field="wave",
    arguments=(("width", 12), ("gain", 0.75)),
    grids=(4, 6),
    channels=(4, 4),
    strides=(4.0, 2.0),
    shares=(0.5, 0.5),
    exact=(False, False),
    steps=40,
    patches=80,
    regularity_points=60,
)


def fitted():
    drawn = triangles_and_circles(2, size=SIZE, seed=3)
    place = geometry((SIZE, SIZE), 1)
    moving, fixed = (
        itk_images.image_of(((image[0] + 1) / 2).numpy(), place)
        for image in drawn.images
    )
    return icon_nephi.register(
        moving, fixed, field=SETTINGS, affine=False, progress=False, seed=2
    )


def test_a_pair_is_registered_saved_exported_and_certified_with_it(tmp_path):
    result = fitted()
    field = result.fit.field_AB
    assert type(field) is WaveField
    assert (field.gain, field.first.out_features) == (0.75, 12)
    assert result.losses[-1]["all_loss"] < result.losses[0]["all_loss"]
    points = rows_in(result.geometry_B, 50, np.random.default_rng(0), 0.1, 0.9)
    moved = result.transform_points(points)
    assert np.abs(moved - points).max() > 0.1  # it moved something

    result.save(tmp_path / "pair.nephi")
    loaded = icon_nephi.load(tmp_path / "pair.nephi")
    assert type(loaded.fit.field_BA) is WaveField
    np.testing.assert_array_equal(loaded.transform_points(points), moved)

    exported = loaded.phi_AB
    theirs = [exported.TransformPoint(point) for point in points.tolist()]
    np.testing.assert_allclose(np.array(theirs), moved, atol=0.05)

    answer = icon_nephi.certify(loaded, progress=False)
    assert answer.proven > 0.99
    determinants = np.asarray(loaded.jacobian_determinant()).ravel()
    assert 0 < answer.smallest <= determinants.min()


def registered_with(field):
    fit = small_fit(2, unit_matrix(2))
    place = geometry((9, 8), 1)
    fit = replace(fit, field_AB=field(2, fit.code.size))
    return Registration(fit, place, place, itk=True)


def test_a_file_says_which_field_must_be_registered_first(tmp_path):
    result = registered_with(WaveField)
    result.save(tmp_path / "pair.nephi")
    del FIELDS["wave"]
    with pytest.raises(ValueError, match=r"got 'wave'; register another with icon_n"):
        icon_nephi.load(tmp_path / "pair.nephi")
    with pytest.raises(ValueError, match="WaveField has none; register it"):
        result.save(tmp_path / "again.nephi")
    assert not (tmp_path / "again.nephi").exists()


def test_what_a_field_lacks_is_said_in_a_sentence(tmp_path):
    result = registered_with(DumbField)
    assert result.fold_fraction() >= 0  # what it lacks is not needed for that
    with pytest.raises(TypeError, match=r"field DumbField cannot be certified.*expand"):
        icon_nephi.certify(result, progress=False)
    with pytest.raises(ValueError, match=r"DumbField cannot be saved .* `arguments`"):
        result.save(tmp_path / "pair.nephi")


def test_a_name_is_given_once_and_to_a_class():
    register_field("wave", WaveField)  # again: nothing new
    with pytest.raises(ValueError, match=r"'wave' is that of .*WaveField.* already"):
        register_field("wave", DumbField)
    with pytest.raises(TypeError, match="class of torch modules"):
        register_field("other", lambda points, values: points)
    assert name_of_field(make_field("dumb", {"dimension": 2, "code_size": 3})) == "dumb"


def test_arguments_of_a_field_are_not_rounded():
    settings = replace(
        GRID, field="ModulatedSiren", arguments=(("width", 8), ("first_omega", 0.5))
    )
    pair = make_pair(settings, (1.0, 1.0), torch.Generator().manual_seed(0))
    assert pair.field_AB.first_omega == 0.5
