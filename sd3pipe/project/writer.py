"""Writes the files of a new project, all or none, and says what it keeps out of git and out of DVC's hashes."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3pipe.data.dataset_file import CONTAINER_ENDINGS
from sd3pipe.documents import holds
from sd3pipe.errors import ParameterError
from sd3pipe.files import atomic_file, make_folder, sync_file
from sd3pipe.params.stage_file import left_out_line, toml_value

DVCIGNORE = ".sd3pipe/\n*.report.json\n"
# Caches, exports and all of a run but its figures, which DVC reads from git; what `preview`, `sample` and DVC draw.
_GITIGNORE = """\
/caches/
/exports/
/runs/*/*
!/runs/*/metrics.json
!/runs/*/plots/
/runs/*.[1-9]/
/runs/*.[1-9][0-9]/
/preview/
/samples/
/sheets/
/dvc_plots/
*.report.json
.sd3pipe/
*.safetensors
"""


def project_toml(paths: Mapping[str, str], left_out: Mapping[str, Sequence[tuple[Any, str]]] | None = None) -> str:
    """Returns the text of project.toml; what is `left_out` is shown commented out with the reason."""
    lines = [left_out_line(key, *item) for key, items in (left_out or {}).items() for item in items]
    lines += [f"{key} = {toml_value(value)}" for key, value in paths.items()]
    return "\n".join(
        ["# Where things are; relative paths start here. dvc.yaml reads this file, too.", "[paths]", *lines, ""]
    )


def gitignore(run: str, pictures: Iterable[str]) -> str:
    """Returns .gitignore: pictures inside the project are for rsync or `dvc add`, not for git's history.

    Runs that were set aside end in a number; a `run` of the project's own whose name does so is kept.
    """
    numbered = re.fullmatch(r"runs/[^/]*\.[1-9][0-9]?", run)
    kept = [f"!/{_escaped(run)}/\n"] if numbered else []
    inside = [
        f"/{_escaped(path)}{'' if path.lower().endswith(CONTAINER_ENDINGS) else '/'}\n"
        for path in pictures
        if not Path(path).is_absolute()
    ]
    return "".join([_GITIGNORE, *kept, *inside])


def write_project(folder: Path, texts: Mapping[str, str]) -> list[str]:
    """Writes `texts` by their names below `folder`, all or none, and returns the names of those that were missing.

    What is there already with just this content, as after a run that was cut short, counts as written. Raises
    ParameterError if anything else is there, which is never overwritten, and StorageError.
    """
    contents = {name: text.encode() for name, text in texts.items()}
    there = [name for name in contents if (folder / name).exists()]
    other = [name for name in there if not holds(folder / name, contents[name])]
    if other:
        raise ParameterError(f"{folder}: {', '.join(other)} exist already and are not overwritten: name another folder")
    missing = [name for name in contents if name not in there]
    with _new_folders({(folder / name).parent for name in missing}), contextlib.ExitStack() as files:
        for name in missing:
            file = files.enter_context(atomic_file(folder / name))
            file.write(contents[name])
            sync_file(file)  # a full disk is noticed before the first file gets its name
    return missing


@contextlib.contextmanager
def _new_folders(folders: Iterable[Path]) -> Iterator[None]:
    """Makes folders with their parents, and removes those that it made when the block fails."""
    wanted = sorted({path for folder in folders for path in (folder, *folder.parents)})
    made = [path for path in wanted if not path.exists()]
    try:
        for path in made:
            make_folder(path)
        yield
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _escaped(path: str) -> str:
    """Returns a path as a pattern that stands for itself alone."""
    return re.sub(r"[\\*?\[]|\s$", r"\\\g<0>", path)
