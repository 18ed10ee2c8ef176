"""Every Python snippet of README.md and docs/ runs: those of a page in order, in one namespace."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPET = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.fixture
def _log_as_before() -> Iterator[None]:
    """A page shows how to log more."""
    log = logging.getLogger("triton_brn")
    level, handlers = log.level, logging.getLogger().handlers[:]
    yield
    log.setLevel(level)
    logging.getLogger().handlers[:] = handlers


@pytest.mark.usefixtures("_log_as_before")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path) -> None:
    namespace: dict[str, object] = {}
    for snippet in SNIPPET.findall(page.read_text()):
        exec(compile(snippet, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_there_are_snippets() -> None:
    assert len(SNIPPET.findall(PAGES[0].read_text())) >= 2
    assert len(PAGES) > 4
