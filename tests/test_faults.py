"""What goes wrong from outside: Ctrl-C, too little memory, work that was killed."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_files import make_folder, pair, refused, result
from test_fitting import PLACE, SMALL
from test_optimize import run

from icon_nephi import (
    cli,
    compare,
    describe,
    itk_images,
    itk_maps,
    load,
    register,
    registration,
)
from icon_nephi.fitting import fit_pair
from icon_nephi.losses import GradientICONPoints
from icon_nephi.phantoms import triangles_and_circles


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return make_folder(tmp_path, monkeypatch)


# --- Ctrl-C -------------------------------------------------------------------------


def pressed_at(count):
    """A callback that has Ctrl-C pressed after so many steps."""

    def callback(step, _):
        if step == count:
            signal.raise_signal(signal.SIGINT)

    return callback


def test_ctrl_c_ends_the_optimisation_where_it_is():
    said = []
    history, loss = run(
        steps=30, callback=pressed_at(7), said=said, keep_on_interrupt=True
    )
    whole = run(steps=30)[0]
    assert history == whole[:7]
    assert said == [
        "stopped by the user after 7 of 30 steps: the map is what was reached"
    ]
    assert all(w.isfinite().all() for w in loss.parameters())
    weights = list(loss.parameters())
    _, same = run(steps=30, callback=pressed_at(7), keep_on_interrupt=True)
    for one, other in zip(weights, same.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ctrl_c_is_an_exception_where_nobody_asked_or_nothing_is_reached(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(steps=30, callback=pressed_at(7), said=[])

    press_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(steps=30, keep_on_interrupt=True)


def press_after(count, patch):
    """Have Ctrl-C pressed when the loss is asked for the n-th time."""
    forward, calls = GradientICONPoints.forward, []

    def pressed(*images, **extras):
        calls.append(0)
        if len(calls) == count:
            raise KeyboardInterrupt
        return forward(*images, **extras)

    patch.setattr(GradientICONPoints, "forward", pressed)


def test_the_map_that_was_reached_is_a_map_of_its_own(monkeypatch):
    drawn = (triangles_and_circles(1, size=48, seed=3).images + 1) / 2
    images = drawn.roll(3, -1), drawn
    options = {"field": SMALL, "affine": False, "progress": False}
    press_after(31, monkeypatch)
    result = register(*images, keep_on_interrupt=True, **options)
    assert len(result.losses) == 30
    assert [w for w in result.warnings if "stopped" in w] == [
        f"stopped by the user after 30 of {SMALL.steps} steps: the map is what was "
        "reached"
    ]
    before = (images[0] - images[1]).square().mean()
    after = (result.warp(images[0]) - images[1]).square().mean()
    assert after < 0.5 * before
    assert result.fold_fraction() == 0
    press_after(31, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        register(*images, **options)


def test_ctrl_c_before_there_is_a_map_keeps_nothing(monkeypatch):
    drawn = triangles_and_circles(2, size=48, seed=3).images
    press_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        register(*drawn[:, None], field=SMALL, keep_on_interrupt=True, progress=False)


def test_on_a_finer_level_it_is_the_last(monkeypatch):
    drawn = (triangles_and_circles(1, size=48, seed=3).images + 1) / 2
    settings = replace(SMALL, steps=20)
    press_after(26, monkeypatch)
    fit = fit_pair(
        drawn.roll(1, -1),
        drawn,
        PLACE,
        PLACE,
        field=settings,
        affine=False,
        progress=False,
        levels=[(drawn.roll(1, -1), drawn)] * 2,
        keep_on_interrupt=True,
    )
    assert len(fit.losses) == 25
    assert fit.warnings[0].startswith(
        "on level 1 of 2, stopped by the user after 5 of 12 steps"
    )


def stopped(command, flags, capfd):
    """What the command says when it ends by Ctrl-C: one line, exit code 130."""
    with pytest.raises(SystemExit) as stop:
        command(flags)
    assert stop.value.code == 130
    text = capfd.readouterr()
    assert text.out == ""
    assert text.err.count("\n") == 1
    return text.err.split(": ", 1)[1].strip()


def press(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["read", "fit", "write"])
def test_a_stopped_registration_writes_nothing(folder, monkeypatch, capfd, place):
    module, name = {
        "read": (itk_images, "read_image"),
        "fit": (registration, "fit_pair"),
        "write": (itk_maps.itk, "transformwrite"),
    }[place]
    monkeypatch.setattr(module, name, press)
    outputs = {"transform_out": "out/t.hdf5", "save": "out/p.nephi"}
    said = stopped(cli.register, [*pair(**outputs), "--quiet"], capfd)
    assert said == "stopped by the user; what was not finished is not written"
    assert not list((folder.path / "out").iterdir())


@pytest.mark.parametrize("name", ["warp", "jacobian", "info", "compare"])
def test_the_other_commands_stop_so_too(folder, monkeypatch, capfd, name):
    result().save("pair.nephi")
    start = ["--transform", "pair.nephi", "--out", "out/o.nrrd"]
    module, function, flags = {
        "warp": (itk_maps.itk, "imwrite", [*start, "--image", "moving.nrrd"]),
        "jacobian": (itk_maps.itk, "imwrite", start),
        "info": (describe, "describe", ["pair.nephi"]),
        "compare": (compare, "find_cases", ["--data", ".", "--out", "out/c.csv"]),
    }[name]
    monkeypatch.setattr(module, function, press, raising=False)
    said = stopped(getattr(cli, name), flags, capfd)
    assert said.startswith("stopped by the user")
    assert not list((folder.path / "out").iterdir())


def test_of_many_pairs_the_finished_ones_are_kept(folder, monkeypatch, capfd):
    rows = ["name,fixed,moving", *(f"{n},fixed.nrrd,moving.nrrd" for n in "ab")]
    (folder.path / "pairs.csv").write_text("\n".join(rows))
    flags = ["--pairs", "pairs.csv", "--out_dir", "out", "--quiet"]
    fit, calls = registration.fit_pair, []

    def second(*images, **options):
        calls.append(0)
        return press() if len(calls) == 2 else fit(*images, **options)

    monkeypatch.setattr(registration, "fit_pair", second)
    said = stopped(cli.register, flags, capfd)
    assert said == (
        "stopped by the user; 1 of 2 pairs are done, and the same command goes on with "
        "the others"
    )
    out = folder.path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["a", "summary.csv"]
    cli.register(flags)
    assert len(calls) == 3
    assert [out.joinpath(n, "summary.json").is_file() for n in "ab"] == [True] * 2


def test_a_command_keeps_what_was_reached_where_it_is_asked_to(
    folder, monkeypatch, capsys
):
    flags = pair(save="out/p.nephi", json="out/s.json")
    cli.register([*flags, "--quiet"])
    assert folder.options["keep_on_interrupt"] is False
    said = "stopped by the user after 3 of 9 steps: the map is what was reached"
    fit = registration.fit_pair

    def early(*images, **options):
        return replace(fit(*images, **options), warnings=[said])

    monkeypatch.setattr(registration, "fit_pair", early)
    capsys.readouterr()
    cli.register([*flags, "--quiet", "--keep_on_interrupt"])
    assert folder.options["keep_on_interrupt"] is True
    assert capsys.readouterr().err == f"nephi-register: warning: {said}\n"
    assert said in json.loads(Path("out/s.json").read_text())["warnings"]
    assert said in load("out/p.nephi").warnings


@pytest.mark.parametrize(
    "more", [["--seeds", "2"], ["--model", "lung"], ["--pairs", "p"]]
)
def test_keeping_is_for_one_pair_from_scratch(folder, capfd, more):
    flags = pair(transform_out="out/t.hdf5")
    if "--pairs" in more:
        flags, more = [], ["--pairs", "fixed.nrrd", "--out_dir", "out"]
    words = "--keep_on_interrupt is for one"
    refused(
        cli.register, [*flags, *more, "--keep_on_interrupt"], words, folder.path, capfd
    )
