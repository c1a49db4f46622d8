"""Where the three tokenizers are looked for, and what identifies them. Free of torch and of the tokenizers library."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.fingerprint import hash_json
from sd3pipe.models.hub import HubRepository, is_hub_id
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.models.vocabularies import VOCABULARY_KINDS, has_vocabulary, vocabulary_identity
from sd3pipe.words import EncoderName

TOKENIZERS_VARIABLE = "SD3PIPE_TOKENIZERS"
HUB_REPOSITORIES: dict[EncoderName, str] = {
    "clip_l": "openai/clip-vit-large-patch14",
    "clip_g": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "t5xxl": "google/t5-v1_1-xxl",
}

# Our own names, then those of a diffusers folder. CLIP-L and CLIP-G share one vocabulary.
_FOLDERS: dict[EncoderName, tuple[str, ...]] = {
    "clip_l": ("clip_l", "tokenizer", "clip_g", "tokenizer_2"),
    "clip_g": ("clip_g", "tokenizer_2", "clip_l", "tokenizer"),
    "t5xxl": ("t5xxl", "tokenizer_3"),
}
_REPOSITORY_FILES = (
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_3/spiece.model",
    "tokenizer_3/tokenizer.json",
)


def tokenizers_identity(folders: Mapping[EncoderName, Path], stamps: FileStamps | None = None) -> str:
    """Returns one hash for the three vocabularies' content, whatever files they lie in."""
    return hash_json({name: vocabulary_identity(folders[name], VOCABULARY_KINDS[name], stamps) for name in ENCODERS})


def find_tokenizers(
    *, folder: Path | None, model: str | Path | None = None, files: Iterable[Path | None] = ()
) -> dict[EncoderName, Path]:
    """Returns the folder of each encoder's vocabulary, from the first place that has it.

    A `folder` given by hand, else the one that SD3PIPE_TOKENIZERS names, must have all. Else each is looked for beside
    the model, beside the encoders' own `files`, and in the local hub cache. Raises InputError; NetworkError for a model
    that is a gated hub repository.
    """
    named = folder or (Path(value) if (value := os.environ.get(TOKENIZERS_VARIABLE)) else None)
    if named is not None:
        found = _in_place(named)
        if missing := [name for name in ENCODERS if name not in found]:
            origin = "--tokenizers" if folder else TOKENIZERS_VARIABLE
            raise InputError(
                f"{named}: no tokenizer for {', '.join(missing)} ({origin} names a folder with clip_l/, clip_g/ and "
                f"t5xxl/): fetch them with `sd3pipe tokenizers {named}`"
            )
        return found
    found = {}
    for place in _places(model, [file for file in files if file is not None]):
        found = place | found
        if len(found) == len(ENCODERS):
            return found
    missing = ", ".join(name for name in ENCODERS if name not in found)
    raise InputError(
        f"no tokenizer for {missing} in --tokenizers, {TOKENIZERS_VARIABLE}, beside the model or in the local hub "
        "cache: fetch them with `sd3pipe tokenizers DIR`, then pass --tokenizers DIR"
    )


def _places(model: str | Path | None, files: Iterable[Path]) -> Iterator[dict[EncoderName, Path]]:
    paths = [Path(model).expanduser()] if model is not None else []
    for path in (*paths, *files):
        if path.exists():
            folder = path if path.is_dir() else path.parent
            yield _in_place(folder)
            yield _in_place(folder / "tokenizers")
    if paths and not paths[0].exists() and is_hub_id(str(model)):
        yield _in_repository(HubRepository(str(model)))
    yield _in_hub_cache()


def _in_repository(repository: HubRepository) -> dict[EncoderName, Path]:
    """Fetches the tokenizers of a hub repository in the diffusers layout."""
    for name in _REPOSITORY_FILES:
        if (path := repository.fetch(name)) is not None:
            place = path.parents[1]
            if len(found := _in_place(place)) == len(ENCODERS):
                return found
    return {}


def _in_place(place: Path) -> dict[EncoderName, Path]:
    found: dict[EncoderName, Path] = {}
    for encoder in ENCODERS:
        for name in _FOLDERS[encoder]:
            if has_vocabulary(place / name, VOCABULARY_KINDS[encoder]):
                found[encoder] = place / name
                break
    return found


def _in_hub_cache() -> dict[EncoderName, Path]:
    """Looks through the local hub cache without the network: the encoders' own repositories, then SD3's."""
    from huggingface_hub import try_to_load_from_cache  # takes 0.1 s; mostly not needed

    found: dict[EncoderName, Path] = {}
    for encoder in ENCODERS:
        kind = VOCABULARY_KINDS[encoder]
        anchors = ("spiece.model", "tokenizer.json") if kind == "t5" else ("vocab.json", "tokenizer.json")
        for repository in (HUB_REPOSITORIES[encoder], HUB_REPOSITORIES["clip_l" if kind == "clip" else "t5xxl"]):
            for anchor in anchors:
                path = try_to_load_from_cache(repository, anchor)
                if isinstance(path, str) and has_vocabulary(Path(path).parent, kind):
                    found.setdefault(encoder, Path(path).parent)
    return found
