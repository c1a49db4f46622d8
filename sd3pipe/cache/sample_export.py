"""A cache, or two joined ones, sample by sample in the formats of other engines: WebDataset, MDS and LitData."""

# L tokens, S scales of a token, G numbers that share one

import abc
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from sd3pipe import stopping
from sd3pipe.cache.join import join_pictures
from sd3pipe.cache.plain_zarr import as_utf8, described
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import SCALE, Row, latents_name, packed_names
from sd3pipe.cache.samples import COLUMNS
from sd3pipe.errors import InputError
from sd3pipe.files import atomic_folder, write_bytes, write_json
from sd3pipe.words import SampleForm

_SHARD_BYTES = 256_000_000  # of a file; MDS and LitData count in 32 bits
_NUMPY = {"F32": "float32", "F16": "float16", "BF16": "float32", "U8": "uint8", "I8": "float32"}
_JOINED = ("name", "subset", "split")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """What a sample is called and belongs to, and its tensors."""

    fields: Mapping[str, str | int]
    tensors: Mapping[str, np.ndarray]


def export_samples(cache: Path, out: Path, *, form: SampleForm, text: Path | None = None) -> int:
    """Writes a new folder of shards and returns the number of samples.

    A sample is one of the cache's; with `text`, the cache of the same pictures' texts, it has those tensors, too: the
    picture's first caption variant. bfloat16 and packed states are widened to float32. Where only some rows have a
    mask, the others get one of ones. Beside the shards lie sd3pipe.json, which says how the rows were made, and
    empty_caption.npz, the text's row for dropped captions.

    Raises InputError for a damaged cache or an `out` that exists, StaleError for caches that do not belong together,
    StorageError.
    """
    if os.path.lexists(out):
        raise InputError(f"{out} exists: remove it or choose another --out")
    readers = [CacheReader(where, verify_reads="always") for where in (cache, text) if where is not None]
    kinds = _kinds(readers)
    samples = _alone(readers[0], kinds) if text is None else _joined(readers[0], readers[1], kinds)
    with atomic_folder(out) as folder:
        shards = _FORMS[form](folder, kinds)
        for sample in samples:
            stopping.check()
            shards.add(sample)
        shards.finish()
        write_json(folder / "sd3pipe.json", [described(reader) for reader in readers])
        key = readers[-1].manifest.extra.get("empty_caption")
        if isinstance(key, str):
            np.savez(folder / "empty_caption.npz", allow_pickle=False, **_arrays(readers[-1].row(key)))
    return shards.count


def _kinds(readers: list[CacheReader]) -> dict[str, str]:
    """Returns the numpy type of each tensor. Raises InputError where rows differ."""
    kinds: dict[str, str] = {}
    for reader in readers:
        for layout in reader.index.layouts:
            dtypes = {name: dtype for name, dtype, _ in layout}
            for name in dtypes.keys() - {f"{packed}{SCALE}" for packed in packed_names(dtypes)}:
                if kinds.setdefault(name, _NUMPY[dtypes[name]]) != _NUMPY[dtypes[name]]:
                    raise InputError(f"{reader.where} holds {name} in several types: export it as zarr")
    return dict(sorted(kinds.items()))


def _alone(reader: CacheReader, kinds: Mapping[str, str]) -> Iterator[_Sample]:
    samples = reader.samples
    columns = {
        name: samples.strings(name).to_list() if column == "text" else samples.numbers(name).tolist()
        for name, column in COLUMNS[samples.kind].items()
        if column in ("text", "number")
    }
    for place, row in enumerate(samples.numbers("row").tolist()):
        named = {name: values[place] for name, values in columns.items()}
        fields = {name: as_utf8(value) if isinstance(value, str) else value for name, value in named.items()}
        yield _Sample(fields=fields, tensors=_arrays(reader.row(row), kinds))


def _joined(latents: CacheReader, text: CacheReader, kinds: Mapping[str, str]) -> Iterator[_Sample]:
    """Yields each of the latents' rows, picture by picture."""
    joined = join_pictures(latents, text)
    for picture, named in enumerate(zip(joined.names, joined.subsets, joined.splits, strict=True)):
        fields = {name: as_utf8(value) for name, value in zip(_JOINED, named, strict=True)}
        words = text.row(int(joined.captions.rows[joined.captions.starts[picture]]))
        for row in joined.latents.rows[slice(*joined.latents.starts[picture : picture + 2])].tolist():
            yield _Sample(fields=fields, tensors=_arrays({**latents.row(row), **words}, kinds))


def _arrays(row: Row, kinds: Mapping[str, str] | None = None) -> dict[str, np.ndarray]:
    """Returns a row's tensors, dense; where others have a mask, with one that leaves the loss as it is."""
    arrays = {name: tensor.numpy() for name, tensor in row.items()}
    for name in packed_names(row):
        scales_LS = arrays.pop(f"{name}{SCALE}")
        values_LSG = arrays[name].reshape(*scales_LS.shape, -1).astype(np.float32)
        arrays[name] = (values_LSG * scales_LS[..., None]).reshape(arrays[name].shape)
    if kinds and "mask" in kinds and "mask" not in arrays:
        arrays["mask"] = np.ones(arrays[latents_name(arrays)].shape[-2:], kinds["mask"])
    return arrays


class _Shards(abc.ABC):
    """Files that are filled one after the other."""

    def __init__(self, folder: Path, kinds: Mapping[str, str]) -> None:
        self.folder, self.kinds, self.count = folder, kinds, 0

    @abc.abstractmethod
    def add(self, sample: _Sample) -> None:
        """Writes a sample."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Writes what is left."""


class _Tars(_Shards):
    """Tars with KEY.json and a KEY.NAME.npy for each tensor, as WebDataset groups them by what stands before a dot."""

    tar: tarfile.TarFile | None = None

    def add(self, sample: _Sample) -> None:
        if self.tar is None or self.tar.offset > _SHARD_BYTES:
            self.finish()
            self.tar = tarfile.open(self.folder / f"{self.count:08d}.tar", "w")  # noqa: SIM115, closed by finish
        key = f"{self.count:08d}"
        _add(self.tar, f"{key}.json", json.dumps(sample.fields, sort_keys=True, ensure_ascii=False).encode())
        for name in sorted(sample.tensors):
            file = io.BytesIO()
            np.save(file, sample.tensors[name], allow_pickle=False)
            _add(self.tar, f"{key}.{name}.npy", file.getvalue())
        self.count += 1

    def finish(self) -> None:
        if self.tar is not None:
            self.tar.close()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a member that says nothing of this machine or moment."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


class _Packed(_Shards):
    """Shards as MDS and LitData have them.

    The number of samples and where each starts and the last ends, in 32 bits; for MDS the columns; then the samples,
    each the sizes in bytes of its columns, in 32 bits, and the columns.
    """

    def __init__(self, folder: Path, kinds: Mapping[str, str]) -> None:
        super().__init__(folder, kinds)
        self.encodings: dict[str, str] = {}
        self.waiting: list[bytes] = []
        self.nbytes = 0
        self.shards: list[dict[str, Any]] = []

    def add(self, sample: _Sample) -> None:
        values = {**sample.fields, **sample.tensors}
        if not self.encodings:
            self.encodings = {name: self.encoding(name, values[name]) for name in sorted(values)}
        parts = {name: self.encoded(values[name]) for name in self.encodings}
        sizes = [len(part) for name, part in parts.items() if not self.is_fixed(self.encodings[name])]
        data = b"".join([np.array(sizes, "<u4").tobytes(), *parts.values()])
        if self.waiting and self.nbytes + len(data) > _SHARD_BYTES:
            self.write()
        self.waiting.append(data)
        self.nbytes += len(data)
        self.count += 1

    def write_shard(self, name: str, columns: bytes = b"") -> int:
        """Writes what waits into a file and returns its bytes."""
        starts = np.cumsum([0, *map(len, self.waiting)]) + 4 * (len(self.waiting) + 2) + len(columns)
        numbers = np.array([len(self.waiting), *starts], "<u4").tobytes()
        write_bytes(self.folder / name, b"".join([numbers, columns, *self.waiting]))
        self.waiting, self.nbytes = [], 0
        return int(starts[-1])

    def is_fixed(self, encoding: str) -> bool:
        """Whether values of an encoding are all of a size that no sample repeats."""
        return False

    @abc.abstractmethod
    def encoding(self, name: str, value: str | int | np.ndarray) -> str:
        """Returns the format's name for values such as this."""

    @abc.abstractmethod
    def encoded(self, value: str | int | np.ndarray) -> bytes:
        """Returns a value's bytes."""

    @abc.abstractmethod
    def write(self) -> None:
        """Writes the samples that wait as a shard."""


class _MDS(_Packed):
    """Shards of mosaicml-streaming, version 2, and the index.json over them."""

    def finish(self) -> None:
        if self.waiting:
            self.write()
        write_json(self.folder / "index.json", {"version": 2, "shards": self.shards})

    def is_fixed(self, encoding: str) -> bool:
        return encoding == "int"

    def encoding(self, name: str, value: str | int | np.ndarray) -> str:
        return f"ndarray:{self.kinds[name]}" if isinstance(value, np.ndarray) else type(value).__name__

    def encoded(self, value: str | int | np.ndarray) -> bytes:
        if not isinstance(value, np.ndarray):
            return _plain(value)
        wide = int(np.searchsorted([1 << 8, 1 << 16, 1 << 32], max(value.shape), "right"))
        axes = np.array(value.shape, f"<u{1 << wide}").tobytes()
        return bytes([value.ndim << 2 | wide]) + axes + value.tobytes()

    def write(self) -> None:
        described = {
            "column_encodings": list(self.encodings.values()),
            "column_names": list(self.encodings),
            "column_sizes": [8 if self.is_fixed(encoding) else None for encoding in self.encodings.values()],
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": _SHARD_BYTES,
            "version": 2,
        }
        name, samples = f"shard.{len(self.shards):05d}.mds", len(self.waiting)
        nbytes = self.write_shard(name, json.dumps(described, sort_keys=True).encode())
        whole = {"basename": name, "bytes": nbytes, "hashes": {}}
        self.shards.append({**described, "raw_data": whole, "samples": samples, "zip_data": None})


class _LitData(_Packed):
    """Chunks of LitData's tree loader, and the index.json over them."""

    def __init__(self, folder: Path, kinds: Mapping[str, str]) -> None:
        super().__init__(folder, kinds)
        self.digest = blake3()

    def finish(self) -> None:
        if self.waiting:
            self.write()
        leaf = {"type": None, "context": None, "children_spec": []}
        names = json.dumps(list(self.encodings))
        tree = {"type": "builtins.dict", "context": names, "children_spec": [leaf] * len(self.encodings)}
        config = {
            "chunk_bytes": _SHARD_BYTES,
            "chunk_size": None,
            "compression": None,
            "data_format": list(self.encodings.values()),
            "data_spec": json.dumps([1, tree]),  # as torch.utils._pytree writes the structure of a sample
            "encryption": None,
            "item_loader": "PyTreeLoader",
        }
        # LitData keeps copies of what lies elsewhere by this text: it changes where the samples do
        index = {"chunks": self.shards, "config": config, "updated_at": self.digest.hexdigest()}
        write_json(self.folder / "index.json", index)

    def encoding(self, name: str, value: str | int | np.ndarray) -> str:
        if isinstance(value, np.ndarray):
            return "numpy" if value.ndim > 1 else f"no_header_numpy:{_LITDATA_TYPES[self.kinds[name]]}"
        return type(value).__name__

    def encoded(self, value: str | int | np.ndarray) -> bytes:
        if not isinstance(value, np.ndarray):
            return _plain(value)
        header = [_LITDATA_TYPES[str(value.dtype)], value.ndim, *value.shape] if value.ndim > 1 else []
        return np.array(header, "<u4").tobytes() + value.tobytes()

    def write(self) -> None:
        self.digest.update(b"".join(self.waiting))
        name, samples = f"chunk-0-{len(self.shards)}.bin", len(self.waiting)
        nbytes = self.write_shard(name)
        self.shards.append({"chunk_bytes": nbytes, "chunk_size": samples, "dim": None, "filename": name})


_LITDATA_TYPES = {"uint8": 4, "float16": 8, "float32": 9}  # numbers of numpy's types in its table
_FORMS: dict[SampleForm, type[_Shards]] = {"webdataset": _Tars, "mds": _MDS, "litdata": _LitData}


def _plain(value: str | int) -> bytes:
    """Returns text in UTF-8, or a number in 64 bits."""
    return value.encode() if isinstance(value, str) else np.array(value, "<i8").tobytes()
