"""Damaged versions of a file, each a function of a seed."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP: Any = "DEEP"  # stands for a nesting that no parser takes
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**63, 10**30, 1e308, float("nan"), "", "x", "\ud800", "a\0b", "../../../etc/passwd", "n" * 5000,
    [], {}, [[]], {"a": {"b": []}}, DEEP,
)  # fmt: skip
DEEP_JSON = "[" * 20_000 + "]" * 20_000

Damage = Callable[[bytes, random.Random], bytes]


def flip_bit(data: bytes, draw: random.Random) -> bytes:
    place, changed = draw.randrange(len(data)), bytearray(data)
    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flip_early_bit(data: bytes, draw: random.Random) -> bytes:
    """Flips a bit where headers are."""
    return flip_bit(data[:200], draw) + data[200:]


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def insert(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + draw.randbytes(draw.choice((1, 8, 100))) + data[place:]


def blank(data: bytes, draw: random.Random) -> bytes:
    """Fills a part with zeros, as a file system may after a power loss."""
    place = draw.randrange(len(data))
    return data[:place] + bytes(len(data) - place)


def replace(data: bytes, draw: random.Random) -> bytes:
    return draw.choice((b"\0" * 64, b"\xff" * 64, DEEP_JSON.encode(), b"null", b"[]", b'"x"', draw.randbytes(300)))


def change_json(data: bytes, draw: random.Random) -> bytes:
    """Puts an odd value in the place of one of a JSON text's, takes one out, or adds one."""
    value = json.loads(data)
    value.pop("digest", None) if isinstance(value, dict) else None  # else nothing behind it would be looked at
    places = [(parent, key) for parent, key in _places(value)]
    if not places:
        return replace(data, draw)
    parent, key = draw.choice(places)
    what = draw.randrange(8)
    if what == 0:
        del parent[key]
    elif what == 1 and isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[key] = draw.choice(ODD_VALUES)
    return json.dumps(value).replace(json.dumps(DEEP), DEEP_JSON).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(value, key), *_places(item)]]


def change_json_line(data: bytes, draw: random.Random) -> bytes:
    lines = data.splitlines()
    number = draw.randrange(len(lines))
    lines[number] = change_json(lines[number], draw)
    return b"\n".join(lines) + b"\n"


def change_safetensors_header(data: bytes, draw: random.Random) -> bytes:
    """Changes the JSON of a header and leaves the rest of the file well-formed."""
    length = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + length].rstrip(), draw)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def change_tensors(data: bytes, draw: random.Random) -> bytes:
    """Changes one tensor of a safetensors file and writes the file anew, well-formed and without metadata."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {name: (entry, data[8 + length :][slice(*entry["data_offsets"])]) for name, entry in header.items()}
    name = draw.choice(list(tensors))
    entry, values = tensors[name]
    shape, what = entry["shape"], draw.randrange(8)
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[draw.choice(("", "x", "\0", "n" * 900, f"{name}.weight", name.upper()))] = tensors.pop(name)
    elif what == 2:
        entry["shape"] = draw.choice((shape[::-1], [1, *shape], [len(values) // _item_bytes(entry)]))
    elif what == 3:
        entry["dtype"] = draw.choice([other for other, size in _ITEM_BYTES.items() if size == _item_bytes(entry)])
    elif what == 4:
        entry["shape"], values = [0, *shape[1:]], b""
    elif what == 5:
        values = b"\xff" * len(values)  # not a number
    elif what == 6:
        other = draw.choice(list(tensors))
        tensors[name], tensors[other] = tensors[other], tensors[name]
    else:
        entry["shape"], values = [*shape, 2], values * 2
    if name in tensors and what in (4, 5, 7):
        tensors[name] = (entry, values)
    return _safetensors(tensors)


_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "F8_E4M3": 1, "U8": 1, "BOOL": 1}


def _item_bytes(entry: dict[str, Any]) -> int:
    return _ITEM_BYTES[entry["dtype"]]


def _safetensors(tensors: dict[str, tuple[dict[str, Any], bytes]]) -> bytes:
    header, start = {}, 0
    for name, (entry, values) in tensors.items():
        header[name] = {**entry, "data_offsets": [start, start + len(values)]}
        start += len(values)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(values for _, values in tensors.values())


def change_toml(data: bytes, draw: random.Random) -> bytes:
    """Puts an odd value behind one of the keys, or repeats a line."""
    lines = data.decode().splitlines()
    number = draw.choice([number for number, line in enumerate(lines) if "=" in line])
    odd = ("9" * 5000, str(2**63), "-1", "1e400", "nan", '""', '"\\u0000"', "[" * 5000, "{}", "true", "[[1]]",
           '"' + "n" * 5000 + '"', '"/dev/zero"', '"\\ud800"', "[1, 'a']")  # fmt: skip
    key = lines[number].partition("=")[0].strip("# ")
    lines[number] = f"{key} = {draw.choice(odd)}"
    if draw.random() < 0.1:
        lines.insert(number, lines[number])
    return "\n".join(lines).encode("utf-8", "replace")


BYTES: tuple[Damage, ...] = (flip_bit, flip_early_bit, truncate, insert, blank, replace)
JSON: tuple[Damage, ...] = (*(change_json,) * 6, *BYTES)
JSON_LINES: tuple[Damage, ...] = (*(change_json_line,) * 6, *BYTES)
SAFETENSORS: tuple[Damage, ...] = (*(change_safetensors_header,) * 4, *BYTES)
TENSORS: tuple[Damage, ...] = (change_tensors,)
TOML: tuple[Damage, ...] = (*(change_toml,) * 6, *BYTES)


def damage(path: Path, kinds: tuple[Damage, ...], seed: str, others: tuple[Path, ...] = ()) -> str:
    """Damages a file in place and returns how."""
    draw = random.Random(seed)
    data = path.read_bytes()
    if others and draw.random() < 0.1:
        other = draw.choice(others)
        path.write_bytes(other.read_bytes())
        return f"{path.name} swapped for {other.name}"
    kind = draw.choice(kinds)
    try:
        changed = kind(data, draw)
    except (ValueError, IndexError):  # nothing of the kind is in this file
        kind, changed = replace, replace(data, draw)
    path.write_bytes(changed)
    return f"{kind.__name__} of {path.name}"
