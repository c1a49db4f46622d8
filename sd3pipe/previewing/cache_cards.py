"""Cards of a latents cache: its rows decoded again, which is what training really sees."""

# B batch, C channels, H W pixels

from collections import defaultdict

import numpy as np
import torch

from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import latents_name
from sd3pipe.cache.tensors import to_torch
from sd3pipe.console import one_line
from sd3pipe.data.cut import Size
from sd3pipe.models.vae import VAE
from sd3pipe.models.vae_strips import decode_within, usable_memory
from sd3pipe.previewing.cards import CARD_PX, Card, Preview, Section, spread


def cache_preview(cache: CacheReader, vae: VAE, *, title: str, per_bucket: int) -> Preview:
    """Returns the preview of a latents cache, its means decoded by `vae`. Raises InputError for damaged rows."""
    samples = cache.samples
    widths, heights = samples.numbers("bucket_w").tolist(), samples.numbers("bucket_h").tolist()
    buckets: dict[Size, list[int]] = defaultdict(list)
    for number, size in enumerate(zip(widths, heights, strict=True)):
        buckets[size].append(number)
    names = list(zip(samples.strings("subset").to_list(), samples.strings("name").to_list(), strict=True))
    sections = []
    for size, members in buckets.items():
        cards = tuple(_card(cache, vae, number) for number in spread(members, per_bucket))
        pictures = len({names[number] for number in members})
        sections.append(Section(width=size[0], height=size[1], pictures=pictures, rows=len(members), cards=cards))
    lone = [section.title for section in sections if section.rows == 1]
    warnings = (f"{len(lone)} of {len(sections)} buckets hold a single row: {', '.join(lone[:8])}",) if lone else ()
    return Preview(
        title=title,
        sections=tuple(sorted(sections, key=lambda section: (section.width / section.height, section.width))),
        warnings=warnings,
        unreadable=tuple((entry["name"], entry["reason"]) for entry in cache.manifest.quarantined),
    )


def _card(cache: CacheReader, vae: VAE, number: int) -> Card:
    samples = cache.samples
    row = cache.row(int(samples.numbers("row")[number]))
    name = latents_name(row)
    latents = to_torch(row[name])[: vae.architecture.latent_channels]
    picture = _decoded(vae, latents)
    mask = None
    if "mask" in row:  # at the size of the picture, each latent a square
        mask_hw, (height, width) = row["mask"].numpy().astype(np.float32), picture.shape[:2]
        rows, columns = np.arange(height) * mask_hw.shape[0] // height, np.arange(width) * mask_hw.shape[1] // width
        mask = mask_hw[rows[:, None], columns]
    crop, flip = int(samples.numbers("crop")[number]), bool(samples.numbers("flip")[number])
    original = f"{samples.numbers('original_w')[number]} x {samples.numbers('original_h')[number]}"
    use = [f"subset {one_line(samples.strings('subset')[number])}", f"crop {crop}", *(["mirrored"] if flip else [])]
    use += ["validation"] if samples.strings("split")[number] == "validation" else []
    return Card(
        name=one_line(samples.strings("name")[number]),
        picture=picture,
        mask=mask,
        facts=(f"from {original}, {name} {' x '.join(map(str, row[name].shape))} {row[name].dtype}", ", ".join(use)),
    )


@torch.inference_mode()
def _decoded(vae: VAE, latents_chw: torch.Tensor) -> np.ndarray:
    """Returns uint8 pixels at the size of a card."""
    weight = next(vae.parameters())
    pixels_BCHW = decode_within(
        vae,
        latents_chw[None].to(weight.device, weight.dtype),
        usable_memory(weight.device, beside_others=True),
    ).float()
    shrink = min(1.0, CARD_PX / max(pixels_BCHW.shape[-2:]))
    size = [max(1, round(side * shrink)) for side in pixels_BCHW.shape[-2:]]
    small = torch.nn.functional.interpolate(pixels_BCHW, size=size, mode="area")[0]
    return small.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
