"""Begin: a project from pictures and a model, or from a command of sd-scripts, by `init` and `from-kohya`."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.responses import RedirectResponse, Response

from sd3pipe.config import PROJECT_FILE, read_project
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.files import nearest_path, write_text
from sd3pipe.params.fields import option_extra
from sd3pipe.params.init import InitParams
from sd3pipe.shell import no_option
from sd3pipe.studio.app import Ask, FieldError
from sd3pipe.studio.forms import choices

_INIT = (
    "model", "images", "caption", "trigger", "goal", "vram", "tokenizers",
    "clip_l", "clip_g", "t5xxl", "vae", "loras_dir",
)  # fmt: skip
_OPTION = re.compile(rf"--({'|'.join(_INIT).replace('_', '-')})(?![\w-])")
_ENDINGS = (".sh", ".bat", ".ps1", ".txt", ".toml", ".json")


def home(ask: Ask) -> str | Response:
    listed = ask.studio.projects.listed()
    if not listed:
        return page(ask)
    if len(listed) == 1:
        return RedirectResponse(f"/p/{listed[0]['slug']}/pictures", 303)
    return ask.page("home", title="Projects")


def page(ask: Ask) -> str:
    fields = {name: InitParams.model_fields[name] for name in _INIT}
    return ask.page(
        "begin",
        title="Begin",
        fields=[(name, field.description, choices(field), field.default or "") for name, field in fields.items()],
        home=str(Path.home()),
    )


def init(ask: Ask) -> dict[str, Any]:
    """Opens the project of a folder, or makes one there; what `init` refuses is said at its fields."""
    folder = _folder(ask)
    if (folder / PROJECT_FILE).is_file():
        read_project(folder)
        return _opened(ask, folder, "opened")
    words = ["init", no_option(str(folder))]
    for name in _INIT:
        if ask.text(name):
            if ask.text(name).startswith("~") and option_extra(InitParams.model_fields[name])["role"] == "path":
                _path(ask, name)
            words += [f"--{name.replace('_', '-')}", no_option(ask.text(name))]
    try:
        said = ask.run(words, Path.home())
    except InputError as error:
        return {"fields": _by_field(ask, str(error).splitlines())}
    lines = [line for line in said.splitlines() if not line.startswith("next: ")]  # commands, which the pages are
    return _opened(ask, folder, "\n".join(lines))


def _by_field(ask: Ask, lines: Sequence[str]) -> dict[str, str]:
    """Returns what a command says of options as the page calls them: by the field whose value or name a line has."""
    found: dict[str, str] = {}
    for line in lines:
        text = _OPTION.sub(lambda match: match[1].replace("-", "_"), line.removeprefix("init: "))
        named = [match[1].replace("-", "_") for match in _OPTION.finditer(line)]
        of_value = [name for name in ("folder", *_INIT) if ask.text(name) and text.startswith(f"{ask.text(name)}: ")]
        name = next((name for name in of_value if name in named), next(iter([*of_value, *named]), ""))
        found[name] = "\n".join(filter(None, (found.get(name), text)))
    return found


def from_kohya(ask: Ask) -> dict[str, Any]:
    """Makes a project of what was dropped; its relative paths start at the folder that is named with it."""
    folder, text = _folder(ask), str(ask.values.get("text", ""))
    if not text.strip():
        raise ParameterError("drop a command, its config or the GUI's settings here, or paste it")
    ending = Path(ask.text("name")).suffix.lower()
    if ending not in _ENDINGS:
        ending = ".json" if text.lstrip().startswith("{") else ".sh"
    base = _path(ask, "base") if ask.text("base") else Path.home()
    if not base.is_dir():
        what = "is a file, not a folder" if base.exists() else f"there is no such folder{nearest_path(base)}"
        raise FieldError("base", f"base = {base}: {what}")
    with tempfile.TemporaryDirectory(prefix="sd3pipe-studio-") as place:
        source = Path(place) / f"source{ending}"
        write_text(source, text)
        words = ["from-kohya", str(source), "--out", no_option(str(folder))]
        return _opened(ask, folder, ask.run(words, base))


def _folder(ask: Ask) -> Path:
    """Returns where the project is to lie. Raises FieldError."""
    if not ask.text("folder"):
        raise FieldError("folder", "folder: say where the project is to lie")
    return _path(ask, "folder")


def _path(ask: Ask, name: str) -> Path:
    """Returns the whole path in a field. Raises FieldError."""
    typed = ask.text(name)
    try:
        path = Path(typed).expanduser()
    except RuntimeError as error:
        raise FieldError(name, f"{name} = {typed}: there is no user of this name") from error
    if not path.is_absolute():
        raise FieldError(name, f"{name} = {typed}: write the whole path, from / or from ~")
    return path


def _opened(ask: Ask, folder: Path, message: str) -> dict[str, Any]:
    slug = ask.studio.projects.add(folder)
    ask.studio.queue.note_project(folder)
    return {"message": message, "location": f"/p/{slug}/pictures"}
