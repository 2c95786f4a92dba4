"""The Python code of the documentation runs.

Every ```python block of docs/*.md, in order, in one namespace a page, in an empty
folder; of README.md and getting_started.md only blocks right after a line
``<!-- runnable -->``, because the others read the user's own files.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKED = re.compile(
    r"^<!-- runnable -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
OWN_FILES = ("README.md", "getting_started.md")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def blocks(text, page):
    """The code of a page; line numbers are those of the page."""
    pattern = MARKED if page in OWN_FILES else BLOCK
    for match in pattern.finditer(text):
        yield "\n" * text.count("\n", 0, match.start(1)) + match[1]


WITH_CODE = [page for page in PAGES if any(blocks(page.read_text("utf-8"), page.name))]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem}
    for code in blocks(page.read_text("utf-8"), page.name):
        exec(compile(code, str(page), "exec"), names)


def test_the_page_on_voxel_and_neural_has_code():
    assert "voxel_to_neural.md" in [page.name for page in WITH_CODE]


def test_blocks_are_found_where_they_are():
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n"
    text += "<!-- runnable -->\n```python\ny\n```\n"
    assert list(blocks(text, "page.md")) == ["\n\nx = 1\n", "\n" * 9 + "y\n"]
    assert list(blocks(text, "README.md")) == ["\n" * 9 + "y\n"]
