"""Every command with --out: a link is followed and stays, a pipe and a device are refused and stay."""

import importlib
import os
import pkgutil
import stat
from pathlib import Path

import pytest
from support.random_adapters import random_adapter
from support.tiny_mmdit import tiny_architecture

import sd3pipe.params
from sd3pipe.adapters.files import save_adapter
from sd3pipe.cli import run
from sd3pipe.demo.base_files import MODEL
from sd3pipe.files import followed
from sd3pipe.params.fields import Params

FILES = {
    "export": ["export", "--adapter", "a.safetensors", "--out"],
    "convert": ["adapter", "convert", "a.safetensors", "--out"],
    "resize": ["adapter", "resize", "a.safetensors", "--rank", "1", "--out"],
    "merge": ["adapter", "merge", "a.safetensors", "a.safetensors", "--out"],
    "extract": ["adapter", "extract", "--tuned", str(MODEL), "--base", str(MODEL), "--rank", "1", "--out"],
    "inspect": ["adapter", "inspect", "a.safetensors", "--picture"],
    "report": ["report", "run", "--out"],
}
FOLDERS = {
    "encode-text": ["encode-text", "--model", str(MODEL), "--dataset", "d.toml", "--out"],
    "encode-latents": ["encode-latents", "--model", str(MODEL), "--dataset", "d.toml", "--out"],
    "train": ["train", "--model", str(MODEL), "--text", "text", "--latents", "latents", "--out"],
    "sample": ["sample", "--model", str(MODEL), "--decode", "--out"],
    "preview": ["preview", "--dataset", "d.toml", "--out"],
    "cache merge": ["cache", "merge", "text", "--out"],
    "cache export": ["cache", "export", "text", "--out"],
    "export --checkpoints all": ["export", "--adapter", "run", "--checkpoints", "all", "--out"],
    "from-kohya": ["from-kohya", "k.toml", "--out"],
    "init": ["init"],
    "demo": ["demo"],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the commands read, which is the current one."""
    monkeypatch.chdir(tmp_path)
    save_adapter(Path("a.safetensors"), random_adapter(tiny_architecture("sd35-medium")))
    Path("run").mkdir()
    Path("run/report.json").write_text('{"steps": 1}')
    Path("d.toml").write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "run"\n')
    return tmp_path


def test_every_option_that_names_a_file_to_write_follows_links():
    names = [module.name for module in pkgutil.iter_modules(sd3pipe.params.__path__)]
    modules = [importlib.import_module(f"sd3pipe.params.{name}") for name in names]
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    fields = [
        field
        for kind in kinds
        if issubclass(kind, Params)
        for name, field in kind.model_fields.items()
        if name in ("out", "picture") and "ile" in (field.description or "")
    ]
    assert len(fields) >= 6
    assert all(followed.__name__ in repr((field.annotation, field.metadata)) for field in fields)


@pytest.mark.parametrize("command", [name for name in FILES if name != "extract"])
def test_a_link_is_followed(place, command):
    ending = "svg" if command == "inspect" else "safetensors"
    out, target = Path(f"link.{ending}"), Path("elsewhere") / f"target.{ending}"
    out.symlink_to(target)
    for _ in ("dangling", "to a file"):
        assert run([*FILES[command], str(out)]) == 0
        assert out.is_symlink() and target.is_file() and not target.is_symlink() and target.stat().st_size > 20
        target.write_text("older")


@pytest.mark.long
@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
def test_a_pipe_and_a_device_are_refused(place, command, capsys):
    os.mkfifo("pipe")
    Path("device").symlink_to("/dev/null")
    for name in ("pipe", "device"):
        assert run([*(FILES | FOLDERS)[command], name]) in (2, 3, 7)
        assert capsys.readouterr().err.startswith("error: ")
    assert stat.S_ISFIFO(Path("pipe").lstat().st_mode) and Path("device").is_symlink()
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode) and not list(Path("/dev").glob("null.*"))


@pytest.mark.parametrize("name", ["z.txt", "-", "v1.5"])
@pytest.mark.parametrize("command", ["export", "convert"])
def test_an_adapter_gets_a_name_that_programs_know(place, capsys, command, name):
    assert run([*FILES[command], name]) == 2
    wanted = {"z.txt": "z.safetensors"}.get(name, f"{name}.safetensors")
    assert capsys.readouterr().err.strip().endswith(f"name it {wanted}") and not Path(name).exists()
