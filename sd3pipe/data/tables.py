"""Lists the pictures and captions of Parquet files, and of the Arrow files of a `datasets` folder saved to disk.

A picture is a column of bytes, or a record {bytes, path} as the `datasets` library has it; a caption a column of
text. A value of an Arrow file lies in a row in the file; one of a Parquet file is packed with its neighbours.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sd3pipe import stopping
from sd3pipe.data.findings import Finding, finding_of
from sd3pipe.data.folders import Contents, ReadDepth, Sample, caption_keys, clean_name, normalised
from sd3pipe.data.places import ParquetCell, Span, open_container, open_parquet, pyarrow_for
from sd3pipe.errors import InputError
from sd3pipe.remote import Remote

_PICTURES = ("image", "picture", "jpg", "jpeg", "png", "webp", "bytes")  # names of columns, those looked for first
_ROWS_AT_ONCE = 16
_ARROW_FILE = b"ARROW1\0\0"  # what the file form of Arrow has before the stream form


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    picture: str  # of the bytes
    path: str | None
    texts: tuple[str, ...]  # of captions; the first that has one in a row
    others: list[str]  # with their kinds


_Row = tuple[Span | ParquetCell, Any, str | None, str | None]  # place, the bytes of the picture, its path, its caption


def read_table(file: Path | Remote, *, look: ReadDepth) -> Contents:
    """Returns the pictures of a Parquet or an Arrow file, a row each. Raises InputError.

    Of mere names a Parquet file's captions are empty.
    """
    pyarrow = pyarrow_for(file)
    form = "Parquet" if file.suffix.lower() == ".parquet" else "Arrow"
    samples: list[Sample] = []
    paths: list[str] = []
    with open_container(file) as handle:
        try:
            columns, rows = _parquet(handle, file, look) if form == "Parquet" else _arrow(handle, file)
            for part, data, path, text in rows:
                stopping.check()
                known: Finding = {}
                if look == "all" and data is None:
                    where = f": it names the file {path} instead" if path else ""
                    known = {"unreadable": f"the row holds no bytes of a picture{where}"}
                elif look == "all":
                    known = finding_of(bytes(data), Path(path or "").suffix)
                caption = None if text is None else normalised(text)
                samples.append(Sample(name="", part=part, known=dict(known), caption=caption))
                paths.append(path or "")
        except (pyarrow.ArrowException, OSError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{file}: cannot be read as {form} after row {len(samples)} ({reason}): copy or write it again"
            ) from error
    # under the names of their files where all have one of their own, else under their numbers
    names = [clean_name(path.replace("\\", "/").rpartition("/")[2]) for path in paths]
    if "" in names or len({*names}) < len(names):
        names = [f"{number:08d}" for number in range(len(samples))]
    named = [replace(sample, name=name) for sample, name in zip(samples, names, strict=True)]
    return Contents(samples=sorted(named, key=lambda sample: sample.name), keys=[] if columns.texts else columns.others)


def _columns(schema: Any, file: Path | Remote) -> _Columns:
    """Returns the columns that count. Raises InputError where none holds pictures."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    def place(field: Any) -> tuple[int, bool]:
        name = field.name.lower()
        return _PICTURES.index(name) if name in _PICTURES else len(_PICTURES), not types.is_struct(field.type)

    kinds = {field.name: field.type for field in schema}
    texts = tuple(key for key in caption_keys(kinds) if is_text(kinds[key]))
    for field in sorted(schema, key=place):
        picture = path = None
        if is_bytes(field.type):
            picture = field.name
        elif types.is_struct(field.type):
            parts = {part.name: part.type for part in field.type}
            picture = f"{field.name}.bytes" if "bytes" in parts and is_bytes(parts["bytes"]) else None
            path = f"{field.name}.path" if "path" in parts and is_text(parts["path"]) else None
        if picture is None:
            continue
        for name in (field.name, *texts):
            if schema.names.count(name) > 1:
                raise InputError(f"{file}: has {schema.names.count(name)} columns called {name}: rename all but one")
        others = [f"{name} ({kind})" for name, kind in kinds.items() if name != field.name]
        return _Columns(picture=picture, path=path, texts=texts, others=others)
    there = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    raise InputError(
        f"{file}: has no column of pictures: an `image` of bytes, or of {{bytes, path}}, is looked for; it has {there}"
    )


def _parquet(handle: BinaryIO, file: Path | Remote, look: ReadDepth) -> tuple[_Columns, Iterator[_Row]]:
    """Returns the columns of a Parquet file, and the rows of all its row groups: None for what is not asked for."""
    parquet = open_parquet(handle, file)
    columns = _columns(parquet.schema_arrow, file)
    names = (columns.picture if look == "all" else None, columns.path, *columns.texts)
    wanted = [name for name in names if name] if look != "names" else []

    def rows() -> Iterator[_Row]:
        for group in range(parquet.num_row_groups):
            if not wanted:
                text = "" if columns.texts else None
                for row in range(parquet.metadata.row_group(group).num_rows):
                    yield ParquetCell(group, row, columns.picture), None, None, text
                continue
            row = itertools.count()
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=wanted):
                arrays = [_array(batch, name) for name in names]
                for place in range(batch.num_rows):
                    data, path, *texts = (None if array is None else array[place].as_py() for array in arrays)
                    yield ParquetCell(group, next(row), columns.picture), data, path, _first(texts)

    return columns, rows()


def _arrow(handle: BinaryIO, file: Path | Remote) -> tuple[_Columns, Iterator[_Row]]:
    """Returns the columns of a stream of record batches, and its rows."""
    pyarrow = pyarrow_for(file)
    source = pyarrow.PythonFile(handle)
    if source.read(len(_ARROW_FILE)) != _ARROW_FILE:
        source.seek(0)
    schema = pyarrow.ipc.read_schema(pyarrow.ipc.read_message(source))
    columns = _columns(schema, file)

    def rows() -> Iterator[_Row]:
        while True:
            try:
                message = pyarrow.ipc.read_message(source)
            except EOFError:
                return
            if message.type != "record batch":
                raise InputError(
                    f"{file}: holds a {message.type}, which is not read: save it as the `datasets` library does"
                )
            batch = pyarrow.ipc.read_record_batch(message, schema)
            first = source.tell() - message.body.size
            values, *others = (_array(batch, name) for name in (columns.picture, columns.path, *columns.texts))
            for row, (start, value) in enumerate(_values(values, message.body, file)):
                path, *texts = (None if array is None else array[row].as_py() for array in others)
                yield Span(first + start, len(value or b"")), value, path, _first(texts)

    return columns, rows()


def _first(texts: Iterable[str | None]) -> str | None:
    return next((text for text in texts if text is not None), None)


def _values(array: Any, body: Any, file: Path | Remote) -> Iterator[tuple[int, memoryview | None]]:
    """Yields where each value of a column of bytes starts in the body of its record batch, and its bytes."""
    from pyarrow import types

    if types.is_binary_view(array.type):
        raise InputError(f"{file}: holds its pictures as {array.type}, so that no row can be read alone: save it plain")
    _, ends, data = array.buffers()
    if len(array) == array.null_count:
        yield from [(0, None)] * len(array)
        return
    start = data.address - body.address
    if not 0 <= start <= start + data.size <= body.size:
        raise InputError(f"{file}: its record batches are compressed, so that no row can be read alone: save it plain")
    kind = np.int64 if types.is_large_binary(array.type) else np.int32
    bounds = np.frombuffer(ends, kind)[array.offset : array.offset + len(array) + 1].tolist()
    for row, (first, last) in enumerate(itertools.pairwise(bounds)):
        yield start + first, memoryview(data)[first:last] if array[row].is_valid else None


def _array(batch: Any, name: str | None) -> Any:
    """Returns a column, or a part of one of records; None without a name."""
    if name is None or name in batch.schema.names:
        return None if name is None else batch.column(name)
    column, _, part = name.rpartition(".")
    found = batch.column(column)
    return found.flatten()[found.type.get_field_index(part)]
