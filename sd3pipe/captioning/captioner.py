"""Which model captions, where it lies and what identifies it. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.documents import read_json
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_file, hash_json
from sd3pipe.models.hub import HubRepository, is_hub_id
from sd3pipe.words import CaptionerKind

TAGGER_MODEL, TAGGER_TAGS = "model.onnx", "selected_tags.csv"
_CONFIG = "config.json"
_ENDINGS = {  # of the files that a captioner's words depend on
    "vlm": (".safetensors", ".json", ".jinja", ".txt", ".model", ".py"),
    "tagger": (".onnx", ".csv"),
}
_ASKED = "Describe this picture in two sentences: what it shows, where, and in which style."
_PROMPTS = {  # by model_type: a task's name, or nothing where the model begins a caption by itself
    "florence2": "<MORE_DETAILED_CAPTION>",
    "paligemma": "caption en",
    "blip": "",
    "blip-2": "",
    "git": "",
    "vision-encoder-decoder": "",
}
_JSON = TypeAdapter(dict[str, Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Captioner:
    """A model's folder: of an image-text model in transformers' layout, or of a tagger in WD14's."""

    folder: Path
    kind: CaptionerKind
    model_type: str  # transformers' word; empty for a tagger

    def prompt(self, asked: str | None) -> str:
        """Returns what the model is asked: the user's words, or what suits its kind."""
        if self.kind == "tagger":
            return ""
        return asked if asked is not None else _PROMPTS.get(self.model_type, _ASKED)

    def fingerprint(self, stamps: FileStamps) -> str:
        """Returns the hash of all files that its words depend on, as 64 hex digits; unchanged ones are not read."""
        hashes: dict[str, str] = {}
        for file in self.folder.iterdir():
            if file.suffix in _ENDINGS[self.kind] and file.is_file():
                known = stamps.recall(file, "hash")
                if not isinstance(known, str):
                    known = hash_file(file)
                    stamps.remember(file, "hash", known)
                hashes[file.name] = known
        return hash_json(hashes)


def find_captioner(where: str, kind: CaptionerKind | None = None) -> Captioner:
    """Returns the model in a folder or behind a hub id; its kind is told by its files unless it is given.

    Raises InputError for what is no captioner, NetworkError for a hub id that cannot be had.
    """
    folder = Path(where).expanduser()
    if not folder.exists() and is_hub_id(where):
        repository = HubRepository(where)
        tags = repository.fetch(TAGGER_TAGS) if kind != "vlm" else None
        if tags is not None and (model := repository.fetch(TAGGER_MODEL)) is not None:
            return Captioner(folder=model.parent, kind="tagger", model_type="")
        if kind == "tagger":
            raise InputError(f"{repository.repo}: a tagger's repository has {TAGGER_MODEL} and {TAGGER_TAGS}")
        return _image_text(repository.fetch_all([f"*{ending}" for ending in _ENDINGS["vlm"]]), repository.repo)
    if not folder.is_dir():
        raise InputError(f"{where}: there is no such folder: pass a captioner's folder or a hub id (OWNER/NAME)")
    has_tags = (folder / TAGGER_TAGS).is_file() and (folder / TAGGER_MODEL).is_file()
    if kind == "tagger" and not has_tags:
        raise InputError(f"{where}: a tagger's folder has {TAGGER_MODEL} and {TAGGER_TAGS}")
    if kind != "vlm" and has_tags:
        return Captioner(folder=folder, kind="tagger", model_type="")
    return _image_text(folder, where)


def _image_text(folder: Path, where: str) -> Captioner:
    if not (folder / _CONFIG).is_file():
        raise InputError(
            f"{where}: holds no captioner: neither an image-text model ({_CONFIG}, *.safetensors) nor a tagger "
            f"({TAGGER_MODEL}, {TAGGER_TAGS})"
        )
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{where}: has no .safetensors weights; those of other kinds can run code and are not read")
    config: Mapping[str, Any] = read_json(folder / _CONFIG, _JSON)
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{folder / _CONFIG}: names no model_type: this is no model in transformers' layout")
    return Captioner(folder=folder, kind="vlm", model_type=model_type)
