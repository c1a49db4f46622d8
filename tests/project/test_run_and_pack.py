"""`run` knows the order and the paths of a project; `pack` lists what a training machine needs."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import forked
from support.photographs import write_photographs
from support.tiny_base import write_tiny_base

from sd3pipe.config import read_project
from sd3pipe.errors import InputError
from sd3pipe.file_stamps import FileStamps
from sd3pipe.project.amounts import known_texts, read_amounts
from sd3pipe.project.inputs import check_stages
from sd3pipe.stages import command_words, stages_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "project.toml").write_text(
        '[paths]\nmodel = "m.safetensors"\nt5xxl = "t5.safetensors"\ndataset = "dataset.toml"\n'
        'sample_prompts = "prompts.txt"\ncaches = "caches"\nrun = "runs/cat"\nexport = "exports/cat.safetensors"\n'
        'loras_dir = "loras"\n'
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose model, encoders and pictures are there."""
    folder = tmp_path_factory.mktemp("run")
    base = write_tiny_base(folder / "models", variant="sd35-medium", layout="separate")
    tokenizers = base.tokenizers.rename(folder / "vocabularies")  # beside the model they would be found unnamed
    write_photographs(folder / "photos", ("chelsea.png", "coffee.png"), 96)
    forked(
        "init", "my cat", "--model", base.model, "--images", "photos", "--tokenizers", tokenizers,
        "--resolution", 64, cwd=folder,
    )  # fmt: skip
    return folder / "my cat"


@contextlib.contextmanager
def edited(file: Path, old: str, new: str) -> Iterator[None]:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    try:
        yield
    finally:
        file.write_text(text)


def line_of(file: Path, key: str) -> str:
    return next(line for line in file.read_text().splitlines(keepends=True) if line.startswith(key))


def test_stages_stand_in_order_with_their_paths(folder):
    paths = read_project(folder).paths
    stages = {stage.name: command_words(stage, paths) for stage in stages_of(paths)}
    assert list(stages) == ["encode-text", "encode-prompts", "encode-latents", "train", "export"]
    assert stages["encode-text"] == [
        "encode-text", "--model", "m.safetensors", "--t5xxl", "t5.safetensors",
        "--dataset", "dataset.toml", "--out", "caches/text",
    ]  # fmt: skip
    assert stages["encode-prompts"][-4:] == ["--sample-prompts", "prompts.txt", "--out", "caches/prompts"]
    assert stages["train"][-4:] == ["--out", "runs/cat", "--loras-dir", "loras"]
    assert stages["export"][1:3] == ["--adapter", "runs/cat"]


def test_missing_paths_are_all_named(folder):
    (folder / "project.toml").write_text('[paths]\nmodel = "m"\n')
    assert forked("run", cwd=folder, expect=2).stderr.count("is missing") == 4


def test_a_folder_that_is_gone_is_told_in_one_line(folder):
    subsets = "".join(f"[[datasets.subsets]]\nimage_dir = '{name}'\n" for name in ("none", "nowhere"))
    (folder / "dataset.toml").write_text(f"[[datasets]]\nresolution = 64\n{subsets}")
    project = read_project(folder)
    read_amounts.cache_clear()  # for a command's life
    with pytest.raises(InputError) as caught:
        check_stages(project, [stage for stage in stages_of(project.paths) if stage.name == "encode-latents"])
    assert "none: there is no such folder" in str(caught.value).splitlines()


def test_dry_run_shows_what_differs_from_the_project_and_what_is_ahead(project):
    done = forked("run", "--dry-run", cwd=project)
    parts = [line.partition("#") for line in done.stdout.splitlines()]
    assert [command.strip() for command, _, _ in parts] == [
        "$ sd3pipe encode-text --dataset dataset.toml",
        "$ sd3pipe encode-text --sample-prompts sample_prompts.txt",
        "$ sd3pipe encode-latents",
        "$ sd3pipe train",
        "$ sd3pipe export",
    ]
    facts = [facts.strip() for _, _, facts in parts]
    assert facts[0].startswith("3 captions, at most ") and facts[1].startswith("16 prompts, at most ")
    assert facts[2] == "2 pictures, at most 8.19 KB"  # 64 x 64 pixels: 64 latents of 32 numbers in 16 bit
    assert facts[3].startswith("500 steps")
    assert "disk: at most " in done.stderr and str(project) not in done.stdout + done.stderr
    assert not (project / "caches").exists()


def test_captions_ahead_are_those_that_differ(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, caption in {"a": "a cat", "b": " a cat\n", "c": "a dog", "d": None}.items():
        (pictures / f"{name}.png").touch()
        if caption is not None:
            (pictures / f"{name}.txt").write_text(caption)
    dataset, stamps = tmp_path / "dataset.toml", FileStamps(tmp_path / "stat.json")
    for keys, texts in (
        ("", 3),
        ("class_tokens = 'a dog'", 3),
        ("shuffle_caption = true", 1 + 4 * 2),
        ("caption_cache = 'captions'", 1 + 2 + 1),
    ):
        file = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 'pictures'\n{keys}\n"
        dataset.write_text(file)
        known, drawn = known_texts(dataset, caption_variants=2, stamps=stamps)
        assert len(known) + drawn == texts


def test_wanted_stages_are_shown_alone(project):
    done = forked("run", "--dry-run", "encode-latents", "train", "encode-text", cwd=project)
    assert [line.split()[2] for line in done.stdout.splitlines()] == ["encode-text", "encode-latents", "train"]


def test_earlier_reports_tell_the_time(project):
    (project / "caches").mkdir()
    (project / "caches" / "latents.report.json").write_text('{"encoded": 10, "seconds": 50.0}')
    run = project / "runs" / "my_cat"
    (run / "checkpoints" / "step-00000200").mkdir(parents=True)
    (run / "checkpoints" / "step-00000200" / "adapter.safetensors").write_text("x")
    (run / "report.json").write_text('{"seconds_per_step": 0.1}')
    try:
        lines = forked("run", "--dry-run", "encode-text", "encode-latents", "train", cwd=project).stdout.splitlines()
    finally:
        shutil.rmtree(project / "caches")
        shutil.rmtree(project / "runs")
    assert "about 10.0 s as last time" in lines[1]
    assert "500 steps, 200 saved, about 30.0 s as last time" in lines[2]


def test_every_problem_of_every_stage_is_named_before_anything_is_encoded(project):
    stages = project / "stages"
    with (
        edited(stages / "train.toml", "network_dim = 16", "network_dmi = 16"),
        edited(stages / "export.toml", 'dtype = "auto"', 'dtype = "fp61"'),
        edited(stages / "encode_text.toml", "t5xxl_max_token_length = 256", "t5xxl_max_token_length = 9999"),
        edited(project / "dataset.toml", "num_repeats", "num_repaets"),
    ):
        done = forked("run", cwd=project, expect=2)
    for name in ("t5xxl_max_token_length = 9999", "network_dmi", "dtype = fp61", "num_repaets"):
        assert done.stderr.count(name) == 1
    assert len(done.stderr.splitlines()) == 4 and "did you mean network_dim?" in done.stderr
    assert not done.stdout and not (project / "caches").exists()


def test_what_is_not_found_is_named_by_its_key(project):
    file = project / "project.toml"
    with edited(file, line_of(file, "tokenizers"), ""), edited(file, line_of(file, "clip_g"), ""):
        done = forked("run", cwd=project, expect=3)
    assert "paths.clip_g is to be filled in" in done.stderr and "paths.tokenizers is to be filled in" in done.stderr
    assert not (project / "caches").exists()


def test_a_model_that_is_gone_is_told_once(project):
    file = project / "project.toml"
    with edited(file, line_of(file, "model"), 'model = "gone.safetensors"\n'):
        (line,) = forked("run", cwd=project, expect=3).stderr.splitlines()
    assert "paths.model: gone.safetensors: there is no such file" in line


def test_a_model_that_cannot_be_read_is_told_once(project):
    file = project / "project.toml"
    (project / "m.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with edited(file, line_of(file, "model"), 'model = "m.safetensors"\n'):
        (line,) = forked("run", cwd=project, expect=3).stderr.splitlines()
    assert "paths.model: m.safetensors: is a Git LFS pointer" in line


def test_train_alone_wants_caches_that_are_there(project):
    done = forked("run", "train", cwd=project, expect=3)
    assert "caches/text: is not there yet: `sd3pipe run encode-text` makes it" in done.stderr
    assert "caches/latents: is not there yet" in done.stderr


@pytest.mark.long
def test_looking_ahead_needs_no_torch_and_little_more_than_starting(project):
    code = (
        "import sys, time; begun = time.process_time(); from sd3pipe.cli import run; start = time.process_time(); "
        "code = run(['run', '--dry-run']); spent = (time.process_time() - start) / (start - begun); "
        "assert code == 0 and 'torch' not in sys.modules; assert spent < 15, spent"  # 3 to 6
    )
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True)


@pytest.mark.long
def test_a_stage_that_fails_gives_its_exit_code(project):
    (project / "caches").write_text("in the way")
    try:
        done = forked("run", cwd=project, expect=7)
    finally:
        (project / "caches").unlink()
    assert "encode-text ended with exit code 7" in done.stderr


def test_no_project_is_told(tmp_path):
    assert "sd3pipe init" in forked("run", cwd=tmp_path, expect=2).stderr


def test_pack_lists_caches_and_parameters(folder):
    for name in ("text", "latents"):
        (folder / "caches" / name / "segments").mkdir(parents=True)
        (folder / "caches" / name / "manifest.json").write_text("{}")
        (folder / "caches" / name / "segments" / "a.safetensors").write_bytes(bytes(2000))
    (folder / "stages").mkdir()
    (folder / "stages" / "train.toml").write_text("")
    names = forked("pack", "--list-only", cwd=folder).stdout.split()
    assert names == [
        "project.toml", "stages/train.toml",
        "caches/text/manifest.json", "caches/text/segments/a.safetensors",
        "caches/latents/manifest.json", "caches/latents/segments/a.safetensors",
    ]  # fmt: skip
    assert "6 files, 4." in forked("pack", cwd=folder).stdout


def test_pack_shows_the_ten_largest_and_all_on_demand(folder):
    for name in ("text", "latents"):
        (folder / "caches" / name / "segments").mkdir(parents=True)
        (folder / "caches" / name / "manifest.json").write_text("{}")
        for number in range(8):
            (folder / "caches" / name / "segments" / f"{number}.safetensors").write_bytes(bytes(1000 * number))
    lines = forked("pack", cwd=folder).stdout.splitlines()
    assert lines[0] == "the 10 largest of 19 files (--all lists them all):"
    assert [line.split()[0] for line in lines[1:11]] == [str(number) for number in (7, 7, 6, 6, 5, 5, 4, 4, 3, 3)]
    assert lines[11].startswith("19 files, 56.")
    assert len(forked("pack", "--all", cwd=folder).stdout.splitlines()) == 19 + 2


def test_pack_sends_what_lies_outside_the_project_to_the_same_place(folder):
    project = folder / "a project"
    project.mkdir()
    text = (folder / "project.toml").read_text().replace('"m.safetensors"', f'"{folder}/my models/m.safetensors"')
    (project / "project.toml").write_text(text.replace('caches = "caches"', 'caches = "../shared"'))
    for name in ("text", "latents"):
        (folder / "shared" / name).mkdir(parents=True)
        (folder / "shared" / name / "manifest.json").write_text("{}")
    (folder / "my models").mkdir()
    (folder / "my models" / "m.safetensors").write_bytes(bytes(2000))
    said = forked("pack", "--with-model", cwd=project).stdout.splitlines()
    assert said[-2].endswith("sd3pipe pack --list-only --with-model | rsync -a --files-from=- . HOST:FOLDER")
    sent = f'rsync -aR {folder}/shared/text {folder}/shared/latents "{folder}/my models/m.safetensors" HOST:/'
    assert said[-1] == f"and what lies outside it, to the same places there: {sent}"
    listed = forked("pack", "--list-only", "--with-model", cwd=project)
    assert listed.stdout.split("\n") == ["project.toml", ""] and sent in listed.stderr.replace("\n", " ")


def test_pack_asks_for_the_caches_first(folder):
    assert "encode" in forked("pack", cwd=folder, expect=3).stderr
