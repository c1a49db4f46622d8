"""`sd3pipe pack`: what a machine that only trains needs of a project, with sizes and minutes."""

from collections.abc import Iterator
from pathlib import Path

from sd3pipe.config import PROJECT_FILE, Project, find_project, read_project
from sd3pipe.console import count, hand_over, readable_bytes, readable_seconds, say
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.params.pack import PackParams
from sd3pipe.stages import STAGES_BY_NAME, place

_SHOWN = 10
_MACHINE_FOLDER = ".sd3pipe"  # what an encode stage remembers about this machine's files


def main(params: PackParams) -> None:
    """Prints the files for rsync, and what sending them takes."""
    project = read_project(params.project) if params.project else find_project(Path.cwd())
    if project is None:
        raise ParameterError(f"there is no {PROJECT_FILE} here or above: pass --project DIR")
    files = list(_files(project, with_model=params.with_model))
    here, paths = project.folder.absolute(), [file.absolute() for file in files]
    names = [str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths]
    if params.list_only:
        hand_over(names)
        return
    sizes = [file.stat().st_size for file in files]
    shown = list(zip(sizes, names, strict=True))
    if not params.all and len(shown) > _SHOWN:
        say(f"the {_SHOWN} largest of {len(shown)} files (--all lists them all):")
        shown = sorted(shown, key=lambda item: -item[0])[:_SHOWN]
    for size, name in shown:
        say(f"{readable_bytes(size):>9}  {name}")
    minutes = readable_seconds(sum(sizes) * 8 / (params.uplink * 1e6))
    say(f"{count(len(files), 'file')}, {readable_bytes(sum(sizes))}: {minutes} at {params.uplink:g} Mbit/s")
    say("send them from the project's folder: sd3pipe pack --list-only | rsync -a --files-from=- . HOST:FOLDER")


def _files(project: Project, *, with_model: bool) -> Iterator[Path]:
    yield project.file
    yield from sorted((project.folder / "stages").glob("*.toml"))
    caches = [path for path in STAGES_BY_NAME["train"].paths if path.key.startswith("caches/")]
    for cache in caches:
        folder = Path(place({"caches": "caches", **project.paths}, cache.key))
        if (folder / "manifest.json").is_file():
            yield from sorted(
                path for path in folder.rglob("*") if path.is_file() and _MACHINE_FOLDER not in path.parts
            )
        elif cache.role == "made":
            raise InputError(f"{folder}: holds no cache yet: run `sd3pipe run encode-text encode-latents` first")
    if with_model and "model" in project.paths:
        model = Path(project.paths["model"])
        yield from [model] if model.is_file() else sorted(path for path in model.rglob("*.safetensors"))
