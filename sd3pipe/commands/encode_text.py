"""`sd3pipe encode-text`: captions or sample prompts to text encoder outputs, one row per distinct text, in a cache."""

import functools
import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.rows import Row
from sd3pipe.cache.staleness import remember_sources
from sd3pipe.cache.store import FillCounts, Unreadable, fill_cache, missing_rows
from sd3pipe.cache.wanted import Wanted
from sd3pipe.config import find_project
from sd3pipe.console import StageReport, count, listed, one_line, readable_bytes, readable_seconds, say, version
from sd3pipe.data.captions import caption_statistics
from sd3pipe.data.dataset_file import Dataset, load_dataset
from sd3pipe.data.prompts import load_prompts
from sd3pipe.data.scan import Scan, scan, source_files, tell_about_captions
from sd3pipe.encoding.cut_texts import Cuts, recall_cuts, remember_cuts
from sd3pipe.encoding.recipe_version import version_change
from sd3pipe.encoding.text_plan import (
    TextEncoders,
    Texts,
    caption_texts,
    find_text_encoders,
    prompt_texts,
    text_recipe,
    text_wanted,
)
from sd3pipe.errors import ParameterError
from sd3pipe.models.text_architecture import EncoderName
from sd3pipe.models.text_recipe import TextRecipe
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.params.sharing import shard_of_process
from sd3pipe.stat_memory import StatMemory

if TYPE_CHECKING:
    from sd3pipe.encoding.text_encoding import Tokens

log = logging.getLogger(__name__)

_Kind = Literal["text", "prompts"]

_PROJECT_KEYS: dict[_Kind, str] = {"text": "dataset", "prompts": "sample_prompts"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """One cache to fill from one file."""

    kind: _Kind
    source: Path
    out: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """Everything that is known before anything is encoded."""

    texts: Texts
    encoders: TextEncoders
    recipe: TextRecipe
    wanted: Wanted
    scanned: tuple[Dataset, Scan, float] | None  # with the time at which the scan began


def main(params: EncodeTextParams) -> None:
    """Fills the text cache of a dataset or the cache of sample prompts; in a project, without either named, both."""
    for target in _targets(params):
        if params.dry_run:
            ready = _prepare(params, target)
            _tell_version_change(ready, params, target)
            say(f"encode-text, dry run: {_forecast(ready, params, target)}")
        else:
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
        del sources["prompts"]  # --out names one cache: that of the captions
    if params.out is None and "caches" not in paths:
        raise ParameterError("encode-text: --out is missing: name the folder of the cache, such as caches/text")
    return [
        _Target(kind=kind, source=source, out=params.out or Path(paths["caches"], kind))
        for kind, source in sources.items()
    ]


def _fill(params: EncodeTextParams, target: _Target) -> None:
    with StageReport("encode-text", path=Path(f"{target.out}.report.json"), inputs=_inputs(params, target)) as report:
        ready = _prepare(params, target)
        report.update(texts=len(ready.texts.text_by_hash), uses=len(ready.texts.columns["key"]))
        if target.kind == "text":
            used = [ready.texts.text_by_hash[digest] for digest in ready.texts.columns["caption_hash"]]
            report.update(captions=caption_statistics(used))
        _tell_version_change(ready, params, target)
        folder = machine_folder(target.out)
        cuts = recall_cuts(folder, set(ready.wanted.keys))
        if params.engine == "ray":
            counts = _fill_on_ray(ready, params, target, cuts, report.begin)
        else:
            counts = _filler(ready, params, target, cuts, report.begin)(shard_of_process(params.shard))
        report.begin()
        remember_cuts(folder, cuts)
        cut = _cut_texts(ready, cuts)
        report.update(**counts.as_report(), cut=cut)
        report.summary = counts.summary()
        report.summary += f", {count(len(cut), 'text')} cut" if cut else ""
        if ready.scanned is not None:
            dataset, found, started = ready.scanned
            seen = source_files(found, dataset, captions=True)
            remember_sources(
                target.out, dataset_file=target.source, files=seen.files, folders=seen.folders, scan_started=started
            )


def filler(params: EncodeTextParams, target: _Target) -> Callable[[tuple[int, int]], FillCounts]:
    """Returns what fills part i of n of a cache."""
    return _filler(_prepare(params, target), params, target, {}, lambda: None)


def _filler(
    ready: _Prepared, params: EncodeTextParams, target: _Target, cuts: Cuts, begin: Callable[[], None]
) -> Callable[[tuple[int, int]], FillCounts]:
    encode = _encoder(ready, params, machine_folder(target.out), cuts, begin)

    def fill(shard: tuple[int, int]) -> FillCounts:
        return fill_cache(target.out, ready.wanted, encode, made_with=_made_with(), shard=shard)

    return fill


def _fill_on_ray(
    ready: _Prepared, params: EncodeTextParams, target: _Target, cuts: Cuts, begin: Callable[[], None]
) -> FillCounts:
    """Lets the workers of a cluster make what is missing, and publishes it."""
    missing = missing_rows(target.out, ready.wanted)
    if missing.keys:
        from sd3pipe.encoding.ray_engine import fill_parts

        _tokens(ready, missing.keys, cuts, machine_folder(target.out))
        begin()
        theirs = params.model_copy(update={"rehash": False, "verify_weights": False})
        fill_parts(
            "encode-text",
            functools.partial(filler, theirs, target),
            parts_per_worker=1,  # for each part the three encoders are read anew, one after the other
            workers=params.ray_workers,
            on_cpu=params.device == "cpu",
        )
    return _filler(ready, params, target, cuts, begin)((0, 1)).since(missing)


def _inputs(params: EncodeTextParams, target: _Target) -> dict[str, str | None]:
    names = ("model", "clip_l", "clip_g", "t5xxl", "tokenizers")
    inputs = {_PROJECT_KEYS[target.kind]: target.source} | {name: getattr(params, name) for name in names}
    return {name: None if value is None else str(value) for name, value in inputs.items()}


def _prepare(params: EncodeTextParams, target: _Target) -> _Prepared:
    """Reads captions or prompts, headers and what identifies the weights. Writes nothing for a dry run."""
    folder = machine_folder(target.out)
    pictures = StatMemory(folder / "stat.json", trust=not params.rehash)
    weights = StatMemory(folder.parent / "weights.json", trust=not params.verify_weights)  # one for all caches here
    scanned = None
    if target.kind == "text":
        dataset, started = load_dataset(target.source), time.time()
        for remark in dataset.remarks:
            log.info("%s: %s", dataset.path, remark)
        found = scan(dataset, pictures)
        tell_about_captions(found)
        scanned = (dataset, found, started)
        texts = caption_texts(found, dataset, variants=params.caption_variants, seed=params.seed)
    else:
        texts = prompt_texts(load_prompts(target.source))
    files: dict[EncoderName, Path | None] = {"clip_l": params.clip_l, "clip_g": params.clip_g, "t5xxl": params.t5xxl}
    encoders = find_text_encoders(params.model, files, params.tokenizers)
    recipe = text_recipe(params)
    wanted = text_wanted(texts, encoders, encoders.fingerprints(weights), recipe)
    if not params.dry_run:
        pictures.save()
        weights.save()
    return _Prepared(
        texts=texts,
        encoders=encoders,
        recipe=recipe,
        wanted=wanted,
        scanned=scanned,
    )


def _made_with() -> str:
    libraries = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "tokenizers")]
    return ", ".join([f"sd3pipe {version()}", *libraries])


def _encoder(
    ready: _Prepared, params: EncodeTextParams, scratch: Path, cuts: Cuts, begin: Callable[[], None]
) -> Callable[[Sequence[str]], Iterator[tuple[str, Row | Unreadable]]]:
    """Returns the function that encodes rows by their keys; it adds the texts that lose tokens to `cuts`."""

    def encode(keys: Sequence[str]) -> Iterator[tuple[str, Row | Unreadable]]:
        from sd3pipe.encoding.text_encoding import encoded_texts  # imports torch and transformers

        tokens = _tokens(ready, keys, cuts, scratch)
        rows = encoded_texts(tokens, ready.encoders, ready.recipe, params, scratch)
        for key, row in zip(keys, rows, strict=True):
            begin()
            yield key, row

    return encode


def _tokens(ready: _Prepared, keys: Sequence[str], cuts: Cuts, folder: Path) -> "Tokens":
    """Returns the token ids of the rows' texts, warns of those that lose some, and adds them to `cuts`.

    They are remembered at once: when the rows are published, a run that encodes nothing must know of them.
    """
    from sd3pipe.encoding.text_encoding import tokenized

    hash_by_key = dict(zip(ready.wanted.keys, ready.texts.text_by_hash, strict=True))
    texts = [ready.texts.text_by_hash[hash_by_key[key]] for key in keys]
    tokens, cut = tokenized(texts, ready.encoders, ready.recipe)
    found: Cuts = {keys[text.number]: dict(text.tokens) for text in cut}
    cuts.update(found)
    remember_cuts(folder, cuts)
    _tell_about_cuts(_cut_texts(ready, found), ready.encoders.clip_length, ready.recipe.t5xxl_max_token_length)
    return tokens


def _cut_texts(ready: _Prepared, cuts: Cuts) -> list[dict[str, Any]]:
    """Returns who uses each text that is cut, and how many tokens it has, in the order of the dataset."""
    hash_by_key = zip(ready.wanted.keys, ready.texts.text_by_hash, strict=True)
    users = ready.texts.users
    return [{"used_by": users.get(digest, ""), "tokens": cuts[key]} for key, digest in hash_by_key if key in cuts]


def _tell_about_cuts(cut: Sequence[Mapping[str, Any]], clip_length: int, t5_length: int) -> None:
    for name, title, length in (("clip_l", "CLIP", clip_length), ("t5xxl", "T5", t5_length)):
        users = [f"{one_line(item['used_by'])} ({item['tokens'][name]})" for item in cut if name in item["tokens"]]
        if users:
            texts = count(len(users), "longer text")
            log.warning("%s reads the first %d tokens of %s: %s", title, length, texts, listed(users))


def _tell_version_change(ready: _Prepared, params: EncodeTextParams, target: _Target) -> None:
    """Says before anything is encoded what another recipe version takes."""
    words = version_change(target.out, ready.wanted)
    if words:
        log.warning("%s: %s", words, _forecast(ready, params, target))


def _forecast(ready: _Prepared, params: EncodeTextParams, target: _Target) -> str:
    """Returns what a run would do: rows, time on this device, size."""
    missing = missing_rows(target.out, ready.wanted)
    there = len(ready.wanted.row_by_key) - len(missing.keys)
    if not missing.keys:
        return f"nothing to encode, {count(there, 'row')} there"
    from sd3pipe.encoding.text_encoding import seconds_to_encode  # imports torch, only to tell the time

    device, seconds = seconds_to_encode(len(missing.keys), ready.encoders, ready.recipe, params)
    return (
        f"{count(len(missing.keys), 'row')} to encode, {there} there; about "
        f"{readable_seconds(seconds)} on {device}, {readable_bytes(missing.nbytes)} to write, "
        f"{readable_bytes(missing.free_bytes)} free"
    )
