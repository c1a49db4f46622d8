"""What a worker process does: one file in, the pixels and mask of one row out."""

# H W pixels, C channels

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sd3pipe.data.cut import Cut
from sd3pipe.data.images import composited, decode
from sd3pipe.data.places import Place, read_unchanged
from sd3pipe.data.resize import area_mean, resize
from sd3pipe.errors import UnreadablePicture

if TYPE_CHECKING:
    from sd3pipe.data.scan import Picture  # and with it what reads dataset files, for which a worker has no use

_ENCODED = "it was being encoded"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeJob:
    """One row to decode. The hashes are those of the scan: a file that changed since is refused."""

    place: Place
    image_hash: str
    mask_place: Place | None
    mask_hash: str | None
    cut: Cut
    latent_px: int = 8
    ahead: bytes | None = None  # the picture, where it was read ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """uint8 RGB [height, width, 3] and, where the subset has masks, float16 [h, w] in latents."""

    rgb: np.ndarray
    mask: np.ndarray | None


def row_job(picture: "Picture", cut: Cut, latent_px: int, ahead: bytes | None = None) -> DecodeJob:
    """Returns what a worker has to decode for one cut of a picture, which may have been read already."""
    return DecodeJob(
        place=picture.place,
        image_hash=picture.image_hash,
        mask_place=picture.mask_place,
        mask_hash=picture.mask_hash,
        cut=cut,
        latent_px=latent_px,
        ahead=ahead,
    )


def decode_row(job: DecodeJob) -> Pixels:
    """Returns the pixels of one row. Raises UnreadablePicture."""
    cut = job.cut
    keep_alpha = cut.mask == "alpha" or cut.background is not None
    data = read_unchanged(job.place, job.image_hash, while_it=_ENCODED, ahead=job.ahead)
    pixels = _cut_out(decode(data, job.place.suffix, keep_alpha=keep_alpha), cut)
    mask = None
    if cut.mask == "alpha":
        mask = _latent_mask(pixels[..., 3], job.latent_px)
    elif cut.mask == "picture":
        assert job.mask_place is not None and job.mask_hash is not None
        try:
            data = read_unchanged(job.mask_place, job.mask_hash, while_it=_ENCODED)
            levels = decode(data, job.mask_place.suffix, keep_alpha=False)
        except UnreadablePicture as error:
            raise UnreadablePicture(f"its mask cannot be used: {error}") from error
        mask = _latent_mask(_cut_out(levels, cut)[..., 0], job.latent_px)
    if cut.background is not None:
        pixels = composited(pixels, cut.background)
    return Pixels(rgb=np.ascontiguousarray(pixels[..., :3]), mask=mask)


def _latent_mask(levels_HW: np.ndarray, latent_px: int) -> np.ndarray:
    """Returns a uint8 mask averaged over latents of `latent_px` pixels a side, as float16 [h, w] from 0 to 1.

    sd-scripts averages over the same areas at training time; half precision is exact to 1/2048 there.
    """
    return (area_mean(levels_HW, latent_px) / 255).astype(np.float16)


def _cut_out(pixels_HWC: np.ndarray, cut: Cut) -> np.ndarray:
    if cut.resize_filter is not None:
        pixels_HWC = resize(pixels_HWC, cut.resized, cut.resize_filter)
    height, width = pixels_HWC.shape[:2]
    if (width, height) != cut.resized:
        raise UnreadablePicture(f"it decodes to {width} x {height} pixels, other than its header says")
    pixels_HWC = pixels_HWC[cut.top : cut.top + cut.size[1], cut.left : cut.left + cut.size[0]]
    return pixels_HWC[:, ::-1] if cut.flip else pixels_HWC
