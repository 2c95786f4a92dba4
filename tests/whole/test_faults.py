"""What goes wrong from outside: Ctrl-C, too little memory, work that was killed."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import itk
import numpy as np
import pytest
import torch

from icon_nephi import _memory as memory
from icon_nephi import cli, load, register
from icon_nephi.commands import cases, info, inputs
from icon_nephi.commands import register as register_command
from icon_nephi.fit import optimize as optimize_room
from icon_nephi.fit.optimize import FitOptions
from icon_nephi.io import atomic, itk_modules
from icon_nephi.io import blocks as block_files
from icon_nephi.maps.transforms import NeuralTransform
from icon_nephi.phantoms import triangles_and_circles
from icon_nephi.registration import register as registration
from icon_nephi.registration import streaming
from icon_nephi.space.chunks import ChunkedImage
from tests.commands.command_files import pair, refused, result
from tests.fit.small_runs import PLACE, SMALL, run
from tests.small_fits import fit_tensors, small_fit, unit_matrix

# --- Ctrl-C -------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def listening():
    """Python hears Ctrl-C, also where what started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressed_at(count):
    """A callback that has Ctrl-C pressed after so many steps."""

    def callback(step, _):
        if step == count:
            signal.raise_signal(signal.SIGINT)

    return callback


def test_ctrl_c_ends_the_optimisation_where_it_is():
    keep = FitOptions(progress=False, keep_on_interrupt=True)
    course, loss = run(steps=30, callback=pressed_at(7), options=keep)
    whole = run(steps=30)[0].losses
    assert course.losses == whole[:7]
    assert course.warnings == [
        "stopped by the user after 7 of 30 steps: the map is what was reached"
    ]
    assert all(w.isfinite().all() for w in loss.parameters())
    weights = list(loss.parameters())
    _, same = run(steps=30, callback=pressed_at(7), options=keep)
    for one, other in zip(weights, same.parameters(), strict=True):
        assert torch.equal(one, other)


def test_ctrl_c_is_an_exception_where_nobody_asked_or_nothing_is_reached(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        run(steps=30, callback=pressed_at(7))

    press_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(steps=30, options=FitOptions(progress=False, keep_on_interrupt=True))


def press_after(count, patch):
    """Have Ctrl-C pressed when the loss is asked for the n-th time, on either path."""
    make_steps, calls = optimize_room.make_steps, []

    def pressed_steps(*arguments):
        steps = make_steps(*arguments)
        derive = steps.derive

        def pressed(*similarity):
            calls.append(0)
            if len(calls) == count:
                raise KeyboardInterrupt
            return derive(*similarity)

        steps.derive = pressed
        return steps

    patch.setattr(optimize_room, "make_steps", pressed_steps)


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
    fit = fit_tensors(
        drawn.roll(1, -1),
        drawn,
        PLACE,
        PLACE,
        field=settings,
        affine=False,
        of_A={"finer": [ChunkedImage.of(drawn.roll(1, -1))] * 2},
        of_B={"finer": [ChunkedImage.of(drawn)] * 2},
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
        "read": (inputs, "read_image"),
        "fit": (registration, "fit_pair"),
        "write": (itk_modules, "write_transforms"),
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
        "warp": (itk_modules, "write_voxels", [*start, "--image", "moving.nrrd"]),
        "jacobian": (itk_modules, "write_voxels", start),
        "info": (info, "describe", ["pair.nephi"]),
        "compare": (cases, "find_cases", ["--data", ".", "--out", "out/c.csv"]),
    }[name]
    monkeypatch.setattr(module, function, press)
    said = stopped(getattr(cli, name), flags, capfd)
    assert said.startswith("stopped by the user")
    assert not list((folder.path / "out").iterdir())


def test_of_many_pairs_the_finished_ones_are_kept(folder, monkeypatch, capfd):
    rows = ["name,fixed,moving", *(f"{n},fixed.nrrd,moving.nrrd" for n in "ab")]
    (folder.path / "pairs.csv").write_text("\n".join(rows))
    flags = ["--pairs", "pairs.csv", "--out_dir", "out", "--quiet"]
    calls = []

    def second(given, _):
        calls.append(0)
        if len(calls) == 2:
            press()
        found = {"flags": register_command.flags_of(given)}
        given.json.write_text(json.dumps(found))
        return found

    monkeypatch.setattr(register_command, "run", second)
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

    def early(*images, **choices):
        return replace(fit(*images, **choices), warnings=[said])

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


# --- too little memory --------------------------------------------------------------

SAID = {
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
        "allocate memory: you tried to allocate 2097152000 bytes. Error code 12"
    ),
    "windows": RuntimeError(
        "DefaultCPUAllocator: not enough memory: you tried to allocate 1048576 bytes."
    ),
    "cuda": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity"
    ),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
    "itk": RuntimeError("itk::ERROR: Failed to allocate memory for image."),
    "numpy": MemoryError("Unable to allocate 7.28 TiB for an array with shape (1,)"),
    "python": MemoryError(),
}
ASKED = {"cpu": "2000 MiB", "windows": "1 MiB", "cuda": "20.00 MiB"}
ASKED["numpy"] = "7.28 TiB"


@pytest.mark.parametrize("name", SAID)
def test_what_says_that_memory_ran_out_becomes_one_sentence(name):
    assert memory.ran_out(SAID[name])
    with pytest.raises(MemoryError) as raised, memory.memory_for("a test"):
        raise SAID[name]
    said = str(raised.value)
    assert said.startswith("not enough memory for a test: ")
    assert said.endswith("memory_limit")
    assert "\n" not in said
    assert (f"{ASKED.get(name)} more were asked for" in said) == (name in ASKED)
    with pytest.raises(MemoryError, match=re.escape(said)), memory.memory_for("more"):
        raise raised.value


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), memory.memory_for("a test"):
        raise RuntimeError("shapes cannot be multiplied")
    assert not memory.ran_out(ValueError("out of memory"))


@pytest.fixture
def on_torch(monkeypatch):
    """Torch asks for memory by the number of points; the core never does."""
    monkeypatch.setenv("NEPHI_CORE", "torch")


def small_map(dimension, **options):
    fit = small_fit(dimension, unit_matrix(dimension), kind="ModulatedSiren")
    return NeuralTransform(fit.field_AB.requires_grad_(), fit.code, **options)


def too_many(count, patch):
    """Let memory suffice for so many points at once; the sizes that were asked for."""
    evaluate, asked = NeuralTransform._evaluate, []

    def limited(phi, jets, rows):
        asked.append(rows.shape[1])
        if rows.shape[1] > count:
            raise SAID["cpu"]
        return evaluate(phi, jets, rows)

    patch.setattr(NeuralTransform, "_evaluate", limited)
    return asked


@pytest.mark.parametrize("live", [False, True], ids=["no_grad", "grad"])
def test_where_memory_is_short_points_are_taken_in_smaller_parts(
    dimension, live, monkeypatch, on_torch
):
    x = torch.rand(1, dimension, 3000, *(1,) * (dimension - 1), requires_grad=live)
    with torch.set_grad_enabled(live):
        phi = small_map(dimension)
        expected = phi.value_and_jacobian(x)
        asked = too_many(400, monkeypatch)
        found = phi.value_and_jacobian(x)
        assert phi.chunk_size == 1024
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        asked.clear()
        phi.value_and_jacobian(x)
        assert max(asked) <= 400  # it remembers


def test_so_it_is_in_the_backward_pass(dimension, monkeypatch, on_torch):
    x = torch.rand(1, dimension, 2000, *(1,) * (dimension - 1), requires_grad=True)
    phi = small_map(dimension)
    weights = [x, *phi.field.parameters()]
    expected = torch.autograd.grad(phi(x).square().sum(), weights)
    for chunk_size, kept in ((8192, True), (1500, False)):
        phi.chunk_size = chunk_size
        loss = phi(x).square().sum()
        with monkeypatch.context() as patch:
            if kept:  # the graph of the forward pass is there, but cannot be used
                grad, calls = torch.autograd.grad, []

                def once(*arguments, calls=calls, grad=grad):
                    calls.append(0)
                    if len(calls) == 2:
                        raise SAID["cuda"]
                    return grad(*arguments)

                patch.setattr(torch.autograd, "grad", once)
            else:
                too_many(400, patch)
            found = torch.autograd.grad(loss, weights)
        assert phi.chunk_size < chunk_size
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_graph_of_all_points_is_used_though_chunks_became_smaller(dimension):
    x = torch.rand(1, dimension, 2000, *(1,) * (dimension - 1))
    phi = small_map(dimension)
    weights = list(phi.field.parameters())
    expected = torch.autograd.grad(phi(x).square().sum(), weights)
    loss = phi(x).square().sum()
    phi.chunk_size = 300  # as another call may have left it
    found = torch.autograd.grad(loss, weights)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_with_none_at_all_it_is_said(monkeypatch, on_torch):
    phi = small_map(3, owned=True)
    asked = too_many(0, monkeypatch)
    words = "not enough memory for the points of a map: 2000 MiB more were asked for"
    with torch.no_grad(), pytest.raises(MemoryError, match=words):
        phi(torch.rand(1, 3, 9000, 1, 1))
    assert min(asked) == 256


LIMITED = """
import resource
from pathlib import Path
import torch
from tests.small_fits import small_field
from icon_nephi.fields.codes import LatentCode
from icon_nephi.maps.transforms import NeuralTransform

torch.set_num_threads(1)
source = torch.Generator().manual_seed(0)
code = LatentCode(torch.randn(1, 60, generator=source), (torch.zeros(1, 4, 5, 5, 5),))
field = small_field("LatentMLP", 3, code.size, source, 0.1)
x = torch.rand(1, 3, 2**18, 1, 1, generator=source)
with torch.no_grad():
    phi = NeuralTransform(field, code)
    expected = phi(x)
    phi.chunk_size = 2**18
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 100 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    torch.testing.assert_close(phi(x), expected)
    print(phi.chunk_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as on Linux")
@pytest.mark.parametrize("core", ["torch", ""])
def test_a_process_that_may_take_little_memory_computes_the_same(core):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED],
        cwd=Path(__file__).parents[2],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "NEPHI_CORE": core,
        },
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    if core == "torch":
        assert 2**10 < int(done.stdout) < 2**18


def test_blocks_that_do_not_fit_are_written_in_parts(tmp_path, monkeypatch):
    made, block, sides = result(), streaming._in_block, []

    def limited(task, box, generator):
        sides.append(max(b.stop - b.start for b in box))
        if sides[-1] > 8:
            raise SAID["numpy"]
        return block(task, box, generator)

    monkeypatch.setattr(streaming, "_in_block", limited)
    path = tmp_path / "determinants.mha"
    error = streaming.jacobian_to(made, path, tolerance=1e-4, progress=False)
    assert error <= 1e-4
    assert sides[:4] == [17, 17, 16, 8]
    found = itk.array_from_image(itk.imread(str(path)))
    expected = itk.array_from_image(made.jacobian_determinant())
    inner = (slice(1, -1),) * 3  # at the border of the field's box it jumps
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-3)

    monkeypatch.setattr(streaming, "_in_block", full_of("numpy"))
    with pytest.raises(MemoryError, match="not enough memory for the determinants: 7"):
        streaming.jacobian_to(made, tmp_path / "no.mha", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["determinants.mha"]


def full_of(name):
    """A function for which there is no memory."""

    def full(*_, **__):
        raise SAID[name]

    return full


@pytest.mark.parametrize("name", ["cuda", "python", "itk"])
def test_a_command_says_it_in_one_sentence(folder, monkeypatch, capfd, name):
    monkeypatch.setattr(registration, "fit_pair", full_of(name))
    flags = pair(save="out/p.nephi")
    refused(cli.register, flags, "not enough memory for this: ", folder.path, capfd)


def test_another_error_of_the_machinery_keeps_its_traceback(folder, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(registration, "fit_pair", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.register(pair(save="out/p.nephi"))


def test_a_pair_without_memory_does_not_stop_the_others(folder, monkeypatch):
    monkeypatch.setattr(register_command, "run", full_of("cuda"))
    (folder.path / "pairs.csv").write_text("fixed,moving\nfixed.nrrd,moving.nrrd\n")
    with pytest.raises(SystemExit) as stop:
        cli.register(["--pairs", "pairs.csv", "--out_dir", "out", "--quiet"])
    assert stop.value.code == 1
    assert ",failed," in Path("out/summary.csv").read_text()
    assert (
        "not enough memory for this: 20.00 MiB" in Path("out/summary.csv").read_text()
    )


# --- work that was killed -----------------------------------------------------------


KILLED = """
import os, signal
from pathlib import Path
import numpy as np
from icon_nephi.io.blocks import written_blocks
from icon_nephi.space.frames import Geometry
from icon_nephi.io.atomic import written_whole

place = Geometry((9, 8), (1.0, 1.0), (0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)))
with (
    written_whole("b.txt", "a [1].mha") as parts,
    written_blocks(Path("a.zarr"), place, (), np.dtype(np.float32)),
):
    parts[1].write_text("the first part")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="there left over files stay")
def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == -signal.SIGKILL
    left = {p.name.split("-", 4)[4]: p.name for p in tmp_path.iterdir()}
    assert set(left) == {"a [1].mha", "a.zarr"}
    for name, part in left.items():
        _, host, process, *_ = part.split("-")
        near = [part.replace(name, f"b-{name}"), f".part-{name}", f"x{part}"]
        # Of another machine, whose processes nobody here knows.
        near.append(part.replace(host, "01234567"))
        # Of a process that lives: the one that started this one.
        near.append(part.replace(f"-{process}-", f"-{os.getppid()}-"))
        for other in near:
            (tmp_path / other).write_text("not to be touched")
        with block_files.written_blocks(tmp_path / name, PLACE, (), np.dtype("f4")):
            pass
        names = {p.name for p in tmp_path.iterdir()}
        assert part not in names
        assert names >= {name, *near}


@pytest.mark.skipif(os.name != "posix", reason="there left over files stay")
def test_what_was_there_before_stays_while_it_is_all_there_is(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # no process has this number
        old = atomic.part_of(path, kind="old")
    old.mkdir()
    atomic.part_of(path)
    assert old.exists()
    path.mkdir()
    atomic.part_of(path)
    assert not old.exists()


# --- warnings -----------------------------------------------------------------------


def test_the_package_is_imported_with_warnings_as_errors():
    folder = Path(cli.__file__).parent
    files = [p.relative_to(folder) for p in sorted(folder.glob("**/[!_]*.py"))]
    rooms = [".".join(file.with_suffix("").parts) for file in files]
    code = f"import importlib\nfor room in {rooms}:\n    importlib.import_module("
    code += "f'icon_nephi.{room}')\nimport icon_nephi\n"
    code += "[getattr(icon_nephi, name) for name in icon_nephi.__all__]"
    # ITK's, as in pyproject.toml.
    swig = "ignore:builtin type swig:DeprecationWarning"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", swig, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
