"""The rules of the house: which room may know which, and what no room may do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "icon_nephi"

# A file imports only files above it.
ORDER = [
    "_check",
    "coordinates",
    "atomic",
    "versions",
    "memory",
    "interpolation",
    "sampling",
    "images",
    "codes",
    "expansions",
    "fields.workspace",
    "fields.jets",
    "fields.layers",
    "fields.protocol",
    "fields.siren",
    "fields.mlp",
    "fields",
    "encoders",
    "derivatives",
    "transforms",
    "parts",
    "lattices",
    "blocks",
    "similarities",
    "losses",
    "features",
    "affine",
    "folds",
    "optimize",
    "instance",
    "chunks",
    "preprocess",
    "models",
    "swap",
    "finer",
    "doubts",
    "starts",
    "fitting",
    "metrics",
    "phantoms",
    "physical",
    "two_way",
    "splines",
    "resampling",
    "itk_images",
    "itk_maps",
    "files",
    "point_files",
    "raw_files",
    "zarr_files",
    "block_files",
    "volumes",
    "inputs",
    "pairs",
    "trust",
    "views",
    "layers",
    "measure",
    "report",
    "registration",
    "grids",
    "streaming",
    "bounds",
    "regions",
    "determinant_bounds",
    "proofs",
    "certificate",
    "itk_wrapper",
    "pretrained_models",
    "cases",
    "methods",
    "compare",
    "describe",
    "parsers",
    "run_inputs",
    "runs",
    "warps",
    "batch",
    "cli",
]
LEAVES = {"metrics", "phantoms"}  # these know only the two topmost files
CORE = ORDER[: ORDER.index("losses") + 1]
NOT_IN_CORE = ["itk", "footsteps", "matplotlib", "torchvision"]
# Often broken or slow to import: only inside the function that needs it.
NOT_AT_TOP = ["torchvision", "icon_registration.data", "icon_registration.constricon"]

FILES = sorted(PACKAGE.glob("**/*.py"))
ALL_FILES = [
    path
    for folder in ("icon_nephi", "evaluation", "training", "tests")
    for path in sorted((ROOT / folder).glob("**/*.py"))
]


def room_of(path):
    """A file's place in the order: `fields.jets`; a folder's own file: `fields`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


ROOMS = [path for path in FILES if room_of(path)]
CORE_FILES = [path for path in ROOMS if room_of(path) in CORE]


def nodes(tree, into_functions=True):
    """Every node below `tree`; without function bodies, what runs on import."""
    for child in ast.iter_child_nodes(tree):
        function = isinstance(
            child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        )
        if into_functions or not function:
            yield child
            yield from nodes(child, into_functions)


def imported(source, into_functions=True):
    """Dotted names that `source` imports, `from .a import b` as icon_nephi.a.b."""
    names = set()
    for node in nodes(ast.parse(source), into_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = ["icon_nephi"] if node.level else []
            base = ".".join(inside + ([node.module] if node.module else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def rooms_of(names):
    """The rooms of the package among dotted names; '' for the package itself.

    Of `icon_nephi.fields.jets.sine` the room is the longest beginning in the order.
    """
    parts = [name.split(".") for name in names]
    inside = [p[1:] for p in parts if p[0] == "icon_nephi"]
    return {next(filter(ORDER.__contains__, begins(p)), [*p, ""][0]) for p in inside}


def begins(parts):
    """Of a.b.c, the longest first: a.b.c, a.b, a."""
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def among(names, forbidden):
    return {n for n in names for f in forbidden if n == f or n.startswith(f + ".")}


def calls(source):
    """Names of what `source` calls: 'print' for print(...), '.flip' for x.flip(...)."""
    functions = [n.func for n in nodes(ast.parse(source)) if isinstance(n, ast.Call)]
    plain = [f.id for f in functions if isinstance(f, ast.Name)]
    return plain + [f".{f.attr}" for f in functions if isinstance(f, ast.Attribute)]


def named(paths):
    return pytest.mark.parametrize(
        "path", paths, ids=lambda p: str(p.relative_to(ROOT))
    )


@named(ROOMS)
def test_a_file_imports_only_files_above_it(path):
    room = room_of(path)
    assert room in ORDER, f"{room} has no place in the order of {__file__}"
    above = ORDER[:2] if room in LEAVES else ORDER[: ORDER.index(room)]
    below = rooms_of(imported(path.read_text("utf-8"))) - set(above)
    assert not below, f"{room} may not import {sorted(below)}"


@named(CORE_FILES)
def test_the_core_does_without_itk_and_plotting(path):
    assert not among(imported(path.read_text("utf-8")), NOT_IN_CORE)


@named(ALL_FILES)
def test_fragile_modules_are_imported_only_where_they_are_used(path):
    at_top = imported(path.read_text("utf-8"), into_functions=False)
    assert not among(at_top, NOT_AT_TOP)


def test_importing_the_package_does_not_import_itk():
    code = "import sys, icon_nephi; print(*sys.modules, sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    loaded = result.stdout.split()
    assert "icon_nephi" in loaded
    assert not among(loaded, ["itk", "footsteps", "torchvision"])


@pytest.mark.parametrize("room", ["atomic", "memory", "versions"])
def test_light_files_do_without_torch(room):
    code = f"import sys, icon_nephi.{room}; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    assert f"icon_nephi.{room}" in loaded
    assert not among(loaded, ["itk", "torch"])


# What is reversed elsewhere, and is no order of axes: how often, and what it is.
OTHER_REVERSALS = {
    "describe": (1, "transforms, of which ITK applies the last first"),
    "encoders": (2, "levels, from the coarsest up"),
    "parts": (2, "maps still to be looked at, of which the last is next"),
    "phantoms": (1, "bends undone in the other order"),
    "views": (3, "a picture turned to be seen from its usual side"),
    "volumes": (1, "levels, from the coarsest up"),
}


def reversals(source):
    """Lines of what turns an order round: reversed(a), a.flip(0), a[::-1]."""
    lines = []
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            found = name in ("reversed", "reverse", "flip", "flipud", "fliplr")
        else:
            step = node.step if isinstance(node, ast.Slice) else None
            found = step is not None and ast.unparse(step) == "-1"
        if found:
            lines.append(node.lineno)
    return lines


@named([path for path in FILES if path.stem != "coordinates"])
def test_axes_change_their_order_in_coordinates_only(path):
    lines = reversals(path.read_text("utf-8"))
    allowed, what = OTHER_REVERSALS.get(path.stem, (0, ""))
    assert len(lines) <= allowed, (
        f"{path.name} reverses something in lines {lines} ({what or 'nothing'} may "
        "be): axes are reordered by coordinates.other_order"
    )


@named([path for path in FILES if room_of(path) != "cli"])
def test_only_the_commands_print(path):
    assert "print" not in calls(path.read_text("utf-8"))


# What a module may keep between calls, and why.
STATE = {
    "derivatives._derives_twice": "what this torch can do never changes",
    "determinant_bounds._slopes": "tables, of their arguments alone",
    "expansions._chain": "tables, of their arguments alone",
    "expansions._products": "tables, of their arguments alone",
    "expansions._sums": "tables, of their arguments alone",
    "expansions.monomials": "tables, of their arguments alone",
    "fields.FIELDS": "the registry: fields of one's own are entered",
    "fields.workspace.WORKSPACE": "memory, bounded for all fields together",
}
CONTAINERS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
MAKERS = {"dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict"}
CHANGES = {
    *("append", "extend", "insert", "remove", "pop", "popitem", "clear", "sort"),
    *("reverse", "update", "setdefault", "add", "discard", "appendleft"),
}


def last_name(node):
    """Of `a.b.c`, `c(...)` and the like: "c"."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return getattr(node, "attr", getattr(node, "id", ""))


def mutable_classes(tree):
    """Names of the classes whose objects may change: not frozen, no named tuples."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {
        node.name
        for node in classes
        if "NamedTuple" not in map(last_name, node.bases)
        and not any("frozen=True" in ast.unparse(d) for d in node.decorator_list)
    }


def changed(tree):
    """Names whose contents are changed: x[...] = 1, x += [1], x.append(1)."""
    names = set()
    for node in ast.walk(tree):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            places = [t for t in targets if isinstance(t, ast.Subscript)]
            names |= {last_name(place.value) for place in places}
        if isinstance(node, ast.AugAssign):
            names.add(last_name(node.target))
        if isinstance(node, ast.Call) and last_name(node) in CHANGES:
            names.add(last_name(getattr(node.func, "value", None)))
    return names


def kept_between_calls(sources):
    """`module.name` of what modules (their sources by name) keep and may change.

    Containers that any of them changes, objects of classes that are not frozen, names
    that are rebound by `global`, and functions that remember their results.
    """
    trees = {module: ast.parse(source) for module, source in sources.items()}
    changes = set().union(*map(changed, trees.values()))
    mutable = set().union(*map(mutable_classes, trees.values()))
    return {
        f"{module}.{name}"
        for module, tree in trees.items()
        for name in remembered(tree) | state(tree, changes, mutable)
    }


def remembered(tree):
    """Names rebound by `global`, and functions that remember their results."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            names |= set(node.names)
        decorators = getattr(node, "decorator_list", [])
        if {"cache", "lru_cache"} & set(map(last_name, decorators)):
            names.add(node.name)
    return names


def state(tree, changes, mutable):
    """Names of a module for containers among the changes, and for such objects."""
    names = set()
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        made = last_name(node.value) if isinstance(node.value, ast.Call) else ""
        container = isinstance(node.value, CONTAINERS) or made in MAKERS
        for target in map(last_name, targets):
            if made in mutable or (container and target in changes):
                names.add(target)
    return names


def test_no_module_keeps_anything_between_calls():
    sources = {room_of(path): path.read_text("utf-8") for path in FILES}
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
    lines = path.read_text("utf-8").count("\n")
    assert lines <= 400, f"{path.name} has {lines} lines: split it by what it knows"


@named(sorted((ROOT / "tests").glob("*.py")))
def test_tests_share_by_helpers_and_each_has_one_name(path):
    names = imported(path.read_text("utf-8"))
    assert not [n for n in names if n.startswith(("test_", "tests."))]


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("from . import codes", {"codes"}),
        ("from .codes import LatentCode", {"codes"}),
        ("import icon_nephi.codes as c", {"codes"}),
        ("from icon_nephi import codes, fields", {"codes", "fields"}),
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
