"""`sd3pipe caption` as a user runs it: rows by what made them, files by whose words they are."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from PIL import Image
from support.command_line import report_of, sd3pipe
from support.tiny_captioners import blip

from sd3pipe.cache.verify import verify_cache
from sd3pipe.cli import run as run_command
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.scan import scan, source_files
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    return blip(tmp_path_factory.mktemp("captioner"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.effect_noise((40, 30 + number), 90).convert("RGB").save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "0.txt").write_text("a person's words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def caption(folder, captioner, capsys):
    """Runs the command on the folder; returns its report and what it printed."""

    def run(*options: object, code: int = 0, where: tuple[object, ...] = ("--images", "pictures")):
        words = ["caption", *where, "--captioner", captioner, "--out", "caches/captions", "--device", "cpu"]
        words += ["--captioner-dtype", "float32", "--max-new-tokens", "8", "--threads", "1", *options]
        assert run_command([str(word) for word in words]) == code, capsys.readouterr().err
        file = folder / "caches" / "captions.report.json"
        return (json.loads(file.read_text()) if file.exists() else {}), capsys.readouterr()

    return run


def texts(folder):
    return {file.stem: file.read_text().rstrip("\n") for file in sorted((folder / "pictures").glob("*.txt"))}


def test_missing_captions_are_written_and_a_second_call_has_nothing_to_do(folder, caption):
    report, _ = caption()
    counts = {name: report[name] for name in ("pictures", "captioned", "written", "kept_by_hand", "quarantined")}
    assert counts == {"pictures": 4, "captioned": 3, "written": 3, "kept_by_hand": 1, "quarantined": 0}
    first = texts(folder)
    assert set(first) == set("0123") and first["0"] == "a person's words" and all(first.values())
    report, printed = caption()
    assert (report["captioned"], report["reused"], report["written"]) == (0, 3, 0)
    assert "nothing to do" in printed.out and texts(folder) == first
    assert not verify_cache(folder / "caches" / "captions").problems


@pytest.mark.long
def test_other_wording_makes_no_rows_and_another_prompt_makes_all(folder, caption):
    caption()
    report, _ = caption("--trigger", "ohwx", "--suffix", "drawing")
    assert (report["captioned"], report["written"]) == (0, 3)
    assert all(
        text.startswith("ohwx, ") and text.endswith(" drawing") for name, text in texts(folder).items() if name != "0"
    )
    report, _ = caption("--prompt", "a red")
    assert (report["captioned"], report["reused"]) == (3, 0)
    assert all(text.startswith("a red") for name, text in texts(folder).items() if name != "0")
    report, _ = caption()
    assert (report["captioned"], report["reused"]) == (0, 3)


@pytest.mark.long
def test_own_untouched_captions_alone_are_written_again(folder, caption):
    caption()
    (folder / "pictures" / "1.txt").write_text("touched")
    report, printed = caption("--trigger", "ohwx")
    assert report["written"] == 2 and report["kept_by_hand"] == 2
    assert texts(folder)["1"] == "touched" and "1.txt" in printed.err
    report, _ = caption("--trigger", "zz", "--write", "missing")
    assert report["written"] == 0


def test_words_of_a_person_need_yes_and_come_back(folder, caption):
    _, printed = caption("--write", "all", code=2)
    assert "writes over 1 caption that a person wrote" in printed.err and texts(folder) == {"0": "a person's words"}
    report, _ = caption("--write", "all", "--yes")
    assert report["written"] == 4 and texts(folder)["0"] != "a person's words"
    _, printed = caption("--undo")
    assert "4 captions taken back" in printed.out and texts(folder) == {"0": "a person's words"}


@pytest.mark.long
def test_rows_alone_reach_encode_text_through_the_dataset_file(folder, caption):
    (folder / "d.toml").write_text(
        "[general]\ncaption_cache = 'caches/captions'\n[[datasets]]\nresolution = 64\n"
        "[[datasets.subsets]]\nimage_dir = 'pictures'\ncaption_prefix = 'ohwx'\n"
    )
    with pytest.raises(InputError, match=r"caches/captions: has no captions.jsonl: run `sd3pipe caption` first"):
        scan(load_dataset(folder / "d.toml"), FileStamps(folder / "s.json"))
    report, _ = caption("--write", "none", "--trigger", "ohwx", where=("--dataset", "d.toml"))
    assert (report["captioned"], report["written"]) == (4, 0) and set(texts(folder)) == {"0"}
    dataset = load_dataset(folder / "d.toml")
    found = scan(dataset, FileStamps(folder / "s.json"))
    captions = {picture.name: picture.caption for picture in found.pictures}
    assert captions["0.png"] == "a person's words" and all(captions.values())
    assert not any("ohwx" in text for text in captions.values())  # the dataset file adds it
    watched = source_files(found, dataset, captions=True).files
    assert folder / "caches" / "captions" / "captions.jsonl" in watched
    (folder / "pictures" / "2.png").rename(folder / "pictures" / "renamed.png")
    renamed = {picture.name: picture.caption for picture in scan(dataset, FileStamps(folder / "s.json")).pictures}
    assert renamed["renamed.png"] == captions["2.png"]


def test_a_dry_run_shows_words_rule_by_rule_and_writes_nothing(folder, caption):
    _, printed = caption("--dry-run", "--trigger", "ohwx")
    assert "  captioner: " in printed.out and "  trigger: ohwx, " in printed.out and "3 rows to encode" in printed.out
    assert set(texts(folder)) == {"0"} and not (folder / "caches" / "captions").exists()


def test_near_duplicates_are_told(folder, caption):
    Image.open(folder / "pictures" / "2.png").save(folder / "pictures" / "again.jpg")
    _, printed = caption("--dry-run")
    assert "2 pictures nearly the same as another: 2.png = again.jpg" in printed.err
    assert not (folder / "caches" / ".sd3pipe" / "captions" / "looks.npz").exists()
    _, printed = caption()
    assert "2.png = again.jpg" in printed.err


def test_an_unreadable_picture_is_left_out(folder, caption):
    (folder / "pictures" / "bad.png").write_bytes((folder / "pictures" / "1.png").read_bytes()[:200])
    report, _ = caption()
    assert report["quarantined"] == 1 and "bad" not in texts(folder)


def test_nothing_to_caption_is_told(folder, caption):
    for picture in (folder / "pictures").glob("*.png"):
        picture.write_bytes(b"broken")
    _, printed = caption(code=3)
    assert "none of 4 pictures can be used" in printed.err


def test_a_captioner_that_wants_to_run_code_is_refused(folder, caption, captioner, tmp_path):
    odd = tmp_path / "odd"
    shutil.copytree(captioner, odd)
    config = json.loads((odd / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "auto_map": {"AutoConfig": "odd.Config", "AutoModelForImageTextToText": "odd.Model"},
    }
    (odd / "config.json").write_text(json.dumps(config))
    (odd / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    _, printed = caption("--captioner", odd, code=3)
    assert "--trust-remote-code" in printed.err and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "options, code, problem",
    [
        (["--captioner", "nowhere"], 3, "there is no such folder"),
        (["--class-word", "man"], 2, "class_word needs the trigger"),
        (["--replace", "cat"], 2, "OLD=NEW"),
        (["--captioner-dtype", "nf4"], 2, "needs a CUDA device"),
        (["--kind", "tagger"], 3, "a tagger's folder has model.onnx"),
        (["--dataset", "d.toml"], 2, "--images and --dataset name two sets"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(caption, folder, options, code, problem):
    _, printed = caption(*options, code=code)
    assert problem in printed.err
    assert set(texts(folder)) == {"0"}


@pytest.mark.long
def test_a_call_with_nothing_to_do_imports_no_torch(folder, caption, captioner):
    caption()
    words = ["caption", "--images", "pictures", "--captioner", str(captioner), "--out", "caches/captions"]
    words += ["--captioner-dtype", "float32", "--max-new-tokens", "8"]
    program = (
        f"import sys; from sd3pipe.cli import run; code = run({words!r}); "
        "sys.exit(code or any(name in sys.modules for name in ('torch', 'transformers', 'onnxruntime')))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "nothing to do" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_kill_loses_at_most_a_segment(folder, captioner):
    for number in range(60):
        Image.effect_noise((33, 33), 40 + number).convert("RGB").save(folder / "pictures" / f"more-{number}.png")
    words = ["caption", "--images", "pictures", "--captioner", captioner, "--out", "caches/captions", "--device", "cpu"]
    words += ["--captioner-dtype", "float32", "--max-new-tokens", 8, "--captioner-batch-size", 1]
    killed = subprocess.Popen(
        [sys.executable, "-m", "sd3pipe", *map(str, words)], cwd=folder, stderr=subprocess.DEVNULL
    )
    segments = folder / "caches" / "captions" / "segments"
    while killed.poll() is None and len(list(segments.glob("*.safetensors"))) < 15:
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    there = len(list(segments.glob("*.safetensors")))
    sd3pipe(*words, cwd=folder)
    report = report_of(folder / "caches" / "captions")
    assert report["reused"] >= there >= 15 and report["captioned"] + report["reused"] == 63
    assert report["written"] == 63 and texts(folder)["0"] == "a person's words"
