"""The blocks of a page of documentation, and why a block is not run where its page says so."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced or an indented block; `not_run` is the reason that the comment right above it gives."""

    page: Path
    line: int
    language: str  # of its fence; an indented block is what one types: sh
    text: str
    not_run: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yields the blocks of a page from top to bottom."""
    above = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            said = _NOT_RUN.search(above)
            assert token.map is not None
            yield Block(
                page=page,
                line=token.map[0] + 1,
                language=token.info.strip() if token.type == "fence" else "sh",
                text=token.content,
                not_run=said[1] if said else "",
            )
        above = token.content if token.type == "html_block" else ""


def code_spans(page: Path) -> Iterator[str]:
    """Yields what stands between backticks in a page's text, tables included."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        yield from (part.content for part in token.children or () if part.type == "code_inline")


def links(page: Path) -> Iterator[str]:
    """Yields where a page's links and pictures lead to."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for part in token.children or ():
            yield from (str(part.attrs[name]) for name in ("href", "src") if name in part.attrs)


def table_rows(page: Path, heading: str) -> Iterator[list[str]]:
    """Yields the cells of each row of the tables whose first column has this heading."""
    rows: list[list[str]] = []
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        match token.type:
            case "tr_open":
                rows.append([])
            case "inline" if rows:
                rows[-1].append(token.content)
            case "table_close":
                if rows[0][0] == heading:
                    yield from rows[1:]
                rows = []
