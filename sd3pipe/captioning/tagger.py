"""Taggers in WD14's layout: an ONNX network whose outputs are the probabilities of the tags in a table."""

# H W pixels, C channels, B batch

import csv
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sd3pipe.captioning.captioner import TAGGER_MODEL, TAGGER_TAGS, Captioner
from sd3pipe.documents import read_text
from sd3pipe.errors import InputError
from sd3pipe.rules.captioning import GenerationRules

_GENERAL, _CHARACTER = "0", "4"  # categories of the table; ratings and others are no words of a caption
_WHITE = (255, 255, 255)


class Tagger:
    """A tagger on its device. Raises InputError for files that do not belong together or cannot be read."""

    def __init__(self, captioner: Captioner, rules: GenerationRules, device: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError('taggers need onnxruntime: pip install "sd3pipe[tagger]"') from error
        self._where = captioner.folder
        self._least = {_GENERAL: rules.general_threshold, _CHARACTER: rules.character_threshold}
        self._tags = _tags(captioner)
        wanted = [] if device == "cpu" else ["CUDAExecutionProvider"]
        providers = [
            name for name in (*wanted, "CPUExecutionProvider") if name in onnxruntime.get_available_providers()
        ]
        try:
            self._session = onnxruntime.InferenceSession(captioner.folder / TAGGER_MODEL, providers=providers)
        except Exception as error:  # onnxruntime raises classes of its own, which derive from Exception alone
            text = str(error).split("\n")[0]
            raise InputError(f"{captioner.folder / TAGGER_MODEL}: cannot be read: {text}") from error
        self._input = self._session.get_inputs()[0]
        shape = self._input.shape
        self._channels_last = len(shape) == 4 and shape[3] == 3
        side = shape[1] if self._channels_last else shape[2] if len(shape) == 4 else None
        if not isinstance(side, int):
            raise InputError(f"{captioner.folder / TAGGER_MODEL}: takes {shape}, not pictures of one size")
        self._side = side
        self._at_once = shape[0] if isinstance(shape[0], int) else None

    def words(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """Returns the tags of each picture, uint8 [H, W, 3]: characters first, each kind by falling probability."""
        step = self._at_once or len(pictures)
        batches = [pictures[start : start + step] for start in range(0, len(pictures), step)]
        return [self._text(row) for batch in batches for row in self._probabilities(batch)[: len(batch)]]

    def _probabilities(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Returns [B, tags]; a network of a fixed batch gets its last picture again and again."""
        filled = [*pictures, *[pictures[-1]] * ((self._at_once or len(pictures)) - len(pictures))]
        pixels_BHWC = np.stack([self._prepared(pixels_HWC) for pixels_HWC in filled])
        given = pixels_BHWC if self._channels_last else np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2))
        rows = np.asarray(self._session.run(None, {self._input.name: given})[0])
        if rows.shape[1:] != (len(self._tags),):
            raise InputError(
                f"{self._where}: the network has {rows.shape[1:]} outputs, the table {len(self._tags)} tags"
            )
        return rows

    def _prepared(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """Returns a picture in the middle of a white square, blue first, as float32 from 0 to 255."""
        image = Image.fromarray(pixels_HWC)
        side = max(image.size)
        square = Image.new("RGB", (side, side), _WHITE)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        resized = square.resize((self._side, self._side), Image.Resampling.BICUBIC)
        return np.asarray(resized, np.float32)[..., ::-1]

    def _text(self, probabilities: np.ndarray) -> str:
        chosen: dict[str, list[tuple[float, str]]] = {_CHARACTER: [], _GENERAL: []}
        for probability, (name, category) in zip(probabilities.tolist(), self._tags, strict=True):
            if category in chosen and probability >= self._least[category]:
                chosen[category].append((-probability, name))
        return ", ".join(name for found in chosen.values() for _, name in sorted(found))


def _tags(captioner: Captioner) -> list[tuple[str, str]]:
    """Returns name and category of each tag. Raises InputError."""
    table = captioner.folder / TAGGER_TAGS
    records = list(csv.DictReader(io.StringIO(read_text(table))))
    if not records or not {"name", "category"} <= set(records[0]):
        raise InputError(f"{table}: must have the columns name and category")
    return [(str(record["name"]), str(record["category"])) for record in records]
