"""Every command that reads a dataset says what it leaves out, and how much validation holds out."""

import pytest
from PIL import Image

from sd3pipe import cli
from sd3pipe.demo.base_files import MODEL, TOKENIZERS

_WEIGHTS = ["--model", str(MODEL)]
COMMANDS = {
    "encode-text": ["encode-text", *_WEIGHTS, "--tokenizers", str(TOKENIZERS), "--out", "text", "--dry-run"],
    "encode-latents": ["encode-latents", *_WEIGHTS, "--out", "latents", "--dry-run"],
    "preview": ["preview", "--out", "drawn"],
    "plan": ["plan", *_WEIGHTS],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pics", "concept"):
        (tmp_path / name).mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (99 * number, 0, 0)).save(f"pics/{number}.png")
        (tmp_path / f"pics/{number}.txt").write_text("a circle")
    (tmp_path / "concept/a.psd").write_text("")
    (tmp_path / "d.toml").write_text(
        "[[datasets]]\nresolution = 64\nvalidation_split = 0.001\n"
        '[[datasets.subsets]]\nimage_dir = "pics"\ncaption_extension = ".caption"\n'
        '[[datasets.subsets]]\nimage_dir = "concept"\n'
    )
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_is_left_out_and_held_out_is_told(folder, capsys, command):
    assert cli.run([*command, "--dataset", "d.toml"]) == 0
    said = capsys.readouterr()
    assert "subset concept has no picture that is read: 1 file (a.psd) with .psd" in said.err
    if command[0] != "encode-latents":
        assert 'caption: caption_extension = ".txt" reads them' in said.err
    if command[0] == "preview":
        assert "concept has no picture" in (folder / "drawn/index.html").read_text()
        assert "1 held out for validation" in said.out
    elif command[0] != "encode-text":
        assert "validation_split holds out 1 of 2 pictures" in said.err
