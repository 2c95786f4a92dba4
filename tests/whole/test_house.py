"""The rules of the house: which wing may know which, and what no room may do."""

import functools
from pathlib import Path

import pytest

import icon_nephi
from tests.whole.readers import (
    among,
    calls,
    imported,
    kept_between_calls,
    loaded_by,
    reversals,
    steps,
)

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "icon_nephi"

# A file imports only from its own wing and from those before it; what lies beside the
# wings is a wing of its own.
WINGS = [
    *("_check", "_memory", "phantoms", "core"),
    *("space", "fields", "maps", "losses", "fit", "io"),
    *("report", "registration", "proofs"),
    *("models", "swap", "itk_wrapper", "pretrained_models"),
    *("commands", "cli"),
]
# Documented import paths that lead into the wings: they import and do nothing else.
DOORS = {"grids", "streaming", "transforms", "volumes"}
CORE = WINGS[: WINGS.index("losses") + 1]
NOT_IN_CORE = ["itk", "footsteps", "matplotlib", "torchvision"]
# Often broken or slow to import: only inside the function that needs it.
NOT_AT_TOP = ["torchvision", "icon_registration.data", "icon_registration.constricon"]
# Where ITK is imported: at the top in rooms that are there for it, inside functions
# where an ITK image may come.
KNOW_ITK = {
    "io.image_files",
    "io.itk_frames",
    "io.itk_images",
    "io.itk_transforms",
    "io.other_transforms",
    "registration.itk_pair",
    "itk_wrapper",
}
# Who moves weights: the loop, and what optimises something else than a loss.
STEPS = {
    "fit.steps": "torch's steps of the loop",
    "fit.affine": "twelve numbers of an affine map",
    "fit.unfold": "codes, against folds alone",
    "fit.dense": "spline codes, all places at a step: there is nothing to draw",
    "commands.methods": "the voxel network that NePhi is compared with",
}

FILES = sorted(PACKAGE.glob("**/*.py"))
ALL_FILES = [
    path
    for folder in ("icon_nephi", "evaluation", "training", "tests")
    for path in sorted((ROOT / folder).glob("**/*.py"))
]
SCRIPTS = [
    path
    for path in ALL_FILES
    if path.parts[len(ROOT.parts)] in ("evaluation", "training")
]
TESTS = sorted((ROOT / "tests").glob("**/*.py"))


@functools.cache
def read(path):
    return path.read_text("utf-8")


def room_of(path):
    """A file's name in the package: `fields.jets`; a folder's own file: `fields`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


ROOMS = {room_of(path): path for path in FILES}


def room_in(name):
    """The room of the package in a dotted name, '' for the package, None elsewhere."""
    first, *parts = name.split(".")
    if first != "icon_nephi":
        return None
    begins = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((begin for begin in begins if begin in ROOMS), "")


def rooms_of(names):
    return {room for name in names if (room := room_in(name)) is not None}


def wing_of(room):
    return room.partition(".")[0]


def named(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=lambda p: str(p.relative_to(ROOT))
    )


INSIDE = [path for room, path in ROOMS.items() if room and room not in DOORS]


@named(INSIDE)
def test_a_file_imports_only_from_its_wing_and_those_before(path):
    wing = wing_of(room_of(path))
    assert wing in WINGS, f"{wing} has no place in the order of {__file__}"
    known = WINGS[: WINGS.index(wing) + 1]
    rooms = rooms_of(imported(read(path)))
    wrong = {room for room in rooms if not room or wing_of(room) not in known}
    assert not wrong, f"{room_of(path)} may not import {sorted(wrong)}"


def test_no_room_imports_itself_by_way_of_others():
    below = {room: rooms_of(imported(read(path))) for room, path in ROOMS.items()}
    below.pop("")  # the front door shows every name there is
    left = {room: {r for r in rooms if r in below} for room, rooms in below.items()}
    while ready := [room for room, rooms in left.items() if not rooms & left.keys()]:
        for room in ready:
            del left[room]
    assert not left, f"a circle: {sorted(left)}"


@named([ROOMS[door] for door in sorted(DOORS)])
def test_a_door_only_imports(path):
    lines = read(path).splitlines()[1:]
    assert all(line.startswith("from icon_nephi.") or not line for line in lines)


@named([path for path in INSIDE if wing_of(room_of(path)) in CORE])
def test_the_core_does_without_itk_and_plotting(path):
    assert not among(imported(read(path)), NOT_IN_CORE)


@named(FILES)
def test_itk_is_known_where_it_is_expected(path):
    at_top = among(imported(read(path), into_functions=False), ["itk"])
    assert not at_top or room_of(path) in KNOW_ITK
    wing = wing_of(room_of(path))
    anywhere = among(imported(read(path)), ["itk"])
    assert not anywhere or wing in ("io", "registration", "itk_wrapper", "phantoms")


@named(ALL_FILES)
def test_fragile_modules_are_imported_only_where_they_are_used(path):
    assert not among(imported(read(path), into_functions=False), NOT_AT_TOP)


# What scripts may use beside what `icon_nephi` exports and its doors.
PUBLIC = {
    *("models", "swap", "itk_wrapper", "pretrained_models", "phantoms", "cli"),
    "report.metrics",
}
# What a script uses beyond, and why.
TENSORS = "images and maps as tensors"
RIVALS = "nephi-compare's methods and rows, with more methods and rows"
INNER = {
    "evaluation": (
        "_memory commands.cases io.atomic io.image_files io.itk_images "
        "io.itk_transforms io.versions "
        "maps.two_way",
        "what most scripts need, in one place: cases, files, voxels, memory",
    ),
    "evaluation.accuracy.compare_voxel": (
        "commands.compare commands.methods commands.text",
        RIVALS,
    ),
    "evaluation.accuracy.kill_trials": (
        "fields fit.settings fit.unfold io.itk_transforms io.nephi space.frames",
        "kills what writes, and makes fits that take no time",
    ),
    "evaluation.accuracy.pairs": ("commands.cases io.points", "reads known cases"),
    "evaluation.accuracy.peers": ("report.measure", "counts folds as the report does"),
    "evaluation.accuracy.residual_on_voxel": (
        "fit.optimize fit.settings io.image_input losses.regularity "
        "losses.similarities space.intensities",
        "the fit of a voxel field with the package's own loop",
    ),
    "evaluation.accuracy.robustness": (
        "fit.doubts fit.settings",
        "judges the doubts by their evidence, with today's thresholds",
    ),
    "evaluation.accuracy.trust": (
        "io.image_input io.resampling report.expected_error space.intensities",
        "fits the weights of the expected error",
    ),
    "evaluation.accuracy.voxel": (
        "commands.methods fit.refine io.image_input losses.regularity maps.networks "
        "space.images",
        RIVALS,
    ),
    "evaluation.speed.bench_core": (
        "core core.arrays fields fields.codes fields.compiled fit.compiled "
        "fit.settings losses.features losses.gradient_icon losses.regularity "
        "losses.similarities maps.networks maps.transforms space.images "
        "space.sampling",
        "times the pieces of the core, each beside its reference",
    ),
    "evaluation.paper.dirlab": (
        "commands.cases io.itk_transforms registration.itk_pair",
        "reads cases, and transforms of other programs",
    ),
    "evaluation.paper.latent_interpolation": (
        "maps.jacobians space.frames space.images",
        TENSORS,
    ),
    "evaluation.paper.shapes": (
        "fit.optimize fit.settings losses.regularity",
        "looks into a fit while it runs, under other regularisers",
    ),
    "evaluation.paper.table1_pairs": (
        "commands.compare commands.methods commands.text io.itk_images report.measure",
        RIVALS,
    ),
    "evaluation.paper.table2_learned": ("space.intensities", TENSORS),
    "evaluation.speed.bench": (
        "commands.text commands.methods losses.similarities",
        "a process for each row, a table of them, a loss to time",
    ),
    "evaluation.speed.bench_export": (
        "commands.methods fit.settings maps.framed space.frames",
        "times an inner room: maps.framed",
    ),
    "evaluation.speed.bench_field": ("fields", "times an inner room: fields"),
    "evaluation.speed.gpu": (
        "core fit.refine maps.lattices maps.transforms",
        "times inner rooms on a device: refinement, lattices, chunks",
    ),
    "evaluation.speed.bench_instance": ("space.intensities", TENSORS),
    "evaluation.speed.bench_regularizer": (
        "fields.compiled space.frames",
        "tensors, and the products of matrices that the core does",
    ),
    "evaluation.speed.bench_scaling": (
        "fit.settings losses.similarities",
        "times a step of a fit that grows",
    ),
    "evaluation.speed.memory_vs_resolution": (
        "commands.methods fit.refine io.image_input",
        "measures the refinement of tensors",
    ),
    "training.data": ("io.atomic space.frames space.images", TENSORS),
    "training.finetune": (
        "fit.affine fit.content fit.learned fit.optimize io.atomic io.image_files "
        "io.pair_input losses.similarities",
        "the network's own view of a pair",
    ),
    "training.train_general": (
        "fields.pyramid io.atomic space.frames space.images",
        "the network inside, and what its levels say",
    ),
    "training.judge": ("maps.jacobians space.frames space.images", TENSORS),
    "training.loop": ("io.atomic space.images", TENSORS),
    "training.networks": ("losses.similarities", "a similarity of blocks"),
    "training.train_brain": ("space.intensities", TENSORS),
    "training.train_hippocampus": ("space.intensities", TENSORS),
    "training.train_lung": ("space.frames", TENSORS),
}


def inner_rooms(source):
    """The rooms that a script uses beyond what is public."""
    rooms = set()
    for name in imported(source):
        room = room_in(name)
        own = name.removeprefix("icon_nephi.")
        exported = own in (*icon_nephi.__all__, "icon_nephi", "report.write_report")
        if room is not None and room not in PUBLIC | DOORS and not exported:
            rooms.add(room)
    return rooms


@named(SCRIPTS)
def test_scripts_use_public_names(path):
    script = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    rooms, _ = INNER.get(script.removesuffix(".__init__"), ("", ""))
    assert inner_rooms(read(path)) == set(rooms.split()), "INNER has to say so"
    names = [n for n in imported(read(path)) if room_in(n) is not None]
    assert not [n for n in names if n.rpartition(".")[2].startswith("_")]


def test_importing_the_package_does_not_import_itk():
    loaded = loaded_by("import icon_nephi; icon_nephi.GradientICONPoints")
    assert "icon_nephi" in loaded
    assert not among(loaded, ["itk", "footsteps", "torchvision"])


@pytest.mark.parametrize("room", ["_memory", "io.atomic", "io.versions"])
def test_light_files_do_without_torch(room):
    loaded = loaded_by(f"import icon_nephi.{room}")
    assert f"icon_nephi.{room}" in loaded
    assert not among(loaded, ["itk", "torch"])


# What is reversed elsewhere, and is no order of axes: how often, and what it is.
OTHER_REVERSALS = {
    "commands.info": (1, "transforms, of which ITK applies the last first"),
    "fields.encoders": (2, "levels, from the coarsest up"),
    "fields.pyramid": (3, "levels, from the coarsest up"),
    "fit.dense": (2, "levels, from the finest down"),
    "io.itk_points": (1, "transforms, of which ITK applies the last first"),
    "io.volumes": (1, "levels, from the coarsest up"),
    "maps.networks": (2, "maps still to be looked at, of which the last is next"),
    "phantoms": (1, "bends undone in the other order"),
    "report.pictures": (3, "a picture turned to be seen from its usual side"),
}


@named([path for path in FILES if room_of(path) != "space.frames"])
def test_axes_change_their_order_in_frames_only(path):
    lines = reversals(read(path))
    allowed, what = OTHER_REVERSALS.get(room_of(path), (0, ""))
    assert len(lines) <= allowed, (
        f"{path.name} reverses something in lines {lines} ({what or 'nothing'} may "
        "be): axes are reordered by space.frames.other_order"
    )


def test_weights_are_moved_where_it_is_expected():
    assert {room for room, path in ROOMS.items() if steps(read(path))} == set(STEPS)


@named([path for path in FILES if room_of(path) != "cli"])
def test_only_the_commands_print(path):
    assert "print" not in calls(read(path))


# What a module may keep between calls, and why.
STATE = {
    "core.loading._chosen": "a library that is loaded stays loaded",
    "core.threads._granted": "what the system grants a process does not change",
    "fields.FIELDS": "the registry: fields of one's own are entered",
    "fields.expansions._chain": "tables, of their arguments alone",
    "fields.expansions._products": "tables, of their arguments alone",
    "fields.expansions._sums": "tables, of their arguments alone",
    "fields.expansions.monomials": "tables, of their arguments alone",
    "fields.workspace.WORKSPACE": "memory, bounded for all fields together",
    "io.itk_modules._know_formats": "what ITK is told once it knows",
    "maps.jacobians._derives_twice": "what this torch can do never changes",
    "proofs.determinants._slopes": "tables, of their arguments alone",
}


def test_no_module_keeps_anything_between_calls():
    sources = {room: read(path) for room, path in ROOMS.items()}
    assert kept_between_calls(sources) == set(STATE)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("X = {}\ndef f():\n    X[1] = 2", {"X"}),
        ("X: list[int] = []\ndef f():\n    X.append(2)", {"X"}),
        ("X = set()\ndef f():\n    global X\n    X = 1", {"X"}),
        ("X = dict(a=1)\ndef f():\n    del X['a']", {"X"}),
        ("X = [1]\ndef f():\n    return X[0]", set()),
        ("def f():\n    x = []\n    x.append(1)", set()),
        ("@functools.lru_cache(maxsize=2)\ndef f(): 0", {"f"}),
        ("class A: 0\nX = A()", {"X"}),
        ("@dataclass(frozen=True)\nclass A: 0\nX = A()", set()),
        ("class A(NamedTuple): 0\nX = A()", set()),
    ],
)
def test_what_a_module_keeps_is_seen(source, names):
    assert kept_between_calls({"a": source}) == {f"a.{name}" for name in names}


@named(FILES)
def test_a_file_is_short_enough_to_read(path):
    lines = read(path).count("\n")
    assert lines <= 400, f"{path.name} has {lines} lines: split it by what it knows"


@named(TESTS)
def test_tests_share_by_helpers_and_each_has_one_name(path):
    names = [name.split(".") for name in imported(read(path))]
    shared = [name for name in names if name[0] == "tests"]
    assert not [n for n in shared if any(part.startswith("test_") for part in n)]
    assert not [n for n in names if n[0].startswith("test_")]
    helpers = {other.stem for other in TESTS if not other.stem.startswith("test_")}
    assert not [n for n in names if n[0] in helpers], "from tests.folder import it"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("from . import models", {"models"}),
        ("from .fields import LatentMLP", {"fields"}),
        ("import icon_nephi.fields.codes as c", {"fields.codes"}),
        ("from icon_nephi import models, swap", {"models", "swap"}),
        ("from icon_nephi.fields.jets import sine", {"fields.jets"}),
        ("from icon_nephi.fields import jets, LatentMLP", {"fields.jets", "fields"}),
        ("import icon_nephi", {""}),
        ("def f():\n    from .cli import warp", {"cli"}),
        ("import icon_registration.losses, torch", set()),
    ],
)
def test_the_reader_of_imports_sees(source, rooms):
    assert rooms_of(imported(source)) == rooms


def test_the_readers_see_what_they_forbid():
    assert not inner_rooms("import icon_nephi.models\nfrom icon_nephi import load")
    assert inner_rooms("from icon_nephi.io import nephi, points as p") == {
        *("io.nephi", "io.points")
    }
    assert inner_rooms("from icon_nephi.report import page") == {"report.page"}
    inside = "def f():\n    from icon_registration import data"
    assert among(imported(inside), NOT_AT_TOP)
    assert not among(imported(inside, into_functions=False), NOT_AT_TOP)
    assert among(
        imported("try:\n    import torchvision.ops\nexcept E: 0", False), NOT_AT_TOP
    )
    assert not among(imported("import itk_io"), NOT_IN_CORE)
    assert calls("print(x.flip(1), torch.flip(x, [1]))") == ["print", ".flip", ".flip"]
    turned = "x.flip(0); np.flip(x); reversed(x); x[::-1]; x[..., ::-1]"
    assert reversals("; ".join([turned, "x[::2]", "x[-1:]", "x[-1]"])) == [1] * 5
    assert steps("self.optimizer.step(); optimizer.step(); walker.step(); step()") == 2
