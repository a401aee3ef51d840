"""Documents: their Python runs, their links lead somewhere, and every public name is on the page of names."""

from __future__ import annotations

import re
from pathlib import Path

import contrastile
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_page_runs_top_to_bottom(page):
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text)]
    links += [ROOT / name for name in re.findall(r"`(tests/[\w/]+\.py)`", text)]
    assert [str(link) for link in links if not link.exists()] == []


def test_every_public_name_is_documented():
    names = (ROOT / "docs" / "api.md").read_text()
    modules = {"backends", "ops"}  # named by what they hold
    assert [name for name in contrastile.__all__ if name not in names and name not in modules] == []
