"""Opens the two caches, joins them into what can be trained on and what is held out, and counts that for a report."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, JsonValue, TypeAdapter

from sd3pipe.cache.join import JoinedPictures, Numbers, join_pictures
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import latents_name
from sd3pipe.console import listed, one_line
from sd3pipe.data import geometry
from sd3pipe.data.weighting import sample_repeats
from sd3pipe.diffusion.sampler import PIXELS_PER_LATENT
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.fingerprint import digest_bytes, hash_bytes, hash_json
from sd3pipe.models import text_recipe
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.params.train import TrainParams
from sd3pipe.training.batches import Items, SubsetRules, epoch_batches

log = logging.getLogger(__name__)

_RECIPE_VERSIONS = {"latents": geometry.RECIPE_VERSION, "text": text_recipe.RECIPE_VERSION}
_MOST_SEEN = 10_000_000  # an epoch is put in order in memory, at some hundred bytes for each picture that is seen
_FEW_MORE = 1.1  # times as many batches as captions of one length make are not worth a word
_EMPTY_CAPTION = "empty_caption"  # the text manifest's name for the key of the row of ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """The opened caches with the pictures to train on and those held out."""

    latents: CacheReader
    text: CacheReader
    train: Items
    validation: Items
    resolutions: tuple[tuple[int, int], ...]  # width, height of every bucket
    subsets: Mapping[str, Mapping[str, Any]]  # what weights and orders each one's samples

    def fingerprints(self) -> dict[str, str]:
        """Returns the fingerprints of what the caches were encoded with."""
        return {**self.latents.manifest.fingerprints, **self.text.manifest.fingerprints}

    def identity(self) -> dict[str, object]:
        """Returns what a run's identity says about its rows, component by component, so that a difference is named.

        "training_rows" stands for all of the items that training reads, with row keys in place of row numbers.
        """
        items = self.train
        rules = [{name: getattr(rules, name) for name in SubsetRules.__slots__} for rules in items.rules]
        parts = [
            items.ids.tobytes(),
            items.subsets.tobytes(),
            items.repeats.tobytes(),
            self.latents.keys[items.latents.rows].tobytes(),
            items.latents.starts.tobytes(),
            self.text.keys[items.captions.rows].tobytes(),
            items.captions.starts.tobytes(),
            hash_json(rules).encode(),
        ]
        return {
            **{f"encoded_with.{name}": value for name, value in sorted(self.fingerprints().items())},
            "latents_recipe": hash_json(dict(self.latents.manifest.recipe)),
            "latents_recipe_version": self.latents.manifest.recipe_version,
            "text_recipe": hash_json(dict(self.text.manifest.recipe)),
            "text_recipe_version": self.text.manifest.recipe_version,
            "training_rows": hash_bytes(b"".join(parts)),
        }


def open_data(params: TrainParams) -> TrainingData:
    """Returns the joined caches. Raises InputError for a damaged or wrong cache, StaleError where they do not match."""
    latents = CacheReader(params.latents, verify_reads=params.reading.verify_reads)
    text = CacheReader(params.text, verify_reads=params.reading.verify_reads)
    joined = join_pictures(latents, text)
    for reader in (latents, text):
        _tell_about(reader)
    for message in joined.unreadable:
        log.warning("left out: %s", message)
    subsets = _subsets(latents, text, params)
    for name in sorted(subsets.keys() | set(joined.subsets)):
        if not {"num_repeats", "is_reg"} <= subsets.get(name, {}).keys():
            raise InputError(
                f"{params.latents}: its manifest does not say how often the pictures of {name} are seen: run the "
                "encode stage, which writes it anew and keeps the rows"
            )
    splits = np.array(joined.splits, dtype=object)
    train = np.flatnonzero(splits == "train")
    if not len(train):
        why = "validation_split holds all of them out" if len(joined) else "they have none in common"
        raise InputError(f"{params.latents} and {params.text} leave no picture to train on: {why}")
    shapes = _latent_shapes(latents)
    items = _items(joined, train, subsets, params, text, shapes)
    _tell_unseen(items)
    seen = int(items.repeats.sum())
    if seen > _MOST_SEEN:
        raise ParameterError(f"an epoch would have {seen:,} pictures, more than {_MOST_SEEN:,}: lower num_repeats")
    _tell_broken_batches(items, params)
    return TrainingData(
        latents=latents,
        text=text,
        train=items,
        validation=_items(joined, np.flatnonzero(splits == "validation"), subsets, params, text, shapes),
        resolutions=joined.sizes,
        subsets=subsets,
    )


def check_widths(where: Path, context_width: int, pooled_width: int, architecture: MMDiTArchitecture) -> None:
    """Raises InputError for texts that are not as wide as the model reads them."""
    there, read = (context_width, pooled_width), (architecture.context_width, architecture.pooled_width)
    if there != read:
        raise InputError(
            f"{where} holds texts that are {there[0]} and {there[1]} wide, and the model reads {read[0]} and "
            f"{read[1]}: encode them with the text encoders that belong to the model"
        )


def check_captions(params: TrainParams, text: CacheReader, architecture: MMDiTArchitecture) -> None:
    """Raises InputError for captions that are not as wide as the model reads them."""
    for layout in text.index.layouts:
        widths = {name: shape[-1] for name, _, shape in layout}
        check_widths(params.text, widths["t5xxl"], widths["pooled_l"] + widths["pooled_g"], architecture)


class _EncodeReport(BaseModel):
    """What an encode stage said of itself beside the cache that it filled."""

    exit_code: Literal[0]
    seconds: float
    captions: dict[str, JsonValue] = {}
    cut: list[JsonValue] = []


def encode_summary(caches: Mapping[str, Path]) -> dict[str, object]:
    """Returns, by cache, what its encode stage counted, as JSON types; nothing of a cache that came without a report.

    It belongs into the run's own report, because the cache may hold other captions when somebody reads that.
    """
    summary: dict[str, object] = {}
    for name, cache in caches.items():
        try:
            report = read_json(Path(f"{cache}.report.json"), TypeAdapter(_EncodeReport))
        except DocumentError:
            continue
        summary[name] = {"seconds": report.seconds, "captions": report.captions, "cut": len(report.cut)}
    return summary


def data_summary(data: TrainingData) -> dict[str, object]:
    """Returns counts of pictures, captions, sizes in pixels and subsets as JSON types."""
    train, held_out = data.train, data.validation
    sides = train.latent_shapes[train.latents.rows] * PIXELS_PER_LATENT
    sizes, counts = np.unique(sides[:, ::-1], axis=0, return_counts=True)  # of rows: crops and mirrored ones apart
    return {
        "pictures": len(train),
        "held_out": len(held_out),
        "pictures_per_epoch": int(train.repeats.sum()),
        "captions": len(np.unique(train.captions.rows)),
        "buckets": {f"{width}x{height}": rows for width, height, rows in np.column_stack([sizes, counts]).tolist()},
        "subsets": {
            rules.name: {
                "pictures": int((train.subsets == number).sum()),
                "held_out": int((held_out.subsets == number).sum()),
                "per_epoch": int(train.repeats[train.subsets == number].sum()),
                "loss_weight": rules.loss_weight,
                "caption_dropout_rate": rules.caption_dropout_rate,
            }
            for number, rules in enumerate(train.rules)
        },
    }


def _tell_about(reader: CacheReader) -> None:
    """Tells of rows that another program encoded, or another version of this one."""
    origin = reader.manifest.recipe.get("imported_from")
    if origin:
        log.info("%s holds rows that %s encoded; `sd3pipe cache ls` shows how many of each shape", reader.where, origin)
    made, ours = reader.manifest.recipe_version, _RECIPE_VERSIONS[reader.manifest.kind]
    if made != ours:
        log.warning(
            "%s was encoded by version %d of its recipe, this sd3pipe has version %d: it is trained on as it is; the "
            "encode stage would make its rows anew, and says beforehand what that takes",
            reader.where, made, ours,
        )  # fmt: skip


def _tell_unseen(items: Items) -> None:
    """Tells of subsets that no epoch sees. Raises ParameterError where that is all of them."""
    seen = np.bincount(items.subsets, weights=items.repeats, minlength=len(items.rules))
    unseen = [items.rules[number].name for number in np.unique(items.subsets).tolist() if not seen[number]]
    why = "num_repeats is 0, or they are regularisation pictures without others in their [[datasets]]"
    if not seen.any():
        raise ParameterError(f"no picture is seen: in every subset {why}")
    if unseen:
        log.warning("no picture of %s is seen: %s", listed([one_line(name) for name in unseen]), why)


def _tell_broken_batches(items: Items, params: TrainParams) -> None:
    """Tells where captions of many lengths leave batches far from full: no token is masked, so none can be padded."""
    size, accumulation = params.batches.train_batch_size, params.batches.gradient_accumulation_steps
    if size == 1 or len(np.unique(items.text_lengths)) == 1:
        return
    of_one_length = replace(items, text_lengths=np.zeros_like(items.text_lengths))
    found, whole = (
        len(epoch_batches(those, seed=params.seed, epoch=0, batch_size=size)) for those in (items, of_one_length)
    )
    if found <= _FEW_MORE * whole:
        return
    log.warning(
        "only captions of one T5 length share a batch, and here they differ: an epoch has %d batches of %.2f pictures "
        "on average, where train_batch_size = %d could make %d, so that as many steps see fewer pictures: take "
        "train_batch_size = 1 with gradient_accumulation_steps = %d, or encode text with t5_pad_to at "
        "t5xxl_max_token_length, which takes more disk and is not how ComfyUI pads",
        found, items.repeats.sum() / found, size, whole, size * accumulation,
    )  # fmt: skip


def _items(
    joined: JoinedPictures,
    pictures: Numbers,
    subsets: Mapping[str, Mapping[str, Any]],
    params: TrainParams,
    text: CacheReader,
    latent_shapes: np.ndarray,
) -> Items:
    """Returns some of the joined pictures as what can be trained on."""
    names = sorted(subsets)
    codes = {name: code for code, name in enumerate(names)}
    chosen, occurrences = pictures.tolist(), joined.occurrences.tolist()
    of_subset = [joined.subsets[number] for number in chosen]
    known_by = [f"{joined.subsets[n]}\0{joined.image_hashes[n]}\0{occurrences[n]}" for n in chosen]
    digests = (digest_bytes(known.encode("utf-8", "surrogateescape")) for known in known_by)
    ids = [int.from_bytes(digest[:8], "little") for digest in digests]  # which key all random numbers
    empty_caption = text.manifest.extra.get(_EMPTY_CAPTION)
    if not isinstance(empty_caption, str):
        raise InputError(f"{text.where} does not say which row the empty caption is: encode the text again")
    lengths = [next(shape[0] for name, _, shape in layout if name == "t5xxl") for layout in text.index.layouts]
    return Items(
        names=[joined.names[number] for number in chosen],
        ids=np.array(ids, dtype=np.uint64),
        subsets=np.array([codes[name] for name in of_subset], dtype=np.int64),
        repeats=np.array(sample_repeats(subsets, of_subset), dtype=np.int64),
        rules=tuple(_rules(name, subsets[name], params) for name in names),
        latents=joined.latents.of_pictures(pictures),
        captions=joined.captions.of_pictures(pictures),
        empty_caption=text.number(empty_caption),
        latent_shapes=latent_shapes,
        text_lengths=np.array(lengths, dtype=np.int64)[text.index.arrays["row_layout"]],
    )


def _subsets(latents: CacheReader, text: CacheReader, params: TrainParams) -> dict[str, dict[str, Any]]:
    """Returns the weighting of each subset: caption dropout from the text's manifest, the rest from the latents'."""
    subsets = {name: dict(values) for name, values in latents.manifest.subsets.items()}
    unknown = [name for name in params.subsets if name not in subsets]
    if unknown:
        raise ParameterError(
            f"subsets.{unknown[0]}: {params.latents} has no such subset; it has {', '.join(sorted(subsets))}"
        )
    for name, values in subsets.items():
        of_text = text.manifest.subsets.get(name, {})
        for key in ("caption_dropout_rate", "caption_dropout_every_n_epochs"):
            values[key] = of_text.get(key, 0)
        if name in params.subsets:
            values |= params.subsets[name].model_dump(exclude_none=True)
    return subsets


def _rules(name: str, values: Mapping[str, Any], params: TrainParams) -> SubsetRules:
    weight, prior = values.get("loss_weight"), values.get("prior_loss_weight")
    prior = params.prior_loss_weight if prior is None else prior
    return SubsetRules(
        name=name,
        loss_weight=(1.0 if weight is None else float(weight)) * (prior if values["is_reg"] else 1.0),
        caption_dropout_rate=float(values["caption_dropout_rate"]),
        caption_dropout_every_n_epochs=int(values["caption_dropout_every_n_epochs"]),
        diff_output_preservation=bool(values.get("diff_output_preservation")),
    )


def _latent_shapes(latents: CacheReader) -> np.ndarray:
    """Returns h, w of every latent row."""
    layouts = []
    for layout in latents.index.layouts:
        shapes = {name: shape for name, _, shape in layout}
        layouts.append(shapes[latents_name(shapes)][-2:])
    return np.array(layouts, dtype=np.int64).reshape(-1, 2)[latents.index.arrays["row_layout"]]
