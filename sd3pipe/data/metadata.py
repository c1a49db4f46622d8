"""Reads metadata files, and puts other captions into them.

They are sd-scripts' .json and .jsonl, and the file_name/text records of imagefolder datasets.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.data.dataset_file import Subset
from sd3pipe.data.folders import PICTURE_ENDINGS, CaptionError, FoundFile, normalised
from sd3pipe.data.places import Place
from sd3pipe.documents import MOST_LIST_BYTES, DocumentError, parse_json, read_text
from sd3pipe.files import nearest_path
from sd3pipe.remote import Remote

_PATH_FIELDS = ("image_path", "file_name")
_TEXT_FIELDS = ("caption", "text")
WORDS = (*_TEXT_FIELDS, "tags")  # the fields whose words make a caption
_ANYTHING = TypeAdapter(Any)


def metadata_entries(subset: Subset) -> list[FoundFile]:
    """Returns the pictures that a metadata file lists, in the order of their names. Raises CaptionError."""
    file = subset.metadata_file
    assert file is not None
    assert not isinstance(subset.image_dir, Remote), "a dataset file with both is refused"
    if subset.image_dir is not None and not subset.image_dir.is_dir():
        raise CaptionError(f"{subset.image_dir}: there is no such folder{nearest_path(subset.image_dir)}")
    problems: list[str] = []
    entries: dict[str, FoundFile] = {}
    times: Counter[str] = Counter()
    for where, name, record in _records(read_metadata(file), file):
        if not isinstance(name, str) or "\0" in name:
            problems.append(f"{where}: must name a picture ({' or '.join(_PATH_FIELDS)})")
            continue
        if not isinstance(record, Mapping):
            problems.append(f'{where}: must be a table, as {{"{_TEXT_FIELDS[0]}": "a cat"}} is')
            continue
        if None in record:  # where csv puts what stands behind the last column
            problems.append(
                f"{where}: has more values than the first line has names: put a text with commas into quotes"
            )
            continue
        caption = caption_of(record, subset)
        if caption is None:
            problems.append(
                f"{where}: {name!r} has neither caption nor tags that are text (it has {', '.join(record)})"
            )
            continue
        path, problem = _locate(name, subset, file)
        times[name] += 1
        entries[name] = FoundFile(
            place=Place(path),
            name=name,
            caption=caption or None,
            caption_path=file if caption else None,
            problem=problem,
            listed=times[name],
        )
    if problems:
        raise CaptionError("\n".join(problems[:20]))
    return [entries[name] for name in sorted(entries)]


def words_in(content: str, file: Path) -> dict[str, dict[str, Any]]:
    """Returns the fields with words of each picture that a metadata file of this content lists. Raises CaptionError."""
    return {
        name: {field: record[field] for field in WORDS if record.get(field) is not None}
        for _, name, record in _records(content, file)
        if isinstance(name, str) and isinstance(record, Mapping)
    }


def with_words(content: str, file: Path, words: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the content with other fields of words for some pictures; all else in it stays. Raises CaptionError."""
    _check_ending(file)
    ending = file.suffix.lower()
    if ending == ".json":
        table = parse_json(content, _ANYTHING, str(file))
        changed = {name: _other_words(name, record, words) for name, record in table.items()}
        return json.dumps(changed, ensure_ascii=False, indent=2) + "\n"
    if ending == ".csv":
        table, out = csv.DictReader(io.StringIO(content)), io.StringIO()
        records = [_other_words(_first(record, _PATH_FIELDS), record, words) for record in table]
        writer = csv.DictWriter(out, table.fieldnames or (), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue()
    lines = content.split("\n")
    for number, line in enumerate(lines):
        record = parse_json(line, _ANYTHING, f"{file}: line {number + 1}") if line.strip() else {}
        name = _first(record, _PATH_FIELDS)
        if name in words:
            lines[number] = json.dumps(_other_words(name, record, words), ensure_ascii=False)
    return "\n".join(lines)


def caption_field(words: Mapping[str, Any]) -> str:
    """Returns the field in which a picture's caption belongs that has none; `words` are the fields that it has."""
    return next((field for field in WORDS if field in words), "text")


def caption_of(record: Mapping[str, Any], subset: Subset) -> str | None:
    """Returns caption and tags in one text as sd-scripts joins them; None if both are missing or no text."""
    separator = subset.captions.caption_separator
    caption, tags = _first(record, _TEXT_FIELDS), record.get("tags")
    if isinstance(tags, list):
        tags = separator.join(str(tag) for tag in tags)
    texts = [part for part in (caption, tags) if part is not None]
    if not texts or not all(isinstance(part, str) for part in texts):
        return None
    caption, tags = normalised(caption or ""), normalised(tags or "").replace("\n", separator)
    if not caption or not tags:
        return caption or tags
    lines = [line for line in caption.split("\n") if line.strip()] if subset.captions.enable_wildcard else [caption]
    return "\n".join(f"{line}{separator}{tags}" for line in lines)


def _other_words(name: Any, record: Any, words: Mapping[str, Mapping[str, Any]]) -> Any:
    if name not in words:
        return record
    others = {field: value for field, value in record.items() if field not in WORDS or field in words[name]}
    return {**others, **words[name]}


def read_metadata(file: Path) -> str:
    """Returns the content of a metadata file. Raises CaptionError."""
    try:
        return read_text(file, most_bytes=MOST_LIST_BYTES)
    except DocumentError as error:
        raise CaptionError(str(error)) from error


def _check_ending(file: Path) -> None:
    if file.suffix.lower() not in (".json", ".jsonl", ".csv"):
        raise CaptionError(f"{file}: a metadata_file ends in .json, .jsonl or .csv")


def _records(text: str, file: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yields (place in the file, picture name, fields). Raises CaptionError."""
    _check_ending(file)
    ending = file.suffix.lower()
    try:
        if ending == ".json":
            content = parse_json(text, _ANYTHING, str(file))
            if not isinstance(content, Mapping):
                raise CaptionError(f"{file}: must be a table from picture names to captions and tags")
            for name, record in content.items():
                yield f"{file}: {name!r}", name, record
        elif ending == ".jsonl":
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    record = parse_json(line, _ANYTHING, f"{file}: line {number}")
                    yield f"{file}: line {number}", _first(record, _PATH_FIELDS), record
        else:
            for record in (table := csv.DictReader(io.StringIO(text))):
                yield f"{file}: line {table.line_num}", _first(record, _PATH_FIELDS), record
    except csv.Error as error:
        raise CaptionError(f"{file}: is not valid CSV: {error}") from error
    except DocumentError as error:
        raise CaptionError(str(error)) from error


def _first(record: Any, fields: tuple[str, ...]) -> Any:
    if not isinstance(record, Mapping):
        return None
    return next((record[field] for field in fields if record.get(field) is not None), None)


def _locate(name: str, subset: Subset, file: Path) -> tuple[Path, str | None]:
    """Returns the file of a listed picture: as named, or below image_dir or the metadata file, or with an ending."""
    folders = [folder for folder in (subset.image_dir, file.parent) if isinstance(folder, Path)]
    candidates = [folder / name for folder in folders]
    if subset.image_dir is None:
        candidates.append(Path(name))
    for candidate in candidates:
        if candidate.is_file():
            return candidate, None
    for candidate in candidates:
        for ending in PICTURE_ENDINGS:
            for spelled in (ending, ending.upper()):
                with_ending = candidate.parent / (candidate.name + spelled)
                if with_ending.is_file():
                    return with_ending, None
    return candidates[0], f"there is no such file (listed in {file.name})"
