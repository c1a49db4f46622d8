"""A stage's report tells of the last call that made something; a refused one has a report of its own."""

import errno
import json
from pathlib import Path

import pytest

from sd3pipe.console import StageReport
from sd3pipe.errors import ExitCode, InputError, StorageError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def call(out, *, error=None, begins=False, **values):
    with StageReport("stage", path=out.with_name(f"{out.name}.report.json"), inputs={}) as report:
        report.update(**values)
        if begins:
            report.begin()
        if error:
            raise error


def reports(out):
    return {path.name: json.loads(path.read_text()) for path in out.parent.iterdir()}


def test_a_first_refusal_is_the_report(out):
    with pytest.raises(InputError):
        call(out, error=InputError("no such file"))
    (report,) = reports(out).values()
    assert (report["exit_code"], report["error"], report["began"]) == (ExitCode.INPUT, "no such file", False)


def test_a_file_that_may_not_be_read_is_an_input_that_cannot_be_used(out):
    with pytest.raises(PermissionError):
        call(out, error=PermissionError(errno.EACCES, "Permission denied", "a.safetensors"))
    (report,) = reports(out).values()
    assert report["exit_code"] == ExitCode.INPUT
    assert report["error"] == "a.safetensors: cannot be read (Permission denied)"


def test_a_second_refusal_replaces_the_first(out):
    for message in ("first", "second"):
        with pytest.raises(InputError):
            call(out, error=InputError(message))
    assert [report["error"] for report in reports(out).values()] == ["second"]


def test_a_refusal_leaves_the_report_of_work_until_the_next_work(out):
    call(out, rows=3)
    before = (out.parent / "out.report.json").read_bytes()
    with pytest.raises(InputError):
        call(out, error=InputError("no such file"), rows=0)
    assert (out.parent / "out.report.json").read_bytes() == before
    assert reports(out)["out.refused.report.json"]["error"] == "no such file"
    call(out, rows=4)
    assert {name: report["rows"] for name, report in reports(out).items()} == {"out.report.json": 4}


def test_work_that_fails_has_the_report_to_itself(out):
    call(out, rows=3)
    with pytest.raises(StorageError):
        call(out, error=StorageError("disk full"), begins=True)
    (report,) = reports(out).values()
    assert report["exit_code"] == ExitCode.STORAGE and "began" not in report


def test_a_damaged_report_is_left_alone(out):
    (out.parent / "out.report.json").write_text("{")
    with pytest.raises(InputError):
        call(out, error=InputError("no such file"))
    assert (out.parent / "out.report.json").read_text() == "{"
    assert json.loads((out.parent / "out.refused.report.json").read_text())["error"] == "no such file"


@pytest.mark.parametrize("out", [".", "..", "a"])
def test_a_report_beside_the_current_folder_can_be_written(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError), StageReport("export", Path(f"{out}.report.json"), {}):
        raise InputError("refused")
    assert Path(f"{out}.report.json").exists()
