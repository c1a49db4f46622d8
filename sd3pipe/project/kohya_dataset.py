"""Writes sd-scripts' dataset file, or its --train_data_dir folders, as ours: every value explicit."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.config import read_toml
from sd3pipe.documents import checked, read_json
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.params.stage_file import toml_value
from sd3pipe.project.kohya import Translation

_PATH_KEYS = ("image_dir", "metadata_file", "conditioning_data_dir")
_TABLE, _TABLES = TypeAdapter(dict[str, Any]), TypeAdapter(list[dict[str, Any]])
_REPEATS = re.compile(r"(\d+)_(.*)")  # sd-scripts' folder names: 10_mycat


def read_dataset(translation: Translation) -> dict[str, Any]:
    """Returns the tables of the command's dataset file or picture folders. Raises InputError, ParameterError."""
    file = translation.dataset_file
    if file is not None:
        if not file.is_file():
            raise InputError(f"{file}: the dataset file of the command is not here: run this where it is, or copy it")
        tables = read_json(file, _TABLE) if file.suffix == ".json" else read_toml(file)
        _check_tables(tables, str(file))
        return tables
    if translation.picture_folders:
        subsets = [subset for folder, is_reg in translation.picture_folders for subset in _subsets(folder, is_reg)]
        return {"datasets": [{"subsets": subsets}]}
    raise ParameterError("the command names no pictures: it has neither --dataset_config nor --train_data_dir")


def _check_tables(tables: Mapping[str, Any], where: str) -> None:
    """Raises InputError unless the tables are nested as sd-scripts has them."""
    checked(tables.get("general", {}), _TABLE, f"{where}: general")
    for number, dataset in enumerate(checked(tables.get("datasets", []), _TABLES, f"{where}: datasets")):
        checked(dataset.get("subsets", []), _TABLES, f"{where}: datasets.{number}.subsets")


def source_paths(tables: Mapping[str, Any]) -> list[str]:
    """Returns the folders and files that the subsets name: the data that a project depends on."""
    subsets = [subset for dataset in tables.get("datasets", []) for subset in dataset.get("subsets", [])]
    return list(dict.fromkeys(_located(subset)[key] for subset in subsets for key in _PATH_KEYS if key in subset))


def dataset_text(tables: Mapping[str, Any], translation: Translation) -> str:
    """Returns the dataset file; takes its batch size into the train stage."""
    general = {**translation.dataset, **tables.get("general", {})}
    _take_batch_size(tables, general, translation)
    lines = ["# Translated from sd-scripts, with its defaults written out.", "[general]", *_entries(general)]
    for dataset in tables.get("datasets", []):
        lines += ["", "[[datasets]]", *_entries({key: value for key, value in dataset.items() if key != "subsets"})]
        for subset in dataset.get("subsets", []):
            lines += ["", "[[datasets.subsets]]", *_entries(_located(subset))]
    return "\n".join(lines) + "\n"


def _subsets(folder: Path, is_reg: bool) -> list[dict[str, Any]]:
    """Returns one subset per '<repeats>_<class>' folder, sd-scripts' way of saying repeats without a file."""
    if not folder.is_dir():
        raise InputError(f"{folder}: the picture folder of the command is not here: run this where it is")
    found = []
    for path in sorted(folder.iterdir()):
        match = _REPEATS.fullmatch(path.name)
        if path.is_dir() and match:
            subset = {"image_dir": str(path), "num_repeats": int(match[1]), "class_tokens": match[2]}
            found.append({**subset, "is_reg": True} if is_reg else subset)
    if not found:
        raise InputError(f"{folder}: holds no folder named <repeats>_<class>, as sd-scripts wants them")
    return found


def _take_batch_size(tables: Mapping[str, Any], general: dict[str, Any], translation: Translation) -> None:
    sizes = [general.pop("batch_size", None)]
    sizes += [dataset.pop("batch_size", None) for dataset in tables.get("datasets", [])]
    given = sorted({size for size in sizes if size is not None})
    if given:
        translation.values["train"]["train_batch_size"] = given[-1]
    if len(given) > 1:
        translation.changed.append(
            f"batch_size: the file has {given}; one size serves all here, train_batch_size = {given[-1]}"
        )


def _located(subset: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a subset whose paths hold wherever the new file lies; sd-scripts takes them from the current folder."""
    return {key: str(Path(value).absolute()) if key in _PATH_KEYS else value for key, value in subset.items()}


def _entries(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_inline(value)}" for key, value in table.items()]


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    return toml_value(value)
