"""Near-duplicates and blur of a project's pictures, looked for beside the pages: none of them waits for it."""

import threading
from collections.abc import Mapping, Sequence

from sd3pipe.config import Project
from sd3pipe.data.looks import Looks, Seen
from sd3pipe.data.scan import Picture
from sd3pipe.studio.places import studio_folder

_looking: set[str] = set()  # folders of projects whose pictures are being looked at
_lock = threading.Lock()


def seen_so_far(project: Project, pictures: Sequence[Picture], *, may_write: bool) -> tuple[Mapping[str, Seen], int]:
    """Returns what is known of pictures, and of how many nothing is yet; `may_write` starts to look at those."""
    looks = Looks(studio_folder(project) / "looks.npz")
    missing = len(looks.missing(pictures))
    with _lock:
        begins = missing > 0 and may_write and str(project.folder) not in _looking
        if begins:
            _looking.add(str(project.folder))
    if begins:
        threading.Thread(target=_look, args=(project, looks, pictures), daemon=True).start()
    return looks.seen(), missing


def _look(project: Project, looks: Looks, pictures: Sequence[Picture]) -> None:
    try:
        looks.look_at(pictures, quiet=True)
    finally:
        with _lock:
            _looking.discard(str(project.folder))
