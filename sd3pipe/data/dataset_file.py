"""Reads a dataset file as sd-scripts writes it (TOML or JSON) into plain, complete descriptions of its subsets.

A value is looked up in the subset, then its dataset, then [general], then the default. Nothing here looks at pictures.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from sd3pipe.config import read_toml
from sd3pipe.data.dataset_keys import PRESERVATION, DatasetKeys, Keys, SubsetKeys, place_of, remark
from sd3pipe.documents import DocumentError, read_json
from sd3pipe.errors import ParameterError
from sd3pipe.problems import check_table, shown_key
from sd3pipe.remote import Remote, is_address

CONTAINER_ENDINGS = (".tar", ".parquet", ".arrow")  # of files that hold several pictures
MODEL_STEP_PX = 16  # the VAE divides a side by 8, the MMDiT's patches by 2 more


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
        return {
            "dataset": self.dataset,
            "num_repeats": self.num_repeats,
            "is_reg": self.is_reg,
            "prior_loss_weight": self.prior_loss_weight,
            "loss_weight": self.loss_weight,
            "caption_dropout_rate": self.caption_dropout_rate,
            "caption_dropout_every_n_epochs": self.caption_dropout_every_n_epochs,
            "diff_output_preservation": self.diff_output_preservation,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A whole dataset file. `remarks` are lines to show the user: keys that act elsewhere, subsets that are dropped."""

    path: Path
    subsets: tuple[Subset, ...]
    remarks: tuple[str, ...]


def load_dataset(path: Path) -> Dataset:
    """Returns the dataset that a file describes. Raises ParameterError with one line per problem."""
    return _Reader(path).read(_parse(path))


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
                self.problems.append(f"{self.path}: {shown_key(key)}: {hint}")
        general = self._table(content.get("general") or {}, DatasetKeys, "[general]")
        subsets = self._datasets(content.get("datasets"), general)
        if self.problems:
            raise ParameterError("\n".join(self.problems))
        return Dataset(path=self.path, subsets=tuple(subsets), remarks=tuple(dict.fromkeys(self.remarks)))

    def _datasets(self, tables: Any, general: Mapping[str, Any]) -> list[Subset]:
        drafts: list[_Draft] = []
        for number, (where, table) in enumerate(self._list(tables, "datasets", "")):
            inherited = {**general, **self._table(table, DatasetKeys, where, skip="subsets")}
            bucketing = self._bucketing(inherited, where)
            drafts += self._subsets(table.get("subsets"), inherited, bucketing, number, where)
        names = _subset_names(drafts, self.problems, self.path)
        return [] if self.problems else [self._subset(draft, name) for draft, name in zip(drafts, names, strict=True)]

    def _subsets(
        self, tables: Any, inherited: Mapping[str, Any], bucketing: Bucketing | None, number: int, where: str
    ) -> Iterator["_Draft"]:
        seen: set[str] = set()
        for here, table in self._list(tables, "datasets.subsets", f"{where} "):
            values = {**inherited, **self._table(table, SubsetKeys, here)}
            source = values.get("metadata_file") or values.get("image_dir")
            if source is None:
                self.problems.append(f"{self.path}: {here}: image_dir: is missing: name the folder of the pictures")
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
            self.problems.append(f"{self.path}: {prefix}[[{what}]]: there must be at least one such table")
            return
        for number, table in enumerate(tables, start=1):
            where = f"{prefix}[[{what}]] {number}"
            if isinstance(table, Mapping):
                yield where, table
            else:
                self.problems.append(f"{self.path}: {where}: must be a table, not {type(table).__name__}")

    def _table(self, table: Any, kind: type[BaseModel], where: str, skip: str = "") -> dict[str, Any]:
        """Returns the checked values of one table; what cannot be used becomes a problem."""
        if not isinstance(table, Mapping):
            self.problems.append(f"{self.path}: {where}: must be a table, not {type(table).__name__}")
            return {}
        given = {key: value for key, value in table.items() if key != skip and value is not None}
        keys, wrong = check_table(kind, given, explain=place_of)
        if keys is None:
            keys, _ = check_table(kind, {key: given[key] for key in given if key not in wrong}, explain=place_of)
        self.problems += [f"{self.path}: {where}: {problem}" for problem in wrong.values()]
        values = {key: getattr(keys, key) for key in given if key not in wrong}
        told = {key: remark(key, value) for key, value in values.items()}
        self.remarks += [f"{where}: {key}: {words}" for key, words in told.items() if words]
        return values

    def _bucketing(self, values: Mapping[str, Any], where: str) -> Bucketing | None:
        """Returns the sizes of one dataset, adjusted to the step as sd-scripts adjusts them."""
        size = values.get("resolution")
        if size is None:
            if not any("resolution" in problem for problem in self.problems):
                self.problems.append(f"{self.path}: {where}: resolution: is missing: write resolution = 1024, say")
            return None
        bucketing = Bucketing(width=size[0], height=size[1], **_picked(Bucketing, Keys.model_construct(**values)))
        if not bucketing.enable_bucket:
            self._check_fixed_size(bucketing, where)
            return bucketing
        return self._adjusted(bucketing, where)

    def _check_fixed_size(self, bucketing: Bucketing, where: str) -> None:
        size = (bucketing.width, bucketing.height)
        if any(side % MODEL_STEP_PX for side in size):
            near = [max(1, round(side / MODEL_STEP_PX)) * MODEL_STEP_PX for side in size]
            self.problems.append(
                f"{self.path}: {where}: resolution = {list(size)}: without enable_bucket both sides must be multiples "
                f"of {MODEL_STEP_PX}: write {near}, or enable_bucket = true"
            )

    def _adjusted(self, bucketing: Bucketing, where: str) -> Bucketing:
        steps = bucketing.bucket_reso_steps
        if steps % MODEL_STEP_PX:
            self.problems.append(
                f"{self.path}: {where}: bucket_reso_steps = {steps}: must be a multiple of {MODEL_STEP_PX}, as the "
                "model works on 8 x 8 pixels per latent and 2 x 2 latents per token"
            )
            return bucketing
        low = bucketing.min_bucket_reso // steps * steps
        high = -(-bucketing.max_bucket_reso // steps) * steps
        for name, given, used in (
            ("min_bucket_reso", bucketing.min_bucket_reso, low),
            ("max_bucket_reso", bucketing.max_bucket_reso, high),
        ):
            if given != used:
                self.remarks.append(f"{where}: {name} = {given} is taken as {used}, a multiple of the step {steps}")
        shortest, longest = sorted((bucketing.width, bucketing.height))
        if low > shortest or low == 0:
            self.problems.append(
                f"{self.path}: {where}: min_bucket_reso = {bucketing.min_bucket_reso}: must be at least the step "
                f"{steps} and at most the shorter side of the resolution, {shortest}"
            )
        if high < longest:
            self.problems.append(
                f"{self.path}: {where}: max_bucket_reso = {bucketing.max_bucket_reso}: must be at least the longer "
                f"side of the resolution, {longest}"
            )
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
            self.problems.append(
                f"{self.path}: {draft.where}: image_dir = {value!r}: of addresses, s3://BUCKET/... is read"
            )
        if draft.keys.metadata_file is not None:
            self.problems.append(
                f"{self.path}: {draft.where}: metadata_file: lists files of a folder: captions of pictures in a bucket "
                "lie beside them"
            )
        return Remote(value.rstrip("/"))

    def _path(self, value: str | None) -> Path | None:
        """Returns a path of the file: from the file's folder, or from the current one if it exists only there."""
        if value is None:
            return None
        path = Path(value).expanduser()
        beside = self.path.parent / path
        return path if not beside.exists() and path.exists() else beside


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


def _subset_names(drafts: Sequence[_Draft], problems: list[str], path: Path) -> list[str]:
    """Returns a name for every subset: its own, else its folder's, with -2, -3 and so on where that is taken."""
    taken: set[str] = set()
    for draft in drafts:
        if (name := draft.keys.name) is not None:
            if name in taken:
                problems.append(f"{path}: {draft.where}: name = {name!r}: another subset has this name")
            taken.add(name)
    names = []
    for draft in drafts:
        name = draft.keys.name
        if name is None:
            name = _unused(_folder_name(draft), taken)
            taken.add(name)
        names.append(name)
    return names


def _folder_name(draft: _Draft) -> str:
    folder, listed = draft.keys.image_dir, draft.keys.metadata_file
    path = Path(folder) if folder is not None else Path(listed or "").with_suffix("")
    name = path.name or path.resolve().name or "pictures"
    if name.lower().endswith(CONTAINER_ENDINGS):  # of a pattern, what stands before its first sign
        name = re.split(r"[*?\[{]", Path(name).stem)[0].strip("-_.") or path.parent.name
    return name or "pictures"


def _unused(stem: str, taken: set[str]) -> str:
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name


def _parse(path: Path) -> dict[str, Any]:
    """Returns the file's tables. Raises ParameterError."""
    try:
        content = read_json(path, TypeAdapter(Any)) if path.suffix.lower() == ".json" else read_toml(path)
    except DocumentError as error:
        raise ParameterError(str(error)) from error
    if not isinstance(content, dict):
        raise ParameterError(f"{path}: must hold a table with general and datasets")
    return content
