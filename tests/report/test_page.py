"""The report: one page, no network, right numbers, controls that work."""

import json
import re
import shutil
from importlib import metadata

import numpy as np
import pytest
import torch

from icon_nephi.io import itk_images
from icon_nephi.io.image_input import voxel_geometry
from icon_nephi.io.pair_input import as_volume
from icon_nephi.registration import result as registration
from icon_nephi.registration.result import Registration
from icon_nephi.report import page as report
from icon_nephi.report import scene as layers
from tests.small_fits import geometry, rows_in, small_fit, unit_matrix

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
KEYS = ["fixed", "warped", "moving", "checkerboard", "difference", "grid"]
KEYS += ["jacobian", "consistency", "error"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few and small pictures: what is tested does not depend on their size."""
    monkeypatch.setattr(layers, "PICTURE", 24)
    monkeypatch.setattr(layers, "FLAT", 24)
    monkeypatch.setattr(layers, "MAP", 12)
    monkeypatch.setattr(report, "SLICES", 4)


def centred(size, seed):
    """An oblique, anisotropic place around the origin."""
    place = geometry(size, seed)
    half = np.array(place.spacing) * (np.array(size[::-1]) - 1) / 2
    origin = tuple((-np.array(place.direction) @ half).tolist())
    return type(place)(place.size, place.spacing, origin, place.direction)


def made(dimension=3, *, itk=True, strength=0.01, seed=0):
    """A registration with its images: a ball in each."""
    sizes = ((16, 20, 18), (17, 15, 19)) if dimension == 3 else ((16, 20), (17, 15))
    places = [
        centred(n, s) if itk else voxel_geometry(n)
        for n, s in zip(sizes, (1, 2), strict=True)
    ]
    fit = small_fit(dimension, unit_matrix(dimension), strength=strength, seed=seed)
    result = Registration(fit, *places, itk=itk)
    images = []
    for size in sizes:
        grid = np.stack(
            np.meshgrid(*[np.linspace(-1, 1, n) for n in size], indexing="ij")
        )
        images.append((1000 * (np.square(grid).sum(0) < 0.3)).astype(np.int16))
    if itk:
        images = [
            itk_images.image_of(i, p) for i, p in zip(images, places, strict=True)
        ]
    else:
        images = [torch.from_numpy(i)[None, None].float() for i in images]
    result.images = (*images, None, images[1])
    result.made_with = {"modality": None, "seed": 7, "seconds": 12.3}
    return result


def written(tmp_path, result, **extras):
    path = tmp_path / "R.html"
    result.report(path, **extras)
    text = path.read_text("utf-8")
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1]
    return path, text, json.loads(data)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("itk", [True, False])
def test_every_view_has_every_layer_at_every_slice(tmp_path, dimension, itk):
    _, text, views = written(tmp_path, made(dimension, itk=itk))
    names = {(3, True): ["Axial", "Coronal", "Sagittal"], (2, True): ["Image"]}
    names |= {(3, False): ["Axis 0", "Axis 1", "Axis 2"], (2, False): ["Image"]}
    assert [view["name"] for view in views] == names[dimension, itk]
    for view in views:
        assert set(view["pictures"]) == set(KEYS)
        for pictures in view["pictures"].values():
            assert len(pictures) == len(view["places"]) == (4 if dimension == 3 else 1)
            assert all(p.startswith("data:image/png;base64,") for p in pictures)
    assert text.count('type="range"') == (3 if dimension == 3 else 0)
    assert not re.search(r"\bnan\b", re.sub(r"data:[^\"]*", "", text).lower())


def test_nothing_is_fetched_from_anywhere(tmp_path):
    _, text, _ = written(tmp_path, made())
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "http:" not in text
    assert "https:" not in text
    assert "default-src 'none'" in text


def test_landmark_errors_are_those_of_the_points(tmp_path):
    result = made()
    fixed = rows_in(result.geometry_B, 25, np.random.default_rng(0), 0.3, 0.7)
    goals = result.transform_points(fixed) + np.array([0.0, 3.0, 4.0])
    _, text, _ = written(
        tmp_path, result, landmarks_fixed=fixed, landmarks_moving=goals
    )
    before = np.linalg.norm(fixed - goals, axis=1).mean()
    assert "5.00 mm" in text
    assert f"mean of 25 landmarks; before {before:.2f} mm" in text


def test_dice_is_measured_where_the_map_leads(tmp_path):
    result = made(strength=0.001)
    fixed_labels = result.images[1]
    moving_labels = result.warp_labels(fixed_labels, inverse=True)
    _, text, _ = written(
        tmp_path, result, labels_fixed=fixed_labels, labels_moving=moving_labels
    )
    value = float(re.search(r"Dice</dt><dd class=\"value\">([\d.]+)", text)[1])
    assert value > 0.85
    assert "Label 1000" in text


def test_the_page_says_how_to_get_it_again(tmp_path):
    _, text, _ = written(tmp_path, made())
    assert "icon_nephi.register(" in text
    assert "seed=7" in text
    assert metadata.version("torch") in text
    _, text, _ = written(
        tmp_path, made(), command="nephi-register --x '<b>'", seconds=5
    )
    assert "nephi-register --x &#39;&lt;b&gt;&#39;" in text
    assert "icon_nephi.register(" not in text
    assert ">5 s<" in text


def test_doubts_are_said_in_words(tmp_path):
    folded = made(strength=1.0)
    _, text, _ = written(tmp_path, folded)
    assert "Look at this first" in text
    assert "The affine start is doubtful." in text
    assert re.search(r"The map folds at [\d.]+ % of the voxels", text)
    assert "do not trust the map there" in text
    calm = made(strength=0.0)
    calm.fit.warnings.clear()
    _, text, _ = written(tmp_path, calm)
    assert "The map folds" not in text


def test_images_that_headers_put_apart_are_shown_after_the_affine_start():
    result = made()
    far = type(result.geometry_A)(
        result.geometry_A.size,
        result.geometry_A.spacing,
        tuple(x + 1e4 for x in result.geometry_A.origin),
        result.geometry_A.direction,
    )
    moved = Registration(result.fit, result.geometry_B, far, itk=True)
    values = [itk_images.array_of(image) for image in result.images[:2]]
    moved.geometry_A, moved.geometry_B = far, result.geometry_B
    images = [
        itk_images.image_of(v, p)
        for v, p in zip(values, (far, result.geometry_B), strict=True)
    ]
    moved.images = (*images, None, None)
    scene = layers.Scene(moved)
    assert scene.apart
    middle = result.geometry_B.unit_to_physical().numpy()
    centre = (middle[:3, :3] @ np.full(3, 0.5) + middle[:3, 3])[None]
    assert not scene.A.outside(scene.before(centre)).any()
    assert not layers.Scene(result).apart


def test_images_read_in_parts_are_shown_as_those_in_memory():
    result = made()
    points = rows_in(result.geometry_B, 50, np.random.default_rng(0))
    scene = layers.Scene(result)
    moving, fixed, *_ = result.images
    result.images = (
        *(as_volume("image", image) for image in (moving, fixed)),
        *(None, None),
    )
    parts = layers.Scene(result)
    np.testing.assert_allclose(parts.fixed(points), scene.fixed(points), atol=1e-5)
    np.testing.assert_allclose(parts.moving(points), scene.moving(points), atol=1e-5)


def test_an_ensemble_shows_in_the_expected_error(tmp_path):
    _, alone, _ = written(tmp_path, made())
    _, text, _ = written(tmp_path, made(), others=[made(seed=1), made(seed=2)])
    assert "the spread of 3 seeds" in text
    assert "the spread of" not in alone


@pytest.mark.parametrize(
    ("extras", "words"),
    [
        ({"landmarks_fixed": np.zeros((3, 3))}, "landmarks_moving is missing"),
        (
            {"landmarks_fixed": np.zeros((3, 3)), "landmarks_moving": np.zeros((2, 3))},
            "row n of one must be row n of the other",
        ),
        (
            {"landmarks_fixed": np.zeros((3, 2)), "landmarks_moving": np.zeros((3, 2))},
            r"landmarks_fixed must be \[N, 3\]",
        ),
        ({"labels_moving": 1}, "labels_fixed is missing"),
    ],
)
def test_bad_extras_are_refused_and_nothing_is_left(tmp_path, extras, words):
    with pytest.raises(ValueError, match=words):
        made().report(tmp_path / "R.html", **extras)
    assert not list(tmp_path.iterdir())


def test_label_maps_hold_whole_numbers(tmp_path):
    result = made(itk=False)
    halves = [image / 2000 for image in result.images[:2]]
    with pytest.raises(ValueError, match=r"labels_fixed holds .* not whole"):
        result.report(
            tmp_path / "R.html", labels_fixed=halves[1], labels_moving=halves[0]
        )


def test_a_loaded_registration_has_no_images(tmp_path):
    made().save(tmp_path / "r.nephi")
    loaded = registration.load(tmp_path / "r.nephi")
    with pytest.raises(ValueError, match="a report needs the images"):
        loaded.report(tmp_path / "R.html")
    with pytest.raises(ValueError, match=r"must end in \.html"):
        made().report(tmp_path / "R.pdf")
    assert [p.name for p in tmp_path.iterdir()] == ["r.nephi"]


# --- in a browser -------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as player:
        found = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser, path, **context):
    """The page, the addresses it asked for and its complaints."""
    page = browser.new_page(**context)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    return page, asked, complaints


def test_slider_and_layers_work_by_keyboard_and_nothing_is_fetched(tmp_path, browser):
    path, _, views = written(tmp_path, made())
    page, asked, complaints = opened(browser, path)
    picture = page.locator("figure img").first
    shown = {key: views[0]["pictures"][key] for key in KEYS}
    assert picture.get_attribute("src") == shown["warped"][2]
    slider = page.get_by_role("slider", name="Axial slice")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert picture.get_attribute("src") == shown["warped"][3]
    assert "slice 4 of 4" in slider.get_attribute("aria-valuetext")
    page.keyboard.press("Home")
    assert picture.get_attribute("src") == shown["warped"][0]
    page.get_by_role("radio", name="Warped").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="Moving").is_checked()
    assert picture.get_attribute("src") == shown["moving"][0]
    page.get_by_role("radio", name="Jacobian").check(force=True)
    assert picture.get_attribute("src") == shown["jacobian"][0]
    assert picture.get_attribute("alt").startswith("Axial: Jacobian, ")
    captions = page.locator("[data-about]:visible")
    assert captions.count() == 1
    assert "Folds are magenta" in captions.inner_text()
    decoded = "img => img.complete && img.naturalWidth > 0"
    assert all(page.locator("img").nth(i).evaluate(decoded) for i in range(3))
    assert complaints == []
    fetched = [u for u in asked if not u.startswith("data:")]
    assert fetched == [path.as_uri()]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_wide_and_narrow_light_and_dark(tmp_path, browser, scheme, width):
    path, _, _ = written(tmp_path, made())
    viewport = {"width": width, "height": 800}
    page, _, complaints = opened(browser, path, viewport=viewport, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colour = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    dark = sum(int(x) for x in re.findall(r"\d+", colour)[:3]) < 200
    assert dark == (scheme == "dark")
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(h => h.tagName)")
    assert levels[0] == "H1"
    assert levels.count("H1") == 1
    assert complaints == []
    page.close()


def test_a_flat_image_has_one_view_without_a_slider(tmp_path, browser):
    path, _, views = written(tmp_path, made(2))
    page, _, complaints = opened(browser, path)
    page.get_by_role("radio", name="Fixed", exact=True).check(force=True)
    source = page.locator("figure img").get_attribute("src")
    assert source == views[0]["pictures"]["fixed"][0]
    assert page.get_by_role("slider").count() == 0
    assert complaints == []
    page.close()
