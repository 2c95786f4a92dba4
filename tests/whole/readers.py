"""What the rules of the house read of source files: imports, calls, what is kept."""

import ast
import subprocess
import sys
from pathlib import Path


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


def among(names, forbidden):
    return {n for n in names for f in forbidden if n == f or n.startswith(f + ".")}


def calls(source):
    """Names of what `source` calls: 'print' for print(...), '.flip' for x.flip(...)."""
    functions = [n.func for n in nodes(ast.parse(source)) if isinstance(n, ast.Call)]
    plain = [f.id for f in functions if isinstance(f, ast.Name)]
    return plain + [f".{f.attr}" for f in functions if isinstance(f, ast.Attribute)]


def steps(source):
    """How often a name that ends in "optimizer" is asked for its step()."""
    functions = [n.func for n in nodes(ast.parse(source)) if isinstance(n, ast.Call)]
    return sum(
        isinstance(f, ast.Attribute)
        and f.attr == "step"
        and last_name(f.value).endswith("optimizer")
        for f in functions
    )


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


def loaded_by(code):
    """The modules that a fresh process has imported after some code."""
    code = f"import sys; sys.argv = ['x']\n{code}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
