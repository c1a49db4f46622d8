"""The model that looks at pictures: any image or image-text model that transformers loads. Imports transformers."""

# N pictures or texts, D embedding width

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import nearest_path
from sd3pipe.fingerprint import hash_file, hash_json
from sd3pipe.models.hub import HubRepository, is_hub_id

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_NEEDED = ("config.json", "preprocessor_config.json")
_OF_TEXT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model",
    "tokenizer.model",
)  # fmt: skip
_HASH = "blake3"


def find_judge_model(where: str) -> Path:
    """Returns the folder of a judge model, fetched where it is a hub id. Raises InputError, NetworkError."""
    folder = Path(where).expanduser()
    if not folder.exists() and is_hub_id(where):
        folder = _fetched(HubRepository(where))
    elif not folder.exists():
        raise InputError(
            f"{where}: there is no such folder{nearest_path(folder)}, and a hub id is OWNER/NAME "
            "(docs/which-checkpoint.md names some)"
        )
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if not missing and not any((folder / name).is_file() for name in _WEIGHTS):
        missing = [_WEIGHTS[0]]
    if missing:
        raise InputError(
            f"{where}: is no image model as transformers loads it: it has no {missing[0]}; pass a folder or hub id of "
            "a CLIP, SigLIP or DINO (docs/which-checkpoint.md names some)"
        )
    return folder


def fingerprint(folder: Path, stamps: FileStamps) -> str:
    """Returns the hash over the files that make a judge model."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".txt", ".model"))
    return hash_json({path.name: _hash(path, stamps) for path in files})


class JudgeModel:
    """A loaded judge model. Pictures and texts go through it one by one, so no row depends on its neighbours."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **options)
            self._processor = AutoImageProcessor.from_pretrained(folder, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(f"{folder}: cannot be loaded as an image model ({_first_line(error)})") from error
        self._model = self._model.to(device).eval()
        self._tokenizer = _tokenizer(folder, options) if reads_text(folder) else None
        self._device = device

    @torch.inference_mode()
    def picture(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Returns the unit vector [D] of a picture [H, W, 3]."""
        pixels = self._processor(images=[Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self._device)
        if hasattr(self._model, "get_image_features"):
            return _unit(self._model.get_image_features(pixel_values=pixels))
        return _unit(self._model(pixel_values=pixels))

    @torch.inference_mode()
    def text(self, text: str) -> NDArray[np.float32]:
        """Returns the unit vector [D] of a text, cut to as many tokens as the model reads."""
        assert self._tokenizer is not None
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer([text], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        read = {name: tokens[name].to(self._device) for name in ("input_ids", "attention_mask") if name in tokens}
        return _unit(self._model.get_text_features(**read))


def reads_text(folder: Path) -> bool:
    """Whether a judge model compares pictures with texts: CLIP and SigLIP do, DINO does not."""
    return any((folder / name).is_file() for name in _OF_TEXT)


def _tokenizer(folder: Path, options: dict[str, Any]) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({_first_line(error)})") from error


def _unit(features: Any) -> NDArray[np.float32]:
    """Returns the pooled output of one picture or text, of length 1; of models that pool nothing, the first token."""
    if not isinstance(features, torch.Tensor):
        pooled = getattr(features, "pooler_output", None)
        features = features.last_hidden_state[:, 0] if pooled is None else pooled
    vector = features[0].float().cpu().numpy().astype(np.float64)
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


def _fetched(repository: HubRepository) -> Path:
    """Returns the local folder of a hub repository's files."""
    config = repository.fetch(_NEEDED[0])
    if config is None:
        if repository.unreachable:
            raise repository.offline_error("judge model")
        raise InputError(f"{repository.repo}: this hub repository has no {_NEEDED[0]}: it is no transformers model")
    for name in (*_NEEDED[1:], *_OF_TEXT):
        repository.fetch(name)
    if repository.fetch(_WEIGHTS[0]) is None:
        raise InputError(f"{repository.repo}: has no {_WEIGHTS[0]}: download it, and pass its folder")
    return config.parent


def _hash(path: Path, stamps: FileStamps) -> str:
    known = stamps.recall(path, _HASH)
    if isinstance(known, str):
        return known
    found = hash_file(path)
    stamps.remember(path, _HASH, found)
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
