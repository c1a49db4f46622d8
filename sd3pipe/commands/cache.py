"""`sd3pipe cache ...`: look into caches, check them, unite them, empty their unused rows."""

import json
from dataclasses import asdict
from typing import Any

from sd3pipe.cache.listing import delete_unused, describe, find_caches
from sd3pipe.cache.merge import merge_caches
from sd3pipe.cache.plain_zarr import export_zarr
from sd3pipe.cache.sample_export import export_samples
from sd3pipe.cache.verify import repair, verify_cache
from sd3pipe.cache.why import Explanation, explain
from sd3pipe.console import count, readable_bytes, say, say_json
from sd3pipe.errors import InputError
from sd3pipe.params import cache as option_sets

_SHOWN_QUARANTINED = 10


def ls(params: option_sets.CacheLsParams) -> None:
    """Prints recipe, rows and sizes of one cache or of all caches in a folder."""
    described = [describe(cache) for cache in find_caches(params.cache)]
    if params.json_output:
        say_json(described)
        return
    lines = [line for item in described for line in ("", *_ls_lines(item))]
    say(*lines[1:])


def verify(params: option_sets.CacheVerifyParams) -> None:
    """Checks every checksum and key. Raises InputError if anything is wrong, repaired or not."""
    verification = verify_cache(params.cache, threads=params.threads)
    for problem in verification.problems:
        say(problem.what)
    checked = (
        f"{count(verification.rows, 'row')} in {count(verification.segments, 'segment')}, "
        f"{readable_bytes(verification.nbytes)}"
    )
    if not verification.problems:
        say(f"cache verify: {checked}: all as it was encoded")
        return
    found = f"{params.cache}: {count(len(verification.problems), 'problem')} in {checked}"
    if all(problem.path is None for problem in verification.problems):
        raise InputError(f"{found}: nothing to move aside, the next encode mends it")
    if not params.repair:
        raise InputError(f"{found}: --repair moves what is damaged aside, the next encode makes it again")
    moved = repair(params.cache, verification)
    raise InputError(f"{found}: {count(len(moved), 'file')} moved aside; run the encode stage to fill the hole")


def why(params: option_sets.CacheWhyParams) -> None:
    """Prints for each row of a picture or caption whether it is there, and what the nearest row has otherwise."""
    explanations = explain(params.cache, params.subject)
    if params.json_output:
        say_json([asdict(item) for item in explanations])
        return
    say(*(line for item in explanations for line in _why_lines(item)))


def gc(params: option_sets.CacheGcParams) -> None:
    """Deletes unused rows."""
    keep_bytes = None if params.keep_gb is None else int(params.keep_gb * 1e9)
    deleted = delete_unused(
        params.cache, older_than_days=params.older_than, keep_bytes=keep_bytes, dry_run=params.dry_run
    )
    verb = "would delete" if params.dry_run else "deleted"
    size = readable_bytes(sum(item.nbytes for item in deleted))
    say(f"cache gc: {verb} {count(len(deleted), 'unused file')}, {size}")


def merge(params: option_sets.CacheMergeParams) -> None:
    """Unites caches of equal recipe and weights."""
    counts = merge_caches(params.caches, params.out)
    say(f"cache merge: {count(counts.reused, 'row')} of {count(len(params.caches), 'cache')} in {params.out}")


def export(params: option_sets.CacheExportParams) -> None:
    """Writes a cache as plain zarr arrays, or samples for other training engines."""
    if params.format == "zarr":
        written = count(export_zarr(params.cache, params.out), "row")
    else:
        samples = export_samples(params.cache, params.out, form=params.format, text=params.text)
        written = count(samples, "sample")
    say(f"cache export: {written} in {params.out}")


def _ls_lines(item: dict[str, Any]) -> list[str]:
    rows = f"{count(item['rows'], 'row')} for {count(item['samples'], 'sample')}"
    sizes = f"{count(item['segments'], 'segment')}, {readable_bytes(item['bytes'])}"
    lines = [
        f"{item['cache']}: {item['kind']}, {rows}, {sizes}",
        *(
            f"  {name:<24}{json.dumps(value) if isinstance(value, dict | list) else value}"
            for name, value in item["recipe"].items()
        ),
        f"  {'recipe version':<24}{item['recipe_version']}",
        *(f"  {name:<24}{value}" for name, value in item["fingerprints"].items()),
        *(f"  {'shape':<24}{_shape(layout)}" for layout in item["layouts"]),
        *(f"  {'subset ' + name:<24}{_settings(settings)}" for name, settings in item["subsets"].items()),
        f"  {'unused':<24}{count(item['unused']['files'], 'file')}, {readable_bytes(item['unused']['bytes'])}",
    ]
    quarantined = item["quarantined"]
    lines += [f"  {'unreadable':<24}{entry['name']}: {entry['reason']}" for entry in quarantined[:_SHOWN_QUARANTINED]]
    if len(quarantined) > _SHOWN_QUARANTINED:
        lines.append(f"  {'':<24}and {len(quarantined) - _SHOWN_QUARANTINED} more; --json lists all")
    return lines


def _shape(layout: dict[str, Any]) -> str:
    tensors = (f"{name} {dtype} {'x'.join(map(str, shape))}" for name, (dtype, *shape) in layout["tensors"].items())
    return f"{', '.join(tensors)}: {count(layout['rows'], 'row')}"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _why_lines(item: Explanation) -> list[str]:
    sample = item.sample
    named = [f"{name} {sample[name]}" for name in ("crop", "flip", "variant") if sample.get(name)]
    about = ", ".join(["/".join(str(sample[name]) for name in ("subset", "name") if name in sample), *named])
    said = {
        "hit": f"hit, row {item.key} in segment {item.where}",
        "stale": f"stale, row {item.key} in segment {item.where} is of what was there before: encode again",
        "unused": f"unused row {item.key} in segment {item.where}: comes back without encoding",
        "quarantined": f"unreadable: {item.where}",
        "miss": f"miss, row {item.key} is not there",
    }[item.state]
    lines = [f"{about}: {said}"]
    if item.note:
        lines.append(f"  {item.note}")
    if item.nearest is not None:
        lines.append(f"  the nearest row, {item.nearest}, differs in")
        lines += [f"    {row.field:<32}wanted {row.wanted}, there {row.nearest}" for row in item.differences]
    return lines
