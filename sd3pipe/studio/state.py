"""What the studio knows while it runs: its projects by a short name, its queue, and who watches which run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3pipe.config import PROJECT_FILE, Project, read_project
from sd3pipe.errors import InputError
from sd3pipe.fingerprint import hash_bytes
from sd3pipe.studio.queue import Queue
from sd3pipe.studio.safety import Access
from sd3pipe.studio.watch import Watches


class Projects:
    """The folders that the studio shows. What lies in them is read anew for each page."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders: dict[str, Path] = {}
        for folder in folders:
            self.add(folder)

    def add(self, folder: Path) -> str:
        """Shows a folder, and returns the name that it has in addresses: the same one after a restart."""
        real = folder.resolve()
        words = re.sub(r"[^a-z0-9]+", "-", real.name.lower()).strip("-") or "project"
        slug = f"{words[:40]}-{hash_bytes(bytes(real))[:6]}"
        self._folders[slug] = real
        return slug

    def read(self, slug: str) -> Project:
        """Returns a project as its file is. Raises InputError for an unknown one, ParameterError for a bad file."""
        folder = self._folders.get(slug)
        if folder is None:
            raise InputError(
                "this studio shows no such project: start it with its folder, or open it on the first page"
            )
        return read_project(folder)

    def listed(self) -> list[dict[str, Any]]:
        """Returns slug, name and folder of each project that is there."""
        return [
            {"slug": slug, "name": folder.name, "folder": str(folder)}
            for slug, folder in self._folders.items()
            if (folder / PROJECT_FILE).is_file()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Studio:
    access: Access
    projects: Projects
    queue: Queue
    watches: Watches
