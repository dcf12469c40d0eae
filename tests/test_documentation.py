"""The documentation's links lead to files that are there, and its tables are those of the tests and commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import support
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "recipes" / "README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_page_of_what_works_has_the_tables_of_the_tests(request):
    ids = [item.nodeid for item in request.session.items]
    is_whole = {f"tests/{file}" for file in support.FILES} <= {name.partition("::")[0] for name in ids}
    if request.config.option.keyword or not is_whole:  # only some tests were asked for
        ids = support.collected()
    page = support.PAGE.read_text()
    assert support.with_tables(page, ids) == page


def test_the_page_of_the_commands_is_what_they_say():
    """Written by `python -m typer hira.cli.app utils docs --name hira --output docs/commands.md`."""
    from typer.cli import app

    printed = CliRunner().invoke(app, ["hira.cli.app", "utils", "docs", "--name", "hira"])
    assert (ROOT / "docs" / "commands.md").read_text().strip() == printed.stdout.strip()
