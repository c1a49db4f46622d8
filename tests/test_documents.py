"""What lies on a disk is read whole, bounded and checked, or is one line."""

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from sd3pipe.documents import DocumentError, parse_json, parse_toml, read_data, read_json, read_text, read_toml

NUMBERS = TypeAdapter(dict[str, int])


def test_text_comes_without_mark_and_with_unix_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\nthree"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DocumentError, match="no regular file"):
        read_data(tmp_path / "pipe")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="the system has no /dev/zero")
def test_a_device_is_refused_and_not_drained(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(DocumentError, match="no regular file"):
        read_data(tmp_path / "link")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\udfff" * 3, "missing/there", "."])
def test_a_path_that_names_no_file_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(DocumentError) as caught:
        read_data(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_only_an_absent_file_counts_as_missing(tmp_path: Path) -> None:
    with pytest.raises(DocumentError) as absent:
        read_data(tmp_path / "none")
    with pytest.raises(DocumentError) as folder:
        read_data(tmp_path)
    assert (absent.value.missing, folder.value.missing) == (True, False)


def test_a_file_over_the_bound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 101)
    assert len(read_data(tmp_path / "a", most_bytes=101)) == 101
    with pytest.raises(DocumentError, match="larger than 100 bytes"):
        read_data(tmp_path / "a", most_bytes=100)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{", '{"a": "x"}', "[]", "null", '{"a": ' + "9" * 5000 + "}", '{"a": 1e999}', '{"a": NaN}']
)
def test_json_of_another_shape_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DocumentError, match=r"a\.json: "):
        read_json(tmp_path / "a.json", NUMBERS)


def test_json_keeps_names_that_are_no_utf8() -> None:
    assert parse_json(b'{"\\udc80": 1}', NUMBERS, "here") == {"\udc80": 1}
    assert parse_json(b'{"\\ud83d\\ude00": 1}', NUMBERS, "here") == {"\U0001f600": 1}


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(DocumentError, match="half a surrogate pair"):
        parse_json(b'{"\\uD83D": 1}', NUMBERS, "here")


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000, "a = 9223372036854775808", "a = [", "a"])
def test_toml_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(DocumentError, match="here: is not valid TOML"):
        parse_toml(text, "here")


def test_toml_is_read_as_tables(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("[x]\ny = 9223372036854775807\n")
    assert read_toml(tmp_path / "a.toml") == {"x": {"y": 9223372036854775807}}


@pytest.mark.parametrize("path", [r"C:\Users\me\pics", r"D:\models\sd3", r"pics\cats", r"\\server\pics\x"])
def test_a_path_as_windows_writes_it_is_told_how_to_be_written(path: str) -> None:
    with pytest.raises(DocumentError, match=r"a backslash begins an escape .* single quotes") as caught:
        parse_toml(f'[general]\nimage_dir = "{path}"\n', "here")
    assert "\n" not in str(caught.value)
    assert parse_toml(f"image_dir = '{path}'", "here") == {"image_dir": path}


def test_other_mistakes_in_toml_say_nothing_of_backslashes() -> None:
    with pytest.raises(DocumentError) as caught:
        parse_toml("a = 'x\\y'\nb = [\n", "here")
    assert "backslash" not in str(caught.value)


def test_a_path_whose_backslashes_became_control_characters_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"there is no such file \(a backslash begins an escape"):
        read_data(tmp_path / "new\tables.toml")
