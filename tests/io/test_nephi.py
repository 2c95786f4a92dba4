"""A saved registration is the registration."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from icon_nephi.io.atomic import written_whole
from icon_nephi.io.nephi import FORMAT, load_fit, save_fit
from icon_nephi.registration.result import Registration, load
from tests.small_fits import geometry, rows_in, small_fit, unit_matrix


@pytest.fixture
def places():
    return geometry((12, 16, 14), 1), geometry((17, 11, 13), 2)


@pytest.fixture(params=["LatentMLP", "ModulatedSiren"])
def fit(request, places):
    return small_fit(3, unit_matrix(3), kind=request.param)


def test_everything_comes_back(tmp_path, fit, places):
    path = tmp_path / "pair.nephi"
    fit = replace(fit, similarity="mind", sharp=torch.rand(1, 3, 8, 8, 8))
    save_fit(path, fit, *places, itk=True)
    saved = load_fit(path)
    assert (saved.geometry_A, saved.geometry_B, saved.itk) == (*places, True)
    assert saved.fit.losses == fit.losses
    assert saved.fit.warnings == fit.warnings
    assert saved.fit.similarity == fit.similarity
    assert torch.equal(saved.fit.sharp, fit.sharp)
    assert torch.equal(saved.fit.matrix, fit.matrix)
    assert saved.fit.matrix.dtype == torch.float64
    assert saved.fit.code.interpolation == fit.code.interpolation
    for ours, theirs in zip(
        saved.fit.code.local_codes, fit.code.local_codes, strict=True
    ):
        assert torch.equal(ours, theirs)
    for name in ("field_AB", "field_BA"):
        states = [getattr(f, name).state_dict() for f in (saved.fit, fit)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_the_loaded_maps_are_the_saved_ones_and_can_be_saved_again(
    tmp_path, fit, places
):
    first = Registration(fit, *places, itk=True)
    first.save(tmp_path / "1.nephi")
    second = load(tmp_path / "1.nephi")
    second.save(tmp_path / "2.nephi")
    points = rows_in(places[1], 50, np.random.default_rng(0))
    moved = first.transform_points(points)
    for other in (second, load(tmp_path / "2.nephi")):
        assert np.array_equal(other.transform_points(points), moved)
        assert other.fold_fraction() == first.fold_fraction()


def test_without_losses(tmp_path, fit, places):
    empty = type(fit)(**{**vars(fit), "losses": [], "warnings": []})
    save_fit(tmp_path / "pair.nephi", empty, *places, itk=False)
    saved = load_fit(tmp_path / "pair.nephi")
    assert saved.fit.losses == []
    assert not saved.itk


def test_the_header_is_json_that_people_can_read(tmp_path, fit, places):
    path = tmp_path / "pair.nephi"
    save_fit(path, fit, *places, itk=True)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nephi"])
    assert header["format"] == FORMAT
    assert header["geometry_A"]["size"] == list(places[0].size)
    assert header["fields"]["field_AB"]["kind"] == type(fit.field_AB).__name__
    assert header["versions"]["torch"]
    assert asdict(places[0])["spacing"] == pytest.approx(
        header["geometry_A"]["spacing"]
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_truncated_files_are_refused(tmp_path, fit, places, share):
    path = tmp_path / "pair.nephi"
    save_fit(path, fit, *places, itk=True)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"not a complete \.nephi file"):
        load_fit(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "pair.nephi"
    with pytest.raises(ValueError, match="does not exist"):
        load_fit(path)
    path.write_text("x,y,z\n1,2,3\n" * 100)
    with pytest.raises(ValueError, match=r"not a complete \.nephi file"):
        load_fit(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"not a complete \.nephi file"):
        load_fit(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": FORMAT + 1}, "newer"),
        ({"local_codes": 9}, "damaged"),
        ({"interpolation": None, "geometry_A": 3}, "damaged"),
        ({"fields": {"field_AB": {"kind": "Pickle", "arguments": {}}}}, "damaged"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, fit, places, change, words):
    path = tmp_path / "pair.nephi"
    save_fit(path, fit, *places, itk=True)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nephi"]) | change
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"nephi": json.dumps(header)})
    with pytest.raises(ValueError, match=words):
        load_fit(path)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    one, two = tmp_path / "1.txt", tmp_path / "2.nii.gz"
    one.write_text("before")

    def half():
        with written_whole(one, two) as parts:
            assert [
                p.name.endswith(q.name) for p, q in zip(parts, (one, two), strict=True)
            ]
            parts[0].write_text("after")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert [p.name for p in tmp_path.iterdir()] == ["1.txt"]
    assert one.read_text() == "before"
    with written_whole(one, two) as parts:
        for part in parts:
            part.write_text("after")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.txt", "2.nii.gz"]
    assert one.read_text() == two.read_text() == "after"


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.99])
def test_a_file_in_which_one_bit_has_changed_is_refused(tmp_path, fit, places, share):
    path = tmp_path / "pair.nephi"
    save_fit(path, fit, *places, itk=True)
    data = bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is damaged|not a complete \.nephi"):
        load_fit(path)


def test_files_of_the_first_version_have_no_checksum_and_are_read(
    tmp_path, fit, places
):
    path = tmp_path / "pair.nephi"
    save_fit(path, fit, *places, itk=True)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["nephi"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    del header["sha256"], header["evidence"]
    save_file(tensors, path, metadata={"nephi": json.dumps(header)})
    assert load_fit(path).fit.evidence == {}
    tensors["field_AB.last.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"nephi": json.dumps(header)})
    with pytest.raises(ValueError, match="not finite"):
        load_fit(path)
