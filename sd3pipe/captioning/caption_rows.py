"""The part of `caption` that needs Pillow and a model: pictures through a captioner to rows of words."""

# H W pixels, C channels

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

from sd3pipe import stopping
from sd3pipe.cache.rows import Row, from_numpy
from sd3pipe.captioning.captioner import Captioner
from sd3pipe.captioning.plan import WORDS
from sd3pipe.console import one_line
from sd3pipe.data.images import decode_on_white
from sd3pipe.data.places import read_unchanged
from sd3pipe.data.read_ahead import read_ahead
from sd3pipe.data.scan import Picture
from sd3pipe.errors import UnreadablePicture
from sd3pipe.params.caption import CaptionParams

log = logging.getLogger(__name__)


class Model(Protocol):
    """What makes words of pictures."""

    def words(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """Returns the words for each picture, uint8 [H, W, 3]."""
        ...


def load_captioner(captioner: Captioner, prompt: str, params: CaptionParams) -> Model:
    """Returns the model on its device. Raises InputError, DeviceMemoryError."""
    if captioner.kind == "tagger":
        from sd3pipe.captioning.tagger import Tagger  # onnxruntime, without torch

        return Tagger(captioner, params.generation, params.device)
    from sd3pipe.captioning.image_text import ImageTextModel  # torch and transformers
    from sd3pipe.device import choose_device

    device = choose_device(params.device, params.threads)
    return ImageTextModel(captioner, prompt, params.generation, device, trust_code=params.trust_remote_code)


def captioned_rows(
    pictures: Sequence[Picture], model: Model, params: CaptionParams
) -> Iterator[Row | UnreadablePicture]:
    """Yields the row of each picture, in their order."""
    longest, at_once = params.generation.captioner_px, params.captioner_batch_size
    ahead = read_ahead([picture.place for picture in pictures])
    for start in range(0, len(pictures), at_once):
        stopping.check()
        batch = [_pixels(picture, next(ahead), longest) for picture in pictures[start : start + at_once]]
        readable = [item for item in batch if not isinstance(item, UnreadablePicture)]
        words = iter(model.words(readable) if readable else ())
        for item in batch:
            if isinstance(item, UnreadablePicture):
                yield item
            else:
                yield {WORDS: from_numpy(np.frombuffer(next(words).encode("utf-8", "replace"), np.uint8))}


def _pixels(picture: Picture, ahead: bytes | None, longest: int) -> np.ndarray | UnreadablePicture:
    """Returns a picture over white, made smaller where it is larger than asked, as uint8 [H, W, 3]."""
    try:
        data = read_unchanged(picture.place, picture.image_hash, while_it="captions were made", ahead=ahead)
        pixels_HWC = decode_on_white(data, picture.place.suffix, has_alpha=picture.has_alpha)
    except UnreadablePicture as error:
        log.warning("%s: left out: %s", one_line(str(picture.place)), error)
        return error
    image = Image.fromarray(pixels_HWC)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return np.asarray(image)
