"""Writes sd-scripts' dataset file, or its --train_data_dir folders, as ours: every value explicit."""

import contextlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.config import read_toml
from sd3pipe.data.buckets import place
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.left_out import REPEATS
from sd3pipe.data.scan import Picture, scan
from sd3pipe.documents import checked, read_json
from sd3pipe.errors import InputError, ParameterError, UnreadablePicture
from sd3pipe.file_stamps import FileStamps
from sd3pipe.params.stage_file import toml_value
from sd3pipe.project.accepted import accepted, complaints
from sd3pipe.project.kohya import Given, Translation, located

_PATH_KEYS = ("image_dir", "metadata_file", "conditioning_data_dir")
_TABLE, _TABLES = TypeAdapter(dict[str, Any]), TypeAdapter(list[dict[str, Any]])
_GENERAL, _DATASET, _SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
_RESOLUTION = 1024  # where the command has none, without which sd-scripts would not begin


@dataclass(slots=True, kw_only=True)
class Block:
    """One table of the dataset file; `left_out` are values that are written commented out, with the reason."""

    header: str
    values: dict[str, Any]
    left_out: dict[str, tuple[Any, str]] = field(default_factory=dict)

    def leave_out(self, key: str, reason: str) -> None:
        self.left_out[key] = (self.values.pop(key), reason)


def dataset_blocks(given: Given, translation: Translation) -> list[Block]:
    """Returns the dataset file's tables, all of which our own reader takes.

    Takes into the train stage what belongs there. Raises InputError and ParameterError.
    """
    blocks = list(_blocks(_tables(given, translation), translation))
    for block in blocks:
        block.values = {key: value for key, value in block.values.items() if value is not None}
    subsets = [block for block in blocks if block.header == _SUBSET]
    if isinstance(folder := given.get("conditioning_data_dir"), str):
        for subset in subsets:
            subset.values.setdefault("conditioning_data_dir", folder)
    train = translation.values["train"]
    if any("batch_size" in block.values for block in blocks):
        of_others = blocks[0].values.pop("batch_size", train.get("train_batch_size", 1))
        datasets = [block.values for block in blocks if block.header == _DATASET]
        sizes = {values.pop("batch_size", of_others) for values in datasets} or {of_others}
        train["train_batch_size"] = max(sizes)
        if len(sizes) > 1:
            translation.changed.append(
                f"batch_size: the file has {sorted(sizes)}; one size serves all here, train_batch_size = {max(sizes)}"
            )
    # Masks of the alpha channel count wherever they are in sd-scripts, those of a folder under masked_loss alone.
    if any(block.values.get("alpha_mask") is True for block in blocks):
        train["masked_loss"] = "sum"
    for block in blocks:
        if "conditioning_data_dir" in block.values and "masked_loss" not in train:
            block.leave_out("conditioning_data_dir", "acts in sd-scripts under masked_loss alone")
    for subset in subsets:
        _locate(subset)
    _leave_out_what_does_not_fit(blocks)
    if not any("resolution" in block.values for block in blocks):
        blocks[0].values["resolution"] = _RESOLUTION
        translation.changed.append(
            f"resolution: there is none to take, without which sd-scripts would not begin; {_RESOLUTION} is written"
        )
    return blocks


def dataset_text(blocks: list[Block]) -> str:
    """Returns the dataset file."""
    lines = ["# Translated from sd-scripts, with its defaults written out."]
    for block in blocks:
        lines += ["", block.header, *(_entry(key, value) for key, value in block.values.items())]
        for key, (value, reason) in block.left_out.items():
            lines.append(f"# {_entry(key, value)} # left out: {reason}")
    return "\n".join(lines) + "\n"


def source_paths(blocks: list[Block]) -> list[str]:
    """Returns the folders and files that the subsets name: the data that a project depends on."""
    found = [block.values[key] for block in blocks for key in _PATH_KEYS if key in block.values]
    return list(dict.fromkeys(found))


def batches_per_epoch(text: str, batch_size: int) -> int | None:
    """Returns in how many batches an epoch of the dataset goes, or None if its pictures are not here."""
    found: list[Picture] = []

    def look(file: Path) -> None:
        found.extend(scan(load_dataset(file), FileStamps(file.with_name("memory")), with_captions=False).pictures)

    if complaints(text, "dataset.toml", look):
        return None
    pictures = Counter[tuple[Any, ...]]()
    for picture in found:
        if picture.split == "train":
            with contextlib.suppress(UnreadablePicture):
                bucket = place(picture.width, picture.height, picture.subset.bucketing).bucket
                pictures[picture.subset.dataset, bucket] += picture.subset.num_repeats
    return sum(-(-number // batch_size) for number in pictures.values())


def _tables(given: Given, translation: Translation) -> dict[str, Any]:
    """Returns the tables of the command's dataset file, metadata or picture folders."""
    config, metadata = given.get("dataset_config"), given.get("in_json")
    folders = {name: given.get(name) for name in ("train_data_dir", "reg_data_dir") if given.get(name)}
    if config:
        ignored = [name for name in (*folders, "in_json") if given.get(name)]
        translation.changed += [
            f"{name}: counts for nothing beside dataset_config, as in sd-scripts" for name in ignored
        ]
        return _read_tables(str(config))
    if metadata:
        subset = {"metadata_file": str(metadata), "image_dir": folders.get("train_data_dir")}
        return {"datasets": [{"subsets": [subset]}]}
    if not folders:
        raise ParameterError("the command names no pictures: it has neither --dataset_config nor --train_data_dir")
    subsets = [subset for name, folder in folders.items() for subset in _subsets(str(folder), name == "reg_data_dir")]
    return {"datasets": [{"subsets": subsets}]}


def _read_tables(config: str) -> dict[str, Any]:
    file = Path(config).expanduser()
    if not file.exists():  # whoever has it copies its tables in place of this one
        return {"datasets": [{"subsets": [{"image_dir": f"the subsets of {config}"}]}]}
    tables = read_json(file, _TABLE) if file.suffix == ".json" else read_toml(file)
    checked(tables.get("general", {}), _TABLE, f"{file}: general")
    for number, dataset in enumerate(checked(tables.get("datasets", []), _TABLES, f"{file}: datasets")):
        checked(dataset.get("subsets", []), _TABLES, f"{file}: datasets.{number}.subsets")
    return tables


def _subsets(folder: str, is_reg: bool) -> Iterator[dict[str, Any]]:
    """Yields one subset per '<repeats>_<class>' folder, sd-scripts' way of saying repeats without a file."""
    more = {"is_reg": True} if is_reg else {}
    path = Path(folder).expanduser()
    matches = {child: REPEATS.fullmatch(child.name) for child in sorted(path.iterdir())} if path.is_dir() else {}
    found = [(child, match) for child, match in matches.items() if match and child.is_dir()]
    if path.is_dir() and not found:
        raise InputError(f"{folder}: holds no folder named <repeats>_<class>, as sd-scripts wants them")
    for child, match in found:
        yield {"image_dir": str(child), "num_repeats": int(match[1]), "class_tokens": match[2], **more}
    if not found:  # on another machine there will be a subset for each folder in it
        yield {"image_dir": f"{folder}/REPEATS_CLASS", **more}


def _blocks(tables: Mapping[str, Any], translation: Translation) -> Iterator[Block]:
    yield Block(header=_GENERAL, values={**translation.dataset, **tables.get("general", {})})
    for dataset in tables.get("datasets", []):
        yield Block(header=_DATASET, values={key: value for key, value in dataset.items() if key != "subsets"})
        for subset in dataset.get("subsets", []):
            yield Block(header=_SUBSET, values=dict(subset))
    for key in tables.keys() - {"general", "datasets"}:
        translation.lost.append(f"{key}: sd-scripts has no such table in a dataset file")


def _locate(subset: Block) -> None:
    """Makes paths hold wherever the new file lies; sd-scripts takes them from the current folder."""
    for key in _PATH_KEYS:
        if key in subset.values:
            subset.values[key], problem = located(str(subset.values[key]))
            if problem:
                subset.leave_out(key, problem)


def _leave_out_what_does_not_fit(blocks: list[Block]) -> None:
    units = {(number, key): value for number, block in enumerate(blocks) for key, value in block.values.items()}

    def problems(kept: Mapping[tuple[int, str], Any]) -> list[str]:
        trial = [
            Block(header=block.header, values={key: value for (at, key), value in kept.items() if at == number})
            for number, block in enumerate(blocks)
        ]
        if not any("resolution" in block.values for block in trial):
            trial[0].values["resolution"] = _RESOLUTION
        for number, block in enumerate(trial):
            if block.header == _SUBSET and not {"image_dir", "metadata_file"} & block.values.keys():
                block.values["image_dir"] = f"left out {number}"
        return complaints(dataset_text(trial), "dataset.toml", load_dataset)

    _, unfit = accepted(units, problems, word=lambda unit: unit[1], longest=("resolution", "image_dir"))
    for (number, key), reason in unfit.items():
        blocks[number].leave_out(key, reason)


def _entry(key: str, value: Any) -> str:
    return f"{key if re.fullmatch(r'[A-Za-z0-9_-]+', key) else toml_value(key)} = {_inline(value)}"


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_entry(str(key), item) for key, item in value.items()) + " }"
    return toml_value(value)
