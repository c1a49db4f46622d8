"""The preview as one HTML page that needs nothing else: pictures are inside it, there is no script."""

from sd3pipe.pages.render import data_url
from sd3pipe.pages.render import render as render_page
from sd3pipe.previewing.cards import Preview
from sd3pipe.previewing.sheet import card_jpeg


def render(preview: Preview) -> str:
    """Returns the page."""
    return render_page(
        "previewing/page.html",
        title=preview.title,
        preview=preview,
        buckets=[(section.title, section.pictures, f"{section.pictures:,}") for section in preview.sections],
        draw=lambda card: data_url(card_jpeg(card), "jpeg"),
    )
