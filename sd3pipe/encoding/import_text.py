"""Takes over the text encoder outputs that sd-scripts cached beside the pictures, where they can be proved.

Every caption goes through CLIP-L, the smallest of the encoders, and through all tokenizers; some go through CLIP-G and
T5, too. If one of those is wrong, all are refused, unless every row was encoded again.
"""

# L tokens, D width

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.keys import text_source
from sd3pipe.cache.rows import Row, from_numpy
from sd3pipe.cache.store import Unreadable, fill_cache
from sd3pipe.cache.tensors import from_torch, to_torch
from sd3pipe.console import progress, version
from sd3pipe.data.captions import caption_lines
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.scan import Picture, scan
from sd3pipe.device import choose_device
from sd3pipe.encoding.agreement import check_states
from sd3pipe.encoding.import_report import ImportReport, drawn_to_verify
from sd3pipe.encoding.npz_files import NotProved, NpzFile, check_not_older
from sd3pipe.encoding.text_encoding import Tokens, encoded_texts, tokenized
from sd3pipe.encoding.text_plan import (
    TextEncoders,
    Texts,
    caption_texts,
    find_text_encoders,
    imported_text_wanted,
    text_recipe,
)
from sd3pipe.models.text_architecture import ENCODERS, EncoderName, detect_clip
from sd3pipe.models.text_encoders import ClipEncoder
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.models.text_rows import TORCH_DTYPES
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.stat_memory import StatMemory

_MASKS: Mapping[EncoderName, str] = {"clip_l": "mask_l", "clip_g": "mask_g", "t5xxl": "mask_t5"}
_CHECKED = ("clip_l", "clip_g", "t5xxl", "pooled_l", "pooled_g")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Import:
    params: EncodeTextParams
    recipe: TextRecipe
    encoders: TextEncoders
    texts: Texts
    pictures: Mapping[str, Sequence[Picture]]  # hash of a text -> the pictures whose .npz should hold it

    def tokens(self, hashes: Sequence[str]) -> Tokens:
        return tokenized([self.texts.text_by_hash[digest] for digest in hashes], self.encoders, self.recipe)[0]

    def name(self, digest: str) -> str:
        return self.texts.users[digest]


def import_text(params: EncodeTextParams, dataset_file: Path, out: Path, *, verify_rows: int) -> ImportReport:
    """Fills `out` with the rows that are proved, if there are any. Raises InputError for lacking encoders."""
    dataset = load_dataset(dataset_file)
    memory = StatMemory(machine_folder(out) / "stat.json")
    found = scan(dataset, memory)
    texts = caption_texts(found, dataset, variants=params.caption_variants, seed=params.seed)
    files = {"clip_l": params.clip_l, "clip_g": params.clip_g, "t5xxl": params.t5xxl}
    encoders = find_text_encoders(params.model, {name: files[name] for name in ENCODERS}, params.tokenizers)
    fingerprints = encoders.fingerprints(memory)
    memory.save()
    pictures: dict[str, list[Picture]] = {}
    for picture in found.pictures:
        pictures.setdefault(text_source(_caption_of_sd_scripts(picture)), []).append(picture)
    job = _Import(params=params, recipe=text_recipe(params), encoders=encoders, texts=texts, pictures=pictures)
    report = ImportReport(kind="text")
    rows = _read_all(job, report)
    rows = _with_clip_l(job, rows, report)
    rows = _verified(job, rows, verify_rows, machine_folder(out), report)
    if rows:
        wanted = imported_text_wanted(rows, texts, encoders, fingerprints, job.recipe)
        hash_by_key = dict(zip(wanted.keys, rows, strict=True))
        counts = fill_cache(
            out, wanted, lambda keys: _stored(job, keys, hash_by_key, rows), made_with=f"sd3pipe {version()}"
        )
        report.imported = len(rows) - counts.failed
    return report


def npz_file(picture: Path) -> Path:
    """Returns where sd-scripts caches what the text encoders make of a picture's caption."""
    return picture.with_name(f"{picture.stem}_sd3_te.npz")


def _caption_of_sd_scripts(picture: Picture) -> str:
    """Returns the caption that sd-scripts encodes when it caches: as it stands in the file, whatever the options."""
    lines = caption_lines(picture.caption)
    return "\n".join(lines) if picture.subset.captions.enable_wildcard else next(iter(lines), "")


def _read_all(job: _Import, report: ImportReport) -> dict[str, NpzFile]:
    """Returns the file of each text of which files, settings, shapes and token counts are right."""
    hashes = [digest for digest in job.texts.text_by_hash if digest in job.texts.users]
    tokens = job.tokens(hashes)
    found: dict[str, NpzFile] = {}
    for number, digest in enumerate(hashes):
        reason = "the caption is changed here before it is encoded, and was not there"
        for picture in job.pictures.get(digest, ()):
            try:
                npz = NpzFile(npz_file(picture.path))
                check_not_older(npz.path, [picture.caption_path] if picture.caption_path else [])
                _check_masks(npz, tokens, number)
                _read(job, npz)
            except NotProved as error:
                reason = str(error)
            else:
                found[digest] = npz
                break
        if digest not in found:
            report.refuse(job.name(digest), reason)
    return found


def _check_masks(npz: NpzFile, tokens: Tokens, number: int) -> None:
    """Raises NotProved if the file's masks are not those of the caption's tokens."""
    for encoder in ENCODERS:
        name = encoder.replace("t5xxl", "t5")
        mask = tokens[encoder].batch([number]).mask[0].tolist()
        if npz.whole_numbers(f"{name}_attn_mask", len(mask)) != mask:
            raise NotProved(f"its {name}_attn_mask is not that of the caption's tokens")


def _read(job: _Import, npz: NpzFile) -> dict[str, Tensor]:
    """Returns the states of a file in the type of the rows, without masks. Raises NotProved."""
    if job.recipe.padding != "keep":
        raise NotProved("sd-scripts keeps the states at padding, here they are zeroed")
    for name in ("apply_lg_attn_mask", "apply_t5_attn_mask"):
        if npz.whole_numbers(name, 1) != [int(getattr(job.recipe, name))]:
            raise NotProved(f"it was made with another {name}")
    widths, length = job.encoders.widths, job.encoders.clip_length
    clips = [detect_clip(job.encoders.sources[name].shapes(), name).pooled_width for name in ("clip_l", "clip_g")]
    lg = npz.numbers("lg_out", (length, widths["clip_l"] + widths["clip_g"]))
    pooled = npz.numbers("lg_pooled", (sum(clips),))
    t5 = npz.numbers("t5_out", (job.recipe.t5xxl_max_token_length, widths["t5xxl"]))
    arrays = {
        "clip_l": lg[:, : widths["clip_l"]],
        "clip_g": lg[:, widths["clip_l"] :],
        "pooled_l": pooled[: clips[0]],
        "pooled_g": pooled[clips[0] :],
        "t5xxl": t5,
    }
    dtype = TORCH_DTYPES[job.recipe.text_dtype]
    states = {name: torch.from_numpy(array.copy()).to(dtype) for name, array in arrays.items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in states.values()):
        raise NotProved(f"its numbers are beyond {job.recipe.text_dtype}")
    return states


def _with_clip_l(job: _Import, rows: Mapping[str, NpzFile], report: ImportReport) -> dict[str, NpzFile]:
    """Returns the rows whose CLIP-L states are those of their captions: proof that the caption is the one."""
    if not rows:
        return {}
    hashes, kept = list(rows), dict(rows)
    tokens = job.tokens(hashes)["clip_l"]
    device = choose_device(job.params.device, job.params.threads)
    encoder = ClipEncoder(job.encoders.sources["clip_l"], dtype=TORCH_DTYPES[job.recipe.text_dtype], device=device)
    with progress("from-kohya, CLIP-L", len(hashes), "captions") as bar:
        for number, digest in enumerate(hashes):
            hidden_BLD, _ = encoder.encode(tokens.batch([number]), masked=job.recipe.apply_lg_attn_mask)
            try:
                check_states(_read(job, rows[digest]), {"clip_l": hidden_BLD[0].cpu()})
            except NotProved as error:
                report.refuse(job.name(digest), str(error))
                del kept[digest]
            bar.advance()
    return kept


def _verified(
    job: _Import, rows: Mapping[str, NpzFile], number: int, scratch: Path, report: ImportReport
) -> dict[str, NpzFile]:
    """Returns the rows that still count after some captions went through all encoders."""
    if not rows:
        return {}
    drawn = drawn_to_verify(list(rows), number)
    wrong: dict[str, str] = {}
    for digest, row in zip(
        drawn, encoded_texts(job.tokens(drawn), job.encoders, job.recipe, job.params, scratch), strict=True
    ):
        try:
            ours = {name: to_torch(row[name]) for name in _CHECKED}
            report.off = max(report.off, check_states(_read(job, rows[digest]), ours).whole)
        except NotProved as error:
            wrong[digest] = str(error)
    report.verified = len(drawn)
    names = {digest: job.name(digest) for digest in rows}
    return {digest: rows[digest] for digest in report.keep_right(list(rows), wrong, names, checked=len(drawn))}


def _stored(
    job: _Import, keys: Sequence[str], hash_by_key: Mapping[str, str], rows: Mapping[str, NpzFile]
) -> Iterator[tuple[str, Row | Unreadable]]:
    """Yields the rows as they are stored, with the masks of their tokens."""
    hashes = [hash_by_key[key] for key in keys]
    tokens = job.tokens(hashes)
    for number, (key, digest) in enumerate(zip(keys, hashes, strict=True)):
        try:
            states = {name: from_torch(tensor) for name, tensor in _read(job, rows[digest]).items()}
        except NotProved as error:  # the file changed since it was checked
            yield key, Unreadable(str(error))
            continue
        masks = {mask: from_numpy(tokens[name].batch([number]).mask[0]) for name, mask in _MASKS.items()}
        yield key, {**states, **masks}
