"""`sd3pipe encode-text`: captions or sample prompts to text encoder outputs, one row per distinct text, in a cache."""

import importlib.metadata
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.keys import text_source
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.rows import Row
from sd3pipe.cache.store import Unreadable, fill_cache, missing_rows
from sd3pipe.cache.wanted import Wanted
from sd3pipe.config import find_project
from sd3pipe.console import StageReport, count, progress, readable_bytes, version
from sd3pipe.data.captions import processed_captions
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.prompts import load_prompts
from sd3pipe.data.scan import Scan, scan, tell_about_captions
from sd3pipe.errors import ParameterError
from sd3pipe.models.sources import ComponentSource, find_component
from sd3pipe.models.text_architecture import ENCODERS, EncoderName, detect_clip, detect_t5
from sd3pipe.models.text_recipe import ITEM_BYTES, RECIPE_VERSION, TextRecipe
from sd3pipe.models.tokenizer_folders import find_tokenizers, tokenizers_identity
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.stat_memory import StatMemory

if TYPE_CHECKING:
    from sd3pipe.models.tokenizers import TokenizedTexts

log = logging.getLogger(__name__)

_Kind = Literal["text", "prompts"]
_PROJECT_KEYS: dict[_Kind, str] = {"text": "dataset", "prompts": "sample_prompts"}
_SHOWN = 5  # how many cut captions a warning names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """One cache to fill."""

    kind: _Kind
    source: Path  # dataset file or prompt file
    out: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Texts:
    """What is to be encoded, and the cache's samples: who uses which text."""

    text_by_source: Mapping[str, str]  # hash of a text -> the text; equal texts once
    names: Mapping[str, str]  # hash of a text -> a picture or prompt that uses it, for messages
    columns: Mapping[str, list[Any]]  # of the samples table, with hashes of texts where keys belong
    subsets: Mapping[str, Mapping[str, Any]]
    quarantined: list[dict[str, Any]]
    report: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Encoders:
    """The weights and tokenizers that make the rows, known from headers alone."""

    sources: Mapping[EncoderName, ComponentSource]
    tokenizers: Mapping[EncoderName, Path]
    widths: Mapping[EncoderName, int]
    vocabularies: Mapping[EncoderName, int]
    clip_length: int


def main(params: EncodeTextParams) -> None:
    """Fills the text cache of a dataset or the cache of sample prompts; in a project, without either named, both."""
    for target in _targets(params):
        _fill(params, target)


def _targets(params: EncodeTextParams) -> list[_Target]:
    """Returns the caches to fill: what the options name, else what project.toml does. Raises ParameterError."""
    project = find_project(Path.cwd())
    paths = project.paths if project else {}
    named: dict[_Kind, Path | None] = {"text": params.dataset, "prompts": params.sample_prompts}
    if not any(named.values()):
        named = {kind: Path(paths[key]) if key in paths else None for kind, key in _PROJECT_KEYS.items()}
    sources: dict[_Kind, Path] = {kind: path for kind, path in named.items() if path is not None}
    if not sources:
        raise ParameterError("encode-text: pass --dataset FILE or --sample-prompts FILE: there is nothing to encode")
    if params.out is not None and len(sources) > 1:
        raise ParameterError("encode-text: --out names one cache: pass --dataset or --sample-prompts with it")
    if params.out is None and "caches" not in paths:
        raise ParameterError("encode-text: --out is missing: name the folder of the cache, such as caches/text")
    return [
        _Target(kind=kind, source=source, out=params.out or Path(paths["caches"], kind))
        for kind, source in sources.items()
    ]


def _fill(params: EncodeTextParams, target: _Target) -> None:
    with StageReport("encode-text", path=Path(f"{target.out}.report.json"), inputs=_inputs(params, target)) as report:
        memory_file = machine_folder(target.out) / "stat.json"
        files = StatMemory(memory_file, trust=not params.rehash)
        weights = StatMemory(memory_file.parent.parent / "weights.json", trust=not params.verify_weights)
        texts = _captions(target, files, params) if target.kind == "text" else _prompts(target)
        encoders = _find_encoders(params)
        wanted = _wanted(target, texts, encoders, _fingerprints(encoders, weights), _recipe(params))
        report.update(captions=len(texts.text_by_source), **texts.report)
        if params.dry_run:
            report.summary = _forecast(target, wanted)
            return
        files.save()
        weights.save()
        encode = _Encode(params, target, texts, encoders, wanted)
        counts = fill_cache(target.out, wanted, encode, made_with=_made_with(), shard=params.shard_numbers())
        report.update(**counts.as_report(), cut=encode.cut)
        cut = f", {count(len(encode.cut), 'caption')} cut to fit" if encode.cut else ""
        report.summary = counts.summary() + cut


def _inputs(params: EncodeTextParams, target: _Target) -> dict[str, Any]:
    named = {"model": params.model, "clip_l": params.clip_l, "clip_g": params.clip_g, "t5xxl": params.t5xxl}
    source = {"dataset" if target.kind == "text" else "sample_prompts": target.source}
    return {key: None if value is None else str(value) for key, value in {**source, **named}.items()}


def _captions(target: _Target, memory: StatMemory, params: EncodeTextParams) -> _Texts:
    """Returns the processed captions of a dataset."""
    dataset = load_dataset(target.source)
    for remark in dataset.remarks:
        log.info("%s: %s", dataset.path, remark)
    found = scan(dataset, memory)
    tell_about_captions(found)
    texts = {text_source(""): ""}
    columns: dict[str, list[Any]] = {
        name: [] for name in ("name", "subset", "image_hash", "caption_hash", "variant", "key")
    }
    names: dict[str, str] = {}
    for picture in found.pictures:
        captions = processed_captions(picture, variants=params.caption_variants, seed=params.seed)
        for variant, caption in enumerate(captions):
            source = text_source(caption)
            texts.setdefault(source, caption)
            names.setdefault(source, str(picture.path))
            values = (picture.name, picture.subset.name, picture.image_hash, source, variant, source)
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
    return _Texts(
        text_by_source=texts,
        names=names,
        columns=columns,
        subsets={subset.name: subset.weighting() for subset in dataset.subsets},
        quarantined=_quarantined(found),
        report={"pictures": len(found.pictures), "uses": len(columns["name"])},
    )


def _quarantined(found: Scan) -> list[dict[str, Any]]:
    return [
        {"name": item.name, "subset": item.subset, "image_hash": item.image_hash or "", "reason": item.reason}
        for item in found.unreadable
    ]


def _prompts(target: _Target) -> _Texts:
    """Returns the sample prompts of a file and their negative prompts."""
    prompts = load_prompts(target.source)
    texts = {text_source(""): ""}
    names: dict[str, str] = {}
    for number, prompt in enumerate(prompts):
        for text in (prompt.prompt, prompt.negative_prompt):
            texts.setdefault(text_source(text), text)
            names.setdefault(text_source(text), f"prompt {number}")
    columns = {
        "name": [f"{number:03d}" for number in range(len(prompts))],
        "prompt": [prompt.prompt for prompt in prompts],
        "negative": [prompt.negative_prompt for prompt in prompts],
        "settings": [json.dumps(prompt.settings(), sort_keys=True) for prompt in prompts],
        "key": [text_source(prompt.prompt) for prompt in prompts],
        "negative_key": [text_source(prompt.negative_prompt) for prompt in prompts],
    }
    report = {"prompts": len(prompts)}
    return _Texts(text_by_source=texts, names=names, columns=columns, subsets={}, quarantined=[], report=report)


def _find_encoders(params: EncodeTextParams) -> _Encoders:
    """Returns where weights and tokenizers are. Raises InputError, NetworkError."""
    files: dict[EncoderName, Path | None] = {"clip_l": params.clip_l, "clip_g": params.clip_g, "t5xxl": params.t5xxl}
    sources: dict[EncoderName, ComponentSource] = {
        name: find_component(name, model=params.model, file=files[name]) for name in ENCODERS
    }
    clip_l, clip_g = (detect_clip(sources[name].shapes(), sources[name].where) for name in ("clip_l", "clip_g"))
    t5xxl = detect_t5(sources["t5xxl"].shapes(), sources["t5xxl"].where)
    return _Encoders(
        sources=sources,
        tokenizers=find_tokenizers(folder=params.tokenizers, model=params.model, files=list(files.values())),
        widths={"clip_l": clip_l.width, "clip_g": clip_g.width, "t5xxl": t5xxl.width},
        vocabularies={"clip_l": clip_l.vocabulary, "clip_g": clip_g.vocabulary, "t5xxl": t5xxl.vocabulary},
        clip_length=clip_l.positions,
    )


def _fingerprints(encoders: _Encoders, memory: StatMemory) -> dict[str, str]:
    """Returns what identifies the weights and the tokenizers."""
    weights = {name: source.fingerprint(memory) for name, source in encoders.sources.items()}
    return {**weights, "tokenizers": tokenizers_identity(encoders.tokenizers, memory)}


def _recipe(params: EncodeTextParams) -> TextRecipe:
    return TextRecipe(
        padding=params.padding,
        apply_lg_attn_mask=params.apply_lg_attn_mask,
        apply_t5_attn_mask=params.apply_t5_attn_mask,
        t5xxl_max_token_length=params.t5xxl_max_token_length,
        t5_pad_to=params.t5_pad_to or params.t5xxl_max_token_length,
        text_dtype=params.text_dtype,
    )


def _wanted(
    target: _Target, texts: _Texts, encoders: _Encoders, fingerprints: Mapping[str, str], recipe: TextRecipe
) -> Wanted:
    """Returns the whole content of the cache, known before anything is encoded."""
    fields, nbytes = recipe.fields(), _row_bytes(encoders, recipe)
    rows = [WantedRow(source=source, recipe=fields, group="text", nbytes=nbytes) for source in texts.text_by_source]
    wanted = Wanted(
        kind=target.kind,
        recipe_version=RECIPE_VERSION,
        fingerprints=fingerprints,
        recipe=fields,
        rows=rows,
        samples={},
        subsets=texts.subsets,
        quarantined=texts.quarantined,
    )
    key_by_source = dict(zip(texts.text_by_source, wanted.keys, strict=True))
    keyed = {
        name: [key_by_source[source] for source in column] if name in ("key", "negative_key") else column
        for name, column in texts.columns.items()
    }
    return replace(wanted, samples=keyed, extra={"empty_caption": key_by_source[text_source("")]})


def _row_bytes(encoders: _Encoders, recipe: TextRecipe) -> int:
    """Returns the size of a row whose caption is not longer than t5_pad_to."""
    clip_width = encoders.widths["clip_l"] + encoders.widths["clip_g"]
    numbers = (encoders.clip_length + 1) * clip_width + recipe.t5_pad_to * encoders.widths["t5xxl"]
    return numbers * ITEM_BYTES[recipe.text_dtype] + 2 * encoders.clip_length + recipe.t5_pad_to


def _forecast(target: _Target, wanted: Wanted) -> str:
    missing = missing_rows(target.out, wanted)
    there = len(wanted.row_by_key) - len(missing.keys)
    size, free = readable_bytes(missing.nbytes), readable_bytes(missing.free_bytes)
    return f"{there} there, {len(missing.keys)} to encode, {size} to write ({free} free); nothing was done"


def _made_with() -> str:
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return f"sd3pipe {version()}, {libraries}"


class _Encode:
    """Makes rows by their keys. Only then are torch, transformers and the encoders loaded."""

    def __init__(
        self, params: EncodeTextParams, target: _Target, texts: _Texts, encoders: _Encoders, wanted: Wanted
    ) -> None:
        self._params, self._out, self._texts, self._encoders = params, target.out, texts, encoders
        self._source_by_key = dict(zip(wanted.keys, texts.text_by_source, strict=True))
        self.cut: list[dict[str, Any]] = []  # texts that lost tokens, for the report

    def __call__(self, keys: Sequence[str]) -> Iterator[tuple[str, Row | Unreadable]]:
        from sd3pipe.cache.tensors import from_torch
        from sd3pipe.device import choose_device
        from sd3pipe.models.text_rows import EncodingMachine, encode_rows, streams_t5

        sources = [self._source_by_key[key] for key in keys]
        recipe = _recipe(self._params)
        tokens = self._tokens(sources, recipe)
        device = choose_device(self._params.device, self._params.threads)
        machine = EncodingMachine(
            device=device,
            batch_rows=self._params.text_encoder_batch_size,
            stream_t5=streams_t5(self._params.t5xxl_streaming, self._encoders.sources["t5xxl"], recipe, device),
            scratch=machine_folder(self._out),
        )
        rows = encode_rows(tokens, sources=self._encoders.sources, recipe=recipe, machine=machine, progress=progress)
        for key, row in zip(keys, rows, strict=True):
            yield key, {name: from_torch(tensor) for name, tensor in row.items()}

    def _tokens(self, sources: Sequence[str], recipe: TextRecipe) -> "dict[EncoderName, TokenizedTexts]":
        """Returns the token ids of texts; what is cut off is told."""
        from sd3pipe.models.tokenizers import tokenize_for_encoders

        tokens = tokenize_for_encoders(
            [self._texts.text_by_source[source] for source in sources],
            self._encoders.tokenizers,
            self._encoders.vocabularies,
            clip_length=self._encoders.clip_length,
            recipe=recipe,
        )
        for number, source in enumerate(sources):
            lost = {name: tokens[name].counts[number] for name in ENCODERS if tokens[name].is_cut(number)}
            if lost:
                self.cut.append({"used_by": self._texts.names.get(source, ""), "tokens": lost})
        _tell_about_cuts(self.cut, self._encoders.clip_length, recipe.t5xxl_max_token_length)
        return tokens


def _tell_about_cuts(cut: Sequence[Mapping[str, Any]], clip_length: int, t5_length: int) -> None:
    for names, length in ((("clip_l", "clip_g"), clip_length), (("t5xxl",), t5_length)):
        users = [item["used_by"] for item in cut if any(name in item["tokens"] for name in names)]
        if users:
            shown = ", ".join(users[:_SHOWN]) + (f" and {len(users) - _SHOWN} more" if len(users) > _SHOWN else "")
            who = "CLIP-L and CLIP-G" if "clip_l" in names else "T5-XXL"
            log.warning("%s read only the first %d tokens of %s: %s", who, length, count(len(users), "caption"), shown)
