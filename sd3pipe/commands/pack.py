"""`sd3pipe pack`: what a machine that only trains needs of a project, with sizes and minutes."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from sd3pipe.config import PROJECT_FILE, Project, find_project, read_project
from sd3pipe.console import count, hand_over, readable_bytes, readable_seconds, say
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.params.pack import PackParams
from sd3pipe.shell import shell_word
from sd3pipe.stages import STAGES_BY_NAME, place

log = logging.getLogger(__name__)

_SHOWN = 10
_MACHINE_FOLDER = ".sd3pipe"  # what an encode stage remembers about this machine's files


def main(params: PackParams) -> None:
    """Prints the files for rsync, and what sending them takes."""
    project = read_project(params.project) if params.project else find_project(Path.cwd())
    if project is None:
        raise ParameterError(f"there is no {PROJECT_FILE} here or above: pass --project DIR")
    here, places = _plain(project.folder), list(_places(project, with_model=params.with_model))
    files = [_plain(file) for _, of_place in places for file in of_place]
    elsewhere = [shell_word(str(_plain(place))) for place, _ in places if not _plain(place).is_relative_to(here)]
    more = f"rsync -aR {' '.join(elsewhere)} HOST:/"
    if params.list_only:
        hand_over([str(file.relative_to(here)) for file in files if file.is_relative_to(here)])
        if elsewhere:
            log.warning("what lies outside the project is not in the list: %s", more)
        return
    shown = [(file.stat().st_size, file.relative_to(here) if file.is_relative_to(here) else file) for file in files]
    total = sum(size for size, _ in shown)
    if not params.all and len(shown) > _SHOWN:
        say(f"the {_SHOWN} largest of {len(shown)} files (--all lists them all):")
        shown = sorted(shown, key=lambda item: -item[0])[:_SHOWN]
    for size, name in shown:
        say(f"{readable_bytes(size):>9}  {name}")
    minutes = readable_seconds(total * 8 / (params.uplink * 1e6))
    say(f"{count(len(files), 'file')}, {readable_bytes(total)}: {minutes} at {params.uplink:g} Mbit/s")
    listing = "sd3pipe pack --list-only" + (" --with-model" if params.with_model else "")
    say(f"send them from the project's folder: {listing} | rsync -a --files-from=- . HOST:FOLDER")
    if elsewhere:
        say(f"and what lies outside it, to the same places there: {more}")


def _plain(path: Path) -> Path:
    """Returns an absolute path without `..`, by which it would seem to lie where it does not."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (a link stays where it is)


def _places(project: Project, *, with_model: bool) -> Iterator[tuple[Path, list[Path]]]:
    """Yields files and folders of the project with the files in them that are needed."""
    yield project.file, [project.file]
    stages = project.folder / "stages"
    yield stages, sorted(stages.glob("*.toml"))
    caches = [path for path in STAGES_BY_NAME["train"].paths if path.key.startswith("caches/")]
    for cache in caches:
        folder = Path(place({"caches": "caches", **project.paths}, cache.key))
        if (folder / "manifest.json").is_file():
            files = sorted(path for path in folder.rglob("*") if path.is_file() and _MACHINE_FOLDER not in path.parts)
            yield folder, files
        elif cache.role == "made":
            raise InputError(f"{folder}: holds no cache yet: run `sd3pipe run encode-text encode-latents` first")
    if with_model and "model" in project.paths:
        model = Path(project.paths["model"])
        yield model, [model] if model.is_file() else sorted(model.rglob("*.safetensors"))
