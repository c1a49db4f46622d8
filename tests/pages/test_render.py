"""What a page prints is escaped, and its policy lets nothing but its own style and script have effect."""

import re
from pathlib import Path

import numpy as np
import pytest
from support.browser import ask, needs_chromium

import sd3pipe
from sd3pipe.previewing.cards import Card, Preview, Section
from sd3pipe.previewing.sheet import draw_page

PACKAGE = Path(sd3pipe.__file__).parent
HOSTILE = "\"'><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">\udcff"


def page_of(text: str) -> str:
    """Returns a preview that has `text` wherever a file can bring text in."""
    card = Card(name=text, picture=np.zeros((9, 9, 3), np.uint8), facts=(text,), captions=(text, "b"), warnings=(text,))
    section = Section(width=64, height=64, pictures=1, rows=1, cards=(card,))
    return draw_page(
        Preview(title=text, sections=(section,), warnings=(text,), unreadable=((text, text),), tags={text: {text: 3}})
    )


def test_text_from_files_is_escaped_wherever_it_stands():
    page = page_of(HOSTILE)
    assert page.count("onerror") == page.count("&gt;&lt;script&gt;") == 13
    assert "<script>d" not in page and "<img src=x" not in page
    assert "\\udcff" in page


def test_no_template_and_no_module_switches_escaping_off():
    sources = [path for path in PACKAGE.rglob("*") if path.suffix in (".html", ".py")]
    assert len([path for path in sources if path.suffix == ".html"]) >= 4
    off = re.compile(r"\|\s*safe\b|autoescape false|Markup\(")
    assert not [path for path in sources if off.search(path.read_text(encoding="utf-8"))]


@pytest.mark.long
@needs_chromium
def test_a_script_that_is_not_the_pages_own_has_no_effect(tmp_path):
    page = page_of("a").replace("</body>", "<script>document.title = 'run'</script><p style='color: red'></p></body>")
    assert "<script>document" in page
    script = "return [document.title, getComputedStyle(document.querySelector('p[style]')).color]"
    title, colour = ask(page, script, tmp_path)
    assert title == "a" and colour != "rgb(255, 0, 0)"


@pytest.mark.long
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_in_light_and_dark(tmp_path, dark):
    script = """
        const light = (colour) => colour.match(/[0-9.]+/g).slice(0, 3).map((c) => c / 255)
          .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
          .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const paper = light(getComputedStyle(document.body).backgroundColor);
        return [paper, ...["body", ".soft", ".warn", "summary"].map((name) => {
          const ink = light(getComputedStyle(document.querySelector(name)).color);
          return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
        })];
    """
    paper, *contrasts = ask(page_of("a"), script, tmp_path, dark=dark)
    assert paper < 0.05 if dark else paper > 0.9
    assert min(contrasts) >= 4.5  # WCAG 2.2, 1.4.3
