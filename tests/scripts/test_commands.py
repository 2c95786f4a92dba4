"""Every script starts, and what the documentation types is what it takes."""

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for folder in ("evaluation", "training")
    for path in sorted((ROOT / folder).glob("**/*.py"))
    if '__name__ == "__main__"' in path.read_text("utf-8")
]
PAGES = [
    *(ROOT / name for name in ("Makefile", "README.md", "CHANGELOG.md", ".ci/run")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = [
    *(
        page.read_text("utf-8").replace("`train_", "`-m training.train_")
        for page in PAGES
    ),
    *(
        ast.get_docstring(ast.parse(script.read_text("utf-8")), False)
        for script in SCRIPTS
    ),
]
# Up to the end of its line and of those indented further, or of its code.
COMMAND = re.compile(r"-m\s+((?:evaluation|training)\.[\w.]*\w)((?:[^`\n#]|\n {8})*)")


def name_of(script):
    return ".".join(script.relative_to(ROOT).with_suffix("").parts)


def documented():
    """(module, what is typed after it) of every command in the texts."""
    for text in TEXTS:
        yield from COMMAND.findall(text)


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_starts_and_takes_what_the_pages_say(script, monkeypatch, capsys):
    name = name_of(script)
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(script), run_name="__main__")
    assert stopped.value.code == 0
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for module, typed in documented():
        if module == name:
            assert set(re.findall(r"--[\w-]+", typed)) <= known, typed


def test_every_command_of_the_pages_is_a_script():
    typed = {module for module, _ in documented()}
    assert len(typed) > 25
    folders = {f"{name_of(script.parent)}.NAME" for script in SCRIPTS}
    assert typed <= {name_of(script) for script in SCRIPTS} | folders
