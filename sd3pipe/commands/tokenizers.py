"""`sd3pipe tokenizers DIR`: fetches the three tokenizers from the hub into a folder for --tokenizers."""

import logging
from pathlib import Path

from sd3pipe.console import say
from sd3pipe.documents import read_data
from sd3pipe.errors import InputError, NetworkError
from sd3pipe.files import write_bytes
from sd3pipe.models.hub import HubRepository
from sd3pipe.models.text_architecture import ENCODERS
from sd3pipe.models.tokenizer_folders import HUB_REPOSITORIES
from sd3pipe.models.vocabularies import GENUINE_IDENTITIES, VOCABULARY_KINDS, vocabulary_identity
from sd3pipe.params.tokenizers import TokenizersParams
from sd3pipe.words import EncoderName, VocabularyKind

log = logging.getLogger(__name__)

_VOCABULARY_FILES: dict[VocabularyKind, tuple[str, ...]] = {
    "clip": ("vocab.json", "merges.txt"),
    "t5": ("spiece.model",),
}
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # for other programs; sd3pipe needs none


def main(params: TokenizersParams) -> None:
    """Fetches what is missing, and checks that it is what SD3 was trained with."""
    for encoder in ENCODERS:
        target, kind = params.folder / encoder, VOCABULARY_KINDS[encoder]
        if all((target / name).is_file() for name in _VOCABULARY_FILES[kind]):
            log.info("%s: is there already", target)
        else:
            fetch_tokenizer(encoder, target)
        if vocabulary_identity(target, kind) != GENUINE_IDENTITIES[kind]:
            raise InputError(f"{target}: is not the tokenizer that SD3 was trained with: delete the folder, run again")
    say(f"tokenizers: clip_l, clip_g and t5xxl are in {params.folder}: pass --tokenizers {params.folder}")


def fetch_tokenizer(encoder: EncoderName, target: Path) -> None:
    """Copies one tokenizer's files from the hub, or its local cache, to `target`. Raises NetworkError."""
    repository = HubRepository(HUB_REPOSITORIES[encoder])
    for name in _VOCABULARY_FILES[VOCABULARY_KINDS[encoder]]:
        path = repository.fetch(name)
        if path is None and repository.unreachable is None:
            raise NetworkError(
                f"{repository.repo}: the hub has no {name} there: copy the tokenizer from another machine"
            )
        if path is None:
            raise repository.offline_error(f"tokenizer ({name})")
        write_bytes(target / name, read_data(path))
    for name in _SETTINGS_FILES:
        path = repository.fetch(name)
        if path is not None:
            write_bytes(target / name, read_data(path))
    log.info("%s: fetched from %s", target, repository.repo)
