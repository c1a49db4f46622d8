"""`sd3pipe adapter`: look into adapter files, convert, resize, add up and extract them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sd3pipe.adapters.algebra import mean_kept
from sd3pipe.adapters.algebra import merge as merged_adapter
from sd3pipe.adapters.algebra import resize as resized
from sd3pipe.adapters.files import AdapterFile, read_adapter, save_adapter
from sd3pipe.adapters.find import find_adapter
from sd3pipe.adapters.inspection import Inspection, norm_picture, norm_table
from sd3pipe.adapters.inspection import inspect as inspected
from sd3pipe.adapters.kind import Adapter, plain_adapter
from sd3pipe.adapters.metadata import read_provenance
from sd3pipe.adapters.sizes import same_size
from sd3pipe.console import count, one_line, say, say_json
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.exporting.adapter_files import as_summary, export_metadata, refuse_other_ending, refuse_to_replace
from sd3pipe.exporting.base_weights import for_form
from sd3pipe.exporting.extraction import extract as extracted_adapter
from sd3pipe.exporting.reproduction import later_steps, reproduction, with_step
from sd3pipe.files import write_text
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.sources import find_component
from sd3pipe.params import adapter as option_sets
from sd3pipe.words import MMDiTVariant

_LONGEST_VALUE = 200


def inspect(params: option_sets.AdapterInspectParams) -> None:
    """Prints what a file holds, what it says of itself, and what base it fits."""
    file = read_adapter(find_adapter(params.adapter), ignore_unknown=params.ignore_unknown)
    if params.reproduce:
        say(*reproduction(read_provenance(file.metadata, file.path), later_steps(file.metadata)))
        return
    found = inspected(file)
    if params.picture is not None:
        if params.picture.suffix.lower() != ".svg":
            raise ParameterError(
                f"--picture {params.picture}: the picture is an SVG: name it {params.picture.stem}.svg"
            )
        write_text(params.picture, norm_picture(file.path.name, found.norms, found.depth))
    if params.as_json:
        say_json({"file": str(file.path), **asdict(found), "metadata": file.metadata})
    else:
        say(*_as_lines(file, found))


def convert(params: option_sets.AdapterConvertParams) -> None:
    """Writes an adapter of any known form in another, without loss or not at all."""
    file = read_adapter(find_adapter(params.adapter), ignore_unknown=params.ignore_unknown)
    _save(params, [file], file.adapter, file.metadata, file.variants)


def resize(params: option_sets.AdapterResizeParams) -> None:
    """Writes the nearest adapter of another rank, and says how much of the change it holds."""
    file = read_adapter(find_adapter(params.adapter))
    plain = plain_adapter(file.adapter)
    found = {path: resized(delta, rank=params.rank, energy=params.energy) for path, delta in plain.items()}
    kept = mean_kept(found.values())
    adapter = {path: approximation.delta for path, approximation in found.items()}
    options = {"rank": params.rank, "energy": params.energy}
    words = {key: value for key, value in file.metadata.items() if not key.startswith("ss_network_")}  # of other ranks
    _save(params, [file], adapter, with_step(words, "adapter resize", options), file.variants)
    say(f"adapter resize: {kept:.2%} of the squared norm kept, {_ranks(adapter)}")


def merge(params: option_sets.AdapterMergeParams) -> None:
    """Writes the weighted sum of several adapters: exact, with ranks that add up, unless a rank is asked for."""
    files = [read_adapter(find_adapter(path)) for path in params.adapters]
    weights = params.weights or (1.0,) * len(files)
    if len(weights) != len(files):
        raise ParameterError(f"{count(len(weights), 'weight')} for {count(len(files), 'adapter')}: give one for each")
    variants = _common_variants(files)
    adapter = merged_adapter([plain_adapter(file.adapter) for file in files], weights)
    told = ""
    if params.rank is not None:
        found = {path: resized(delta, rank=params.rank, energy=None) for path, delta in adapter.items()}
        told = f", {mean_kept(found.values()):.2%} of the sum's squared norm kept"
        adapter = {path: approximation.delta for path, approximation in found.items()}
    parts = [
        {"title": file.metadata.get("modelspec.title", file.path.stem), "weight": weight,
         "sha256": file.metadata.get("sshs_model_hash")}
        for file, weight in zip(files, weights, strict=True)
    ]  # fmt: skip
    _save(params, files, adapter, {"sd3pipe_merged_from": json.dumps(parts)}, variants)
    say(f"adapter merge: {count(len(files), 'adapter')}, {_ranks(adapter)}{told}")


def extract(params: option_sets.AdapterExtractParams) -> None:
    """Writes the LoRA nearest to what tuning did to a model."""
    tuned = find_component("mmdit", model=params.tuned)
    base = find_component("mmdit", model=params.base)
    result = extracted_adapter(tuned, base, rank=params.rank, energy=params.energy, embedders=params.embedders)
    adapter = {path: approximation.delta for path, approximation in result.found.items()}
    kept = mean_kept(result.found.values())
    in_layers = sum(approximation.squared_norm for approximation in result.found.values())
    metadata = {"sd3pipe_extracted_from": json.dumps({"tuned": tuned.fingerprint(), "base": base.fingerprint()})}
    _save(params, [], adapter, metadata, (mmdit_architecture(base).variant,))
    say(
        f"adapter extract: {_ranks(adapter)}, {kept:.2%} of the squared difference of these layers kept; "
        f"{result.left_out / (in_layers + result.left_out):.2%} of the whole difference lies elsewhere"
    )


def _common_variants(files: Sequence[AdapterFile]) -> tuple[MMDiTVariant, ...]:
    """Returns the models that all adapters fit. Raises InputError where there cannot be one."""
    first, *others = files
    for file in others:
        odd = [path for path, size in file.sizes.items() if not same_size(first.sizes.get(path, size), size)]
        if odd:
            raise InputError(f"{first.path} and {file.path} belong to different models: {odd[0]} has two sizes in them")
        if first.depth and file.depth and first.depth != file.depth:
            raise InputError(f"{first.path} and {file.path} belong to models of {first.depth} and {file.depth} blocks")
    return tuple(variant for variant in first.variants if all(variant in file.variants for file in others))


def _save(
    params: option_sets.WrittenParams,
    sources: Sequence[AdapterFile],
    adapter: Adapter,
    metadata: Mapping[str, str],
    variants: tuple[MMDiTVariant, ...],
) -> None:
    refuse_other_ending(params.out)
    refuse_to_replace(params.out, [file.path for file in sources])
    ready = for_form(adapter, params.format, params.model, None)
    words = export_metadata(metadata, params, params.format, variants)
    say(as_summary(save_adapter(params.out, ready, form=params.format, dtype=params.dtype, metadata=words)))


def _ranks(adapter: Adapter) -> str:
    ranks = [delta.rank for delta in adapter.values()]
    several = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{max(ranks)}"
    return f"{count(len(ranks), 'module')} of rank {several}"


def _as_lines(file: AdapterFile, found: Inspection) -> list[str]:
    other = f"a model of {count(found.depth, 'block')}" if found.depth else "text encoders"
    lines = [
        f"{file.path}",
        f"  form        {', '.join(found.forms)}",
        f"  fits        {' or '.join(found.variants) or other}",
        f"  modules     {_counts(found.algorithms)}, {found.parameters:,} parameters",
        f"  rank        {_counts(found.ranks)}",
        f"  alpha/rank  {_counts(found.strengths)}",
        "",
        "norm of the change of the weights:",
        *norm_table(found.norms, found.depth),
        "",
    ]
    lines += [f"unknown key: {key}" for key in found.unknown]
    lines += [f"{key}: {_shortened(value)}" for key, value in sorted(file.metadata.items())]
    return lines


def _counts(numbers: Mapping[Any, int]) -> str:
    """Returns '16 (237 modules)', or several of these."""
    return ", ".join(f"{value} ({count(number, 'module')})" for value, number in numbers.items())


def _shortened(value: str) -> str:
    text = one_line(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}... ({len(text):,} characters)"
