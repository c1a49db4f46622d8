"""Reads a dataset file as sd-scripts writes it (TOML or JSON) into plain, complete descriptions of its subsets.

A value is looked up in the subset, then its dataset, then [general], then the default. Nothing here looks at pictures.
"""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from sd3pipe.config import read_toml
from sd3pipe.data.dataset_keys import PRESERVATION, DatasetKeys, Keys, SubsetKeys, place_of, remark
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import ParameterError
from sd3pipe.problems import check_table, shown_key
from sd3pipe.prompt_settings import SIDE_STEP_PX
from sd3pipe.remote import Remote, is_address

CONTAINER_ENDINGS = (".tar", ".parquet", ".arrow")  # of files that hold several pictures
_WEIGHTING = (
    "dataset", "num_repeats", "is_reg", "prior_loss_weight", "loss_weight", "caption_dropout_rate",
    "caption_dropout_every_n_epochs", "diff_output_preservation",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucketing:
    """How pictures of a dataset are sorted into sizes, in pixels; with `enable_bucket` off, one size for all."""

    width: int
    height: int
    enable_bucket: bool
    min_bucket_reso: int
    max_bucket_reso: int
    bucket_reso_steps: int
    bucket_no_upscale: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionRules:
    """What happens to a caption before it is encoded."""

    caption_prefix: str
    caption_suffix: str
    enable_wildcard: bool
    shuffle_caption: bool
    caption_separator: str
    keep_tokens: int
    keep_tokens_separator: str
    secondary_separator: str
    caption_tag_dropout_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """One [[datasets.subsets]] with everything it inherits. `dataset` numbers its [[datasets]] from 0."""

    name: str
    dataset: int
    image_dir: Path | Remote | None
    metadata_file: Path | None
    conditioning_data_dir: Path | None
    recursive: bool
    caption_extensions: tuple[str, ...]
    caption_cache: Path | None
    class_tokens: str | None
    captions: CaptionRules
    bucketing: Bucketing
    resize_interpolation: str | None
    flip_aug: bool
    random_crop: bool
    face_crop_aug_range: tuple[float, float] | None
    alpha_mask: bool
    alpha_background: tuple[int, int, int] | None
    is_reg: bool
    num_repeats: int
    prior_loss_weight: float | None
    loss_weight: float
    caption_dropout_rate: float
    caption_dropout_every_n_epochs: int
    validation_split: float
    validation_seed: int
    diff_output_preservation: bool

    def weighting(self) -> dict[str, Any]:
        """Returns what only weights or orders samples: it goes to the manifest, per subset, and into no key."""
        return {name: getattr(self, name) for name in _WEIGHTING}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A whole dataset file. `remarks` are lines to show the user: keys that act elsewhere, subsets that are dropped."""

    path: Path
    subsets: tuple[Subset, ...]
    remarks: tuple[str, ...]


def load_dataset(path: Path) -> Dataset:
    """Returns the dataset that a file describes. Raises ParameterError with one line per problem."""
    try:
        content = read_json(path, TypeAdapter(Any)) if path.suffix.lower() == ".json" else read_toml(path)
    except DocumentError as error:
        raise ParameterError(str(error)) from error
    if not isinstance(content, dict):
        raise ParameterError(f"{path}: must hold a table with general and datasets")
    return _Reader(path).read(content)


def folder_dataset(folder: str) -> Dataset:
    """Returns a dataset of all pictures in a folder and in the folders in it, with every other value's default.

    It may be whatever an image_dir may name.
    """
    subset = {"image_dir": folder if is_address(folder) else str(Path(folder).absolute()), "recursive": True}
    return _Reader(Path(folder)).read({"datasets": [{"resolution": 1024, "subsets": [subset]}]})


class _Reader:
    """Collects problems and remarks on the way through one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self.remarks: list[str] = []

    def read(self, content: Mapping[str, Any]) -> Dataset:
        for key in content:
            if key not in ("general", "datasets"):
                hint = place_of(key) or "unknown table or key: only general and datasets stand here"
                self._wrong(shown_key(key), hint)
        general = self._table(content.get("general") or {}, DatasetKeys, "[general]")
        drafts: list[_Draft] = []
        for number, (where, table) in enumerate(self._list(content.get("datasets"), "datasets", "")):
            inherited = {**general, **self._table(table, DatasetKeys, where, skip="subsets")}
            bucketing = self._bucketing(inherited, where)
            drafts += self._subsets(table.get("subsets"), inherited, bucketing, number, where)
        names = self._subset_names(drafts)
        subsets = () if self.problems else tuple(map(self._subset, drafts, names))
        if self.problems:
            raise ParameterError("\n".join(self.problems))
        return Dataset(path=self.path, subsets=subsets, remarks=tuple(dict.fromkeys(self.remarks)))

    def _wrong(self, where: str, what: str) -> None:
        self.problems.append(f"{self.path}: {where}: {what}")

    def _subsets(
        self, tables: Any, inherited: Mapping[str, Any], bucketing: Bucketing | None, number: int, where: str
    ) -> Iterator["_Draft"]:
        seen: set[str] = set()
        for here, table in self._list(tables, "datasets.subsets", f"{where} "):
            values = {**inherited, **self._table(table, SubsetKeys, here)}
            source = values.get("metadata_file") or values.get("image_dir")
            if not source:
                self._wrong(here, "image_dir: is missing: name the folder of the pictures")
                continue
            if source in seen and "name" not in values:
                self.remarks.append(
                    f"{here}: {source} stands in this dataset already and is left out, as sd-scripts does; "
                    "give the subset a name to use the pictures twice"
                )
                continue
            seen.add(source)
            yield _Draft(keys=Keys.model_construct(**values), bucketing=bucketing, dataset=number, where=here)

    def _list(self, tables: Any, what: str, prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yields each table of an array of tables with the words that name it; a missing array is a problem."""
        if not isinstance(tables, list) or not tables:
            single = f", in double brackets, not [{what}]" if isinstance(tables, Mapping) else ""
            self._wrong(f"{prefix}[[{what}]]", f"there must be at least one such table{single}")
            return
        for number, table in enumerate(tables, start=1):
            where = f"{prefix}[[{what}]] {number}"
            if isinstance(table, Mapping):
                yield where, table
            else:
                self._wrong(where, f"must be a table, not {type(table).__name__}")

    def _table(self, table: Any, kind: type[BaseModel], where: str, skip: str = "") -> dict[str, Any]:
        """Returns the checked values of one table; what cannot be used becomes a problem."""
        if not isinstance(table, Mapping):
            self._wrong(where, f"must be a table, not {type(table).__name__}")
            return {}
        given = {key: value for key, value in table.items() if key != skip and value is not None}
        keys, wrong = check_table(kind, given, explain=place_of)
        if keys is None:
            keys, _ = check_table(kind, {key: given[key] for key in given if key not in wrong}, explain=place_of)
        for problem in wrong.values():
            self._wrong(where, problem)
        values = {key: getattr(keys, key) for key in given if key not in wrong}
        told = {key: remark(key, value) for key, value in values.items()}
        self.remarks += [f"{where}: {key}: {words}" for key, words in told.items() if words]
        return values

    def _bucketing(self, values: Mapping[str, Any], where: str) -> Bucketing | None:
        """Returns the sizes of one dataset, adjusted to the step as sd-scripts adjusts them."""
        size = values.get("resolution")
        if size is None:
            if not any("resolution" in problem for problem in self.problems):
                self._wrong(where, "resolution: is missing: write resolution = 1024, say")
            return None
        bucketing = Bucketing(width=size[0], height=size[1], **_picked(Bucketing, Keys.model_construct(**values)))
        if bucketing.enable_bucket:
            return self._adjusted(bucketing, where, given=values)
        if any(side % SIDE_STEP_PX for side in size):
            near = [max(1, round(side / SIDE_STEP_PX)) * SIDE_STEP_PX for side in size]
            self._wrong(
                where,
                f"resolution = {list(size)}: without enable_bucket both sides must be multiples of {SIDE_STEP_PX}: "
                f"write {near}, or enable_bucket = true",
            )
        return bucketing

    def _adjusted(self, bucketing: Bucketing, where: str, *, given: Container[str]) -> Bucketing:
        steps = bucketing.bucket_reso_steps
        if steps % SIDE_STEP_PX:
            self._wrong(
                where,
                f"bucket_reso_steps = {steps}: must be a multiple of {SIDE_STEP_PX}, as the model works on 8 x 8 "
                "pixels per latent and 2 x 2 latents per token",
            )
            return bucketing
        low = bucketing.min_bucket_reso // steps * steps
        high = -(-bucketing.max_bucket_reso // steps) * steps
        told = {
            name: f"{name} = {getattr(bucketing, name)}{'' if name in given else ' (the default)'}"
            for name in ("min_bucket_reso", "max_bucket_reso")
        }
        for name, used in (("min_bucket_reso", low), ("max_bucket_reso", high)):
            if getattr(bucketing, name) != used:
                self.remarks.append(f"{where}: {told[name]} is taken as {used}, a multiple of the step {steps}")
        shortest, longest = sorted((bucketing.width, bucketing.height))
        if low > shortest or low == 0:
            self._wrong(
                where,
                f"{told['min_bucket_reso']}: must be at least the step {steps} and at most the shorter side of the "
                f"resolution, {shortest}",
            )
        if high < longest:
            limit = f"must be at least the longer side of the resolution, {longest}"
            self._wrong(where, f"{told['max_bucket_reso']}: {limit}")
        return replace(bucketing, min_bucket_reso=low, max_bucket_reso=high)

    def _subset(self, draft: "_Draft", name: str) -> Subset:
        assert draft.bucketing is not None, "a dataset without resolution is a problem"
        keys = draft.keys
        own = {
            "name": name,
            "dataset": draft.dataset,
            "image_dir": self._place(draft),
            "metadata_file": self._path(keys.metadata_file),
            "conditioning_data_dir": self._path(keys.conditioning_data_dir),
            "caption_extensions": keys.caption_extension,
            "caption_cache": self._path(keys.caption_cache),
            "captions": CaptionRules(**_picked(CaptionRules, keys)),
            "bucketing": draft.bucketing,
            "validation_seed": keys.validation_seed or 0,
            "diff_output_preservation": keys.custom_attributes.get(PRESERVATION, False),
        }
        return Subset(**_picked(Subset, keys) | own)

    def _place(self, draft: "_Draft") -> Path | Remote | None:
        """Returns where the pictures lie, which may be in a bucket."""
        value = draft.keys.image_dir
        if value is None or not is_address(value):
            return self._path(value)
        if not value.startswith("s3://") or not value.removeprefix("s3://").strip("/"):
            self._wrong(draft.where, f"image_dir = {value!r}: of addresses, s3://BUCKET/... is read")
        if draft.keys.metadata_file is not None:
            self._wrong(
                draft.where,
                "metadata_file: lists files of a folder: captions of pictures in a bucket lie beside them",
            )
        return Remote(value.rstrip("/"))

    def _path(self, value: str | None) -> Path | None:
        """Returns a path of the file: from the file's folder, or from the current one if it exists only there."""
        if value is None:
            return None
        path = Path(value).expanduser()
        beside = self.path.parent / path
        return path if not beside.exists() and path.exists() else beside

    def _subset_names(self, drafts: Sequence["_Draft"]) -> list[str]:
        """Returns a name for every subset: its own, else its folder's, with -2, -3 and so on where that is taken."""
        taken: set[str] = set()
        for draft in drafts:
            if (name := draft.keys.name) is not None:
                if name in taken:
                    self._wrong(draft.where, f"name = {name!r}: another subset has this name")
                taken.add(name)
        names = []
        for draft in drafts:
            name = draft.keys.name
            if name is None:
                stem, number = _folder_name(draft), 2
                name = stem
                while name in taken:
                    name, number = f"{stem}-{number}", number + 1
                taken.add(name)
            names.append(name)
        return names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A subset's own and inherited values before it has its name."""

    keys: Keys
    bucketing: Bucketing | None
    dataset: int
    where: str


def _picked(kind: type, keys: Keys) -> dict[str, Any]:
    """Returns the values of the keys that a dataclass has under the same names."""
    return {field.name: getattr(keys, field.name) for field in fields(kind) if field.name in Keys.model_fields}


def _folder_name(draft: _Draft) -> str:
    folder, listed = draft.keys.image_dir, draft.keys.metadata_file
    path = Path(folder) if folder is not None else Path(listed or "").with_suffix("")
    name = path.name or path.resolve().name or "pictures"
    if name.lower().endswith(CONTAINER_ENDINGS):  # of a pattern, what stands before its first sign
        name = re.split(r"[*?\[{]", Path(name).stem)[0].strip("-_.") or path.parent.name
    return name or "pictures"
