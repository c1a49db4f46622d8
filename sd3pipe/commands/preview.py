"""`sd3pipe preview`: draws what training will see, from the dataset or, decoded again, from the latents cache."""

import logging
import re
from collections import Counter
from collections.abc import Sequence

from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.reader import CacheReader
from sd3pipe.console import say
from sd3pipe.data.caption_cache import read_captions
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.feed import default_workers
from sd3pipe.data.looks import Looks
from sd3pipe.data.scan import scan
from sd3pipe.encoding.stage import none_usable
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.files import make_folder, write_bytes, write_text
from sd3pipe.models.sources import find_component
from sd3pipe.params.preview import PreviewParams
from sd3pipe.previewing.cards import CaptionTokens, Preview
from sd3pipe.previewing.dataset_cards import dataset_items, dataset_preview
from sd3pipe.previewing.sheet import draw_page, draw_sheet
from sd3pipe.previewing.thumbnails import Thumbnails
from sd3pipe.previewing.token_counts import token_counts

log = logging.getLogger(__name__)


def main(params: PreviewParams) -> None:
    """Writes OUT/index.html and one PNG per bucket, and prints the warnings."""
    preview = _of_cache(params) if params.latents is not None else _of_dataset(params)
    make_folder(params.out)
    for old in params.out.iterdir():
        if re.fullmatch(r"\d+x\d+\.png", old.name):
            old.unlink()
    for section in preview.sections:
        write_bytes(params.out / section.file_name, draw_sheet(section))
    page = params.out / "index.html"
    write_text(page, draw_page(preview))
    for warning in preview.warnings:
        log.warning("%s", warning)
    say(f"preview: {preview.counts}: {page}")


def _of_dataset(params: PreviewParams) -> Preview:
    if params.dataset is None:
        raise ParameterError("preview: --dataset or --latents is missing: name what is to be drawn")
    dataset = load_dataset(params.dataset)
    for remark in dataset.remarks:
        log.info("%s: %s", dataset.path, remark)
    machine = machine_folder(params.out)
    stamps = FileStamps(machine / "stat.json")
    found = scan(dataset, stamps)
    if not found.pictures:
        raise none_usable(dataset, found.unreadable)
    stamps.save()
    looks = Looks(machine / "looks.npz")
    looks.look_at(found.pictures)
    workers = default_workers() if params.max_data_loader_n_workers is None else params.max_data_loader_n_workers
    folders = Counter(cache.name for cache in params.captions)
    known = dataset_items(
        found,
        caption_variants=params.caption_variants,
        crop_variants=params.crop_variants,
        seed=params.seed,
        count_tokens=lambda captions: _token_counts(captions, params),
        suggested={
            cache.name if folders[cache.name] == 1 else str(cache): read_captions(cache) for cache in params.captions
        },
        seen=looks.seen(),
    )
    return dataset_preview(
        known,
        title=f"Preview of {params.dataset.name}",
        per_bucket=params.pictures_per_bucket,
        thumbnails=Thumbnails(machine / "thumbnails"),
        workers=workers,
    )


def _token_counts(captions: Sequence[str], params: PreviewParams) -> dict[str, CaptionTokens]:
    """Returns how many tokens captions have for the encoders; nothing where there are no tokenizers."""
    try:
        return token_counts(
            captions, tokenizers=params.tokenizers, model=params.model, t5_tokens=params.t5xxl_max_token_length
        )
    except InputError:
        if params.tokenizers is not None:
            raise
        log.warning("no tokenizers are here, so nobody counted which captions are cut off: pass --tokenizers DIR")
        return {}


def _of_cache(params: PreviewParams) -> Preview:
    from sd3pipe.device import choose_device  # torch, which a preview of a dataset does not need
    from sd3pipe.device_memory import decode_way_out, memory_errors
    from sd3pipe.models.checkpoint import load_vae
    from sd3pipe.previewing.cache_cards import cache_preview

    assert params.latents is not None
    cache = CacheReader(params.latents)
    if cache.manifest.kind != "latents":
        raise InputError(f"{params.latents} is a cache of {cache.manifest.kind}: pass a latents cache")
    source = find_component("vae", model=params.model, file=params.vae)
    fingerprint, encoded_with = source.fingerprint(), cache.manifest.fingerprints.get("vae")
    if fingerprint != encoded_with:
        log.warning("%s was encoded with VAE %s, this is %s", params.latents, str(encoded_with)[:12], fingerprint[:12])
    device = choose_device(params.device, params.threads)
    with memory_errors(lambda: decode_way_out(device)):
        vae = load_vae(source, device=device)
        title = f"Preview of {params.latents.name}"
        return cache_preview(cache, vae, title=title, per_bucket=params.pictures_per_bucket)
