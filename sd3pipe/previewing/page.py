"""The preview as one HTML page that needs nothing else: pictures are inside it, there is no script."""

import base64
from collections import Counter
from html import escape

from sd3pipe.previewing.cards import Card, Preview, Section
from sd3pipe.previewing.sheet import card_jpeg

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e22; --grey: #6e727a; --line: #d8d8d4; --paper: #fafaf8; --warn: #be5400;
        --bar: #3f7fbf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e4; --grey: #9a9ea6; --line: #3a3c40; --paper: #17181a;
        --warn: #ff9d4d; --bar: #6aa5dd; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1500px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
     padding-top: 1rem; } h2 small, .facts { color: var(--grey); font-weight: normal; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1.2rem; align-items: end; }
figure { margin: 0; align-self: start; } figure img { max-width: 100%; display: block; } figcaption { margin-top: .4rem;
     overflow-wrap: anywhere; } .warn { color: var(--warn); } .facts { font-size: .85em; }
details { font-size: .9em; } details ul { margin: .3rem 0; padding-left: 1.2em; }
svg text { fill: currentColor; font-size: 12px; } svg rect { fill: var(--bar); }
table { border-collapse: collapse; } td { padding: .1rem .8rem .1rem 0; } .key span { padding: 0 .5em; }
nav a { margin-right: .8em; }
"""
_BAR_PX, _LABEL_PX, _LINE_PX = 620, 110, 20


def render(preview: Preview) -> str:
    """Returns the page."""
    sections = "\n".join(_section(section) for section in preview.sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(preview.title)}</title><style>{_STYLE}</style></head><body>
<h1>{_text(preview.title)}</h1>
<p>{_totals(preview)}</p>
{_warnings(preview)}
<h2>Buckets</h2>
{_histogram(preview.sections)}
<p class="facts">Framed: what is cut out for training. Dark: what is cut off. Striped: what the loss leaves out.</p>
{sections}
{_tags(preview)}
</body></html>
"""


def _text(value: str) -> str:
    """Returns text for HTML; bytes of a file name that are no UTF-8 are shown as \\xNN."""
    return escape(value.encode("utf-8", "backslashreplace").decode("utf-8"))


def _totals(preview: Preview) -> str:
    pictures = sum(section.pictures for section in preview.sections)
    rows = sum(section.rows for section in preview.sections)
    left_out = f", {len(preview.left_out)} left out" if preview.left_out else ""
    return f"{pictures:,} pictures in {len(preview.sections)} buckets, {rows:,} rows{left_out}"


def _warnings(preview: Preview) -> str:
    items = [f'<li class="warn">{_text(warning)}</li>' for warning in preview.warnings]
    items += [f'<li class="warn">{_text(name)}: left out: {_text(why)}</li>' for name, why in preview.left_out]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _histogram(sections: tuple[Section, ...]) -> str:
    """Returns one bar per bucket, from the tallest to the widest."""
    most = max((section.pictures for section in sections), default=1)
    bars = []
    for number, section in enumerate(sections):
        top = number * _LINE_PX
        length = max(2, round(_BAR_PX * section.pictures / most))
        bars.append(
            f'<text x="{_LABEL_PX - 8}" y="{top + 14}" text-anchor="end">{section.title}</text>'
            f'<rect x="{_LABEL_PX}" y="{top + 3}" width="{length}" height="14"/>'
            f'<text x="{_LABEL_PX + length + 6}" y="{top + 14}">{section.pictures:,}</text>'
        )
    width, height = _LABEL_PX + _BAR_PX + 70, len(sections) * _LINE_PX
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" style="max-width: 100%">{"".join(bars)}</svg>'


def _section(section: Section) -> str:
    cards = "\n".join(_card(card) for card in section.cards)
    return f'<h2>{section.title} <small>{section.counts}</small></h2>\n<div class="grid">{cards}</div>'


def _card(card: Card) -> str:
    data = base64.b64encode(card_jpeg(card)).decode("ascii")
    facts = "<br>".join(_text(fact) for fact in card.facts)
    warnings = "".join(f'<div class="warn">{_text(warning)}</div>' for warning in card.warnings)
    return (
        f'<figure><img alt="{_text(card.name)}" src="data:image/jpeg;base64,{data}"><figcaption>'
        f'<b>{_text(card.name)}</b><div class="facts">{facts}</div>{_captions(card)}{warnings}</figcaption></figure>'
    )


def _captions(card: Card) -> str:
    if not card.captions:
        return ""
    variants = Counter(card.captions)  # in the order of the first of each
    if len(variants) == 1:
        return f"<div>{_text(card.captions[0])}</div>"
    told = "".join(f"<li>{_text(caption)}{_times(number)}</li>" for caption, number in variants.items())
    summary = f"<summary>{len(card.captions)} variants, {len(variants)} of them different</summary>"
    return f"<div>{_text(card.captions[0])}</div><details>{summary}<ul>{told}</ul></details>"


def _times(number: int) -> str:
    return f' <span class="facts">({number} times)</span>' if number > 1 else ""


def _tags(preview: Preview) -> str:
    """Returns a table of tags per subset."""
    tables = []
    for subset, tags in preview.tags.items():
        rows = "".join(f"<tr><td>{number:,}</td><td>{_text(tag)}</td></tr>" for tag, number in tags.items())
        if rows:
            summary = f"<summary>Tags of {_text(subset)}, most frequent first</summary>"
            tables.append(f"<details>{summary}<table>{rows}</table></details>")
    return f"<h2>Tags</h2>{''.join(tables)}" if tables else ""
