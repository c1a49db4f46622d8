"""No header, however mutated, does anything but give the tensors or one clear error."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sd3pipe.errors import InputError
from sd3pipe.tensors.header import read_header

GOOD = save(
    {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.tensor(1.0)},
    metadata={"format": "pt"},
)


def _file(folder, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_offsets_point_at_the_tensors(tmp_path):
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    tensors = read_header(path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b": ("BF16", (5,)),
        "c": ("F32", ()),
    }
    a = tensors["a.weight"]
    assert struct.unpack("<6f", GOOD[a.offset : a.offset + a.nbytes]) == (0, 1, 2, 3, 4, 5)


BAD_HEADERS = {
    "overlap": ({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, 12, "overlap or leave a gap"),
    "gap": ({"a": _entry(0, 4, [1]), "b": _entry(8, 12, [1])}, 12, "overlap or leave a gap"),
    "two names of the same bytes": ({"a": _entry(0, 4, [1]), "b": _entry(0, 4, [1])}, 4, "overlap or leave a gap"),
    "bytes and shape differ": ({"a": _entry(0, 8, [3])}, 8, "does not take 8 bytes"),
    "offsets reversed": ({"a": _entry(8, 0, [2])}, 8, "make no sense"),
    "negative shape": ({"a": _entry(0, 4, [-1, -1])}, 4, "make no sense"),
    "fractional shape": ({"a": _entry(0, 4, [1.0])}, 4, "make no sense"),
    "huge shape": ({"a": _entry(0, 4, [2**62, 2**62, 2**62])}, 4, "does not take 4 bytes"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, 8, "make no sense"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "lacks dtype, shape or data_offsets"),
    "no object": ({"a": [1, 2]}, 4, "lacks dtype, shape or data_offsets"),
    "foreign dtype": ({"a": _entry(0, 4, [1], "C64")}, 4, "is not supported"),
    "dtype is a list": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4, "is not supported"),
    "cut short": ({"a": _entry(0, 400, [100])}, 399, "cut short"),
    "bytes behind the end": ({"a": _entry(0, 4, [1])}, 5, "1 bytes too many"),
    "duplicate key": (b'{"a": {}, "a": {}}', 0, "stands in it twice"),
    "duplicate inner key": (
        b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 4]}}',
        4,
        "stands in it twice",
    ),
    "endless name": ({"joint_blocks." + "9" * 5000: _entry(0, 4, [1])}, 4, "5,013 characters long"),
    "no JSON": (b"\x80\x04pickle me", 0, "not valid JSON"),
    "not UTF-8": (b'{"\xff": {}}', 0, "not valid JSON"),
    "a list": (b"[1, 2, 3]", 0, "no JSON object"),
    "deep nesting": (b"[" * 200_000, 0, "not valid JSON"),
    "endless number": (b'{"a": ' + b"9" * 5000 + b"}", 0, "not valid JSON"),
}


@pytest.mark.parametrize("header, data_bytes, reason", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_bad_header_is_one_line_that_says_why(tmp_path, header, data_bytes, reason):
    path = _file(tmp_path, header, bytes(data_bytes))
    with pytest.raises(InputError, match=reason) as error:
        read_header(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, 1, 10**9, 2**63, 2**64 - 1])
def test_absurd_header_length_is_refused_unread(tmp_path, length):
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(InputError, match="not a safetensors file"):
        read_header(path)


def test_header_longer_than_the_file_is_called_cut_short(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(GOOD[:40])
    with pytest.raises(InputError, match="cut short"):
        read_header(path)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty"),
        (b"\x10", "not a safetensors"),
        (b"GGUF" * 9, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page"),
    ],
)
def test_short_and_foreign_files_are_named(tmp_path, content, reason):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        read_header(path)


def _mutations():
    byte_edits = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6)
    return st.tuples(byte_edits, st.integers(0, len(GOOD)), st.binary(max_size=4))


@pytest.mark.long
@settings(max_examples=400, deadline=None)
@given(_mutations())
def test_mutated_file_is_read_as_safetensors_reads_it_or_refused(tmp_path_factory, mutation):
    edits, kept, tail = mutation
    content = bytearray(GOOD)
    for position, value in edits:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(content[:kept] if not edits else content) + tail)
    try:
        tensors = read_header(path)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    _assert_as_the_library_reads_it(path, tensors)


def _assert_as_the_library_reads_it(path, tensors):
    """What is accepted must be a valid file: the library accepts it, too, and sees the same tensors."""
    try:
        with safe_open(path, "pt") as library:
            names = library.keys()
            slices = {name: library.get_slice(name) for name in names}
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        # the library also checks what nobody reads: the free-form metadata
        assert "metadata" in str(error).lower() or "invalid type" in str(error), error
        return
    assert found == {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
_headers = st.dictionaries(
    st.text(max_size=8),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]) | _json,
            "shape": st.lists(st.integers(0, 5), max_size=3) | _json,
            "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | _json,
        }
    )
    | _json,
    max_size=3,
)


@pytest.mark.long
@settings(max_examples=150, deadline=None)
@given(_headers, st.integers(0, 40))
def test_invented_header_never_raises_anything_but_an_input_error(tmp_path_factory, header, data_bytes):
    path = _file(tmp_path_factory.getbasetemp(), header, bytes(data_bytes))
    try:
        tensors = read_header(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) == data_bytes
