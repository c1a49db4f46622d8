"""The page of a judgement, which a run's report shows as well."""

from pathlib import Path

from sd3pipe.judgement import Judgement
from sd3pipe.pages.judgement import judgement_facts
from sd3pipe.pages.render import render as render_page


def render(found: Judgement, folder: Path) -> str:
    """Returns the page; `folder` has the thumbnails."""
    return render_page("judging/page.html", title="Checkpoints compared", facts=judgement_facts(found, folder))
