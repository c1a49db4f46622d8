"""Draws a preview: each section as one PNG, a grid of cards with cuts, masks, captions and warnings; and the page."""

import io
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sd3pipe import stopping
from sd3pipe.pages.render import data_url, render
from sd3pipe.previewing.cards import Card, Preview, Section

_INK, _GREY, _ORANGE, _PAPER = (28, 30, 34), (110, 114, 122), (190, 84, 0), (250, 250, 248)
_CUT_COLOURS = ((0, 200, 120), (255, 196, 0), (0, 160, 255), (255, 92, 138))
_OUTSIDE = 0.35  # brightness of what is cut off
_MASKED = (235, 60, 70)
_STRIPE_PX = 9
_GAP, _LINE_PX, _TEXT_PX, _TITLE_PX = 16, 15, 12, 20
_SHEET_PX = 1500
_MIN_CARD_PX = 230
_CAPTION_LINES = 5


def draw_card(card: Card) -> Image.Image:
    """Returns a card's picture with what is cut off darkened, what the loss leaves out striped, and cuts outlined."""
    stopping.check()
    pixels = card.picture.astype(np.float32)
    height, width = pixels.shape[:2]
    if card.mask is not None:
        left_out = (1 - np.clip(card.mask.astype(np.float32), 0, 1))[..., None]
        grey = np.repeat(pixels.mean(axis=2, keepdims=True) * 0.5 + 40, 3, axis=2)
        on_stripe = np.add(*np.mgrid[0:height, 0:width]) % _STRIPE_PX < 2
        striped = np.where(on_stripe[..., None], np.array(_MASKED, np.float32), grey)
        pixels = pixels * (1 - left_out) + striped * left_out
    if card.cuts:
        inside = np.zeros((height, width), bool)
        for left, top, across, down in card.cuts:
            rows = slice(round(top * height), round((top + down) * height))
            inside[rows, round(left * width) : round((left + across) * width)] = True
        pixels *= np.where(inside, 1.0, _OUTSIDE)[..., None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number, (left, top, across, down) in enumerate(card.cuts):
        corners = (left * width, top * height, (left + across) * width, (top + down) * height)
        box = [round(corner) for corner in corners]
        draw.rectangle(
            (box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)),
            outline=_CUT_COLOURS[number % len(_CUT_COLOURS)],
            width=2,
        )
    return image


def draw_sheet(section: Section) -> bytes:
    """Returns the PNG of one bucket."""
    width = max([_MIN_CARD_PX, *(card.picture.shape[1] for card in section.cards)])
    cells = [_cell(card, width) for card in section.cards]
    columns = max(1, min(len(cells), _SHEET_PX // (width + _GAP)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + _GAP for row in rows]
    top = _TITLE_PX + 2 * _GAP
    sheet = Image.new("RGB", (max(columns * (width + _GAP) + _GAP, 560), top + sum(heights)), _PAPER)
    title = f"{section.title}   {section.counts}"
    ImageDraw.Draw(sheet).text((_GAP, _GAP), title, _INK, font=ImageFont.load_default(_TITLE_PX))
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            sheet.paste(cell, (_GAP + column * (width + _GAP), top))
        top += height
    return _encoded(sheet, "PNG", optimize=True)


def draw_page(preview: Preview) -> str:
    """Returns the preview as one HTML page that needs nothing else: pictures are inside it, there is no script."""
    return render(
        "previewing/page.html",
        title=preview.title,
        preview=preview,
        buckets=[(section.title, section.pictures, f"{section.pictures:,}") for section in preview.sections],
        draw=lambda card: data_url(card_jpeg(card), "jpeg"),
    )


def card_jpeg(card: Card) -> bytes:
    """Returns a card's picture for the page."""
    return _encoded(draw_card(card), "JPEG", quality=85)


def _cell(card: Card, width: int) -> Image.Image:
    """Returns a card's picture with its text below."""
    font = ImageFont.load_default(_TEXT_PX)
    picture = draw_card(card)
    more = f"  (+{len(card.captions) - 1} variants)" if len(card.captions) > 1 else ""
    lines = [(line, _INK) for line in _wrapped(card.name, width, font, 2)]
    lines += [(line, _GREY) for fact in card.facts for line in _wrapped(fact, width, font, 2)]
    for caption in card.captions[:1]:
        lines += [(line, _INK) for line in _wrapped(caption + more, width, font, _CAPTION_LINES)]
    lines += [(line, _ORANGE) for warning in card.warnings for line in _wrapped(warning, width, font, 2)]
    cell = Image.new("RGB", (width, picture.height + 6 + len(lines) * _LINE_PX), _PAPER)
    cell.paste(picture)
    for number, (text, colour) in enumerate(lines):
        ImageDraw.Draw(cell).text((0, picture.height + 6 + number * _LINE_PX), text, colour, font=font)
    return cell


def _wrapped(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, most: int) -> list[str]:
    """Returns at most so many lines that fit the width; what is left out is marked."""
    letters = max(8, int(width / max(1.0, font.getlength("abcdefghij eno") / 14)))
    return textwrap.wrap(text, letters, max_lines=most, placeholder=" ...") or []


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
