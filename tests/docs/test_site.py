"""The site is built from the pages without a dead link, can be searched, and asks nobody else for anything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.documented import ROOT

pytest.importorskip("material", reason="the docs extra is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_search_finds_it(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {f"docs/{page.stem}/" for page in (ROOT / "docs").glob("*.md")} <= found
    assert {f"docs/decisions/{page.stem}/" for page in (ROOT / "docs" / "decisions").glob("*.md")} <= found


def test_no_page_loads_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|img|link|iframe)\b[^>]*>", page.read_text("utf-8"))
        assert not [tag for tag in tags if re.search(r"(?:src|href)=\"?(?:https?:)?//", tag)], page


def test_every_link_between_pages_leads_somewhere(site):
    """mkdocs checks what is written in pages; this also sees what its hooks and the theme make of them."""
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for address in re.findall(r"<a\b[^>]*?\bhref=\"?([^\s\">]+)", page.read_text("utf-8")):
            place = address.partition("#")[0]
            if place and not re.match(r"\w+:", place):
                target = page.parent / place
                assert target.is_file() or (target / "index.html").is_file(), f"{page}: {address}"
