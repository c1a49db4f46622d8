"""Whatever is wrong with a file that a command reads, the command ends in a documented exit code that is not 1, soon.

Every case is a function of its number: 2 damaged versions of each kind of file here, 100 with `make test-all`.
"""

import json
import os
import resource
import shutil
import signal
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support import damage as d
from support.photographs import write_dataset_file, write_photographs
from support.tiny_base import write_tiny_base

from sd3pipe.cache.manifest import read_manifest
from sd3pipe.cache.zarr_group import arrays_hash, read_array
from sd3pipe.cli import run
from sd3pipe.errors import ExitCode, InputError
from sd3pipe.fingerprint import hash_file

FEW, MANY = 2, 100
MOST_SECONDS, MOST_BYTES = 10, 1_000_000_000
HANGS_SECONDS = 100  # of a clock, not of a processor: others may be at work here
FINE = {code.value for code in ExitCode} - {ExitCode.BUG}
NAMES = ("chelsea.png", "coffee.png")
QUICK = ("--threads", "1", "--device", "cpu")

Words = list[object]
TRAIN_TOML = """\
learning_rate = 3e-3
lr_scheduler = "cosine"
lr_warmup_steps = 1
network_alpha = 1.0
max_grad_norm = 1.0
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.1"]
seed = 3
training_shift = "auto"
time_limit = "20m"
output_name = "name"
[subsets.pictures]
num_repeats = 1
loss_weight = 1.0
"""
PROJECT_TOML = '[paths]\ndataset = "dataset.toml"\nmodel = "base.safetensors"\ncaches = "caches"\n'
PROMPTS_TOML = '[prompt]\nwidth = 64\nheight = 64\n[[prompt.subset]]\nprompt = "a cat"\nseed = 7\nsample_steps = 1\n'
PROMPTS_JSON = [{"prompt": "a cat", "width": 64, "height": 64, "seed": 7, "sample_steps": 1}]
GUI = {
    "pretrained_model_name_or_path": "base.safetensors", "train_data_dir": "pictures", "max_resolution": "64,64",
    "epoch": 2, "learning_rate": 1e-4, "network_dim": 4, "LoRA_type": "Standard", "sd3_checkbox": True, "seed": 7,
    "additional_parameters": "--huber_c 0.2", "network_args": "", "sample_prompts": "a cat --w 64",
}  # fmt: skip
CONFIG_TOML = (
    'train_data_dir = "pictures"\nresolution = "64,64"\nnetwork_dim = 4\nnetwork_args = ["rank_dropout=0.1"]\n'
)
PROMPTS = "a cat --w 64 --h 64 --d 7 --s 1\na dog --n a cat --l 4 --w 64 --h 64 --s 1\n"


@dataclass(frozen=True)
class Project:
    """A small project; its model and tokenizers lie in it, too."""

    folder: Path

    def words(self, command: str) -> Words:
        """Returns the command line of a stage as it was run once."""
        folder = self.folder
        caches, drawn = folder / "caches", folder / "caches-drawn" / "prompts"
        model = ["--model", folder / "base.safetensors"]
        texts = ["encode-text", *model, "--tokenizers", folder / "tokenizers", "--t5xxl-max-token-length", 16]
        dataset = ["--dataset", folder / "dataset.toml"]
        return {
            "encode-latents": ["encode-latents", *model, *dataset, "--out", caches / "latents", *QUICK],
            "encode-text": [*texts, *dataset, "--out", caches / "text", *QUICK],
            "encode-prompts": [*texts, "--sample-prompts", folder / "prompts.txt", "--out", drawn, *QUICK],
            "train": [
                "train", *model, "--text", caches / "text", "--latents", caches / "latents", "--out", folder / "run",
                "--network-dim", 1, "--stale-ok", "--no-torch-compile", "--max-train-steps", 2, *QUICK,
            ],
            "sample": ["sample", *model, "--prompts", drawn, "--out", folder / "drawn", *QUICK],
            "export": [
                "export", "--adapter", folder / "run", "--format", "comfyui", "--out", folder / "out.safetensors",
            ],
            "report": ["report", folder / "run", "--out", folder / "page.html"],
        }[command]  # fmt: skip


def quiet(words: Words) -> int:
    return run([str(word) for word in words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Project:
    """A project that was encoded, trained, drawn with and exported."""
    folder = tmp_path_factory.mktemp("fuzz")
    base = write_tiny_base(folder / "base", depth=1, t5_storage="fp8_scaled")
    made = Project(folder / "project")
    made.folder.mkdir()
    shutil.copy(base.model, made.folder / "base.safetensors")
    shutil.copytree(base.tokenizers, made.folder / "tokenizers")
    pictures = write_photographs(made.folder / "pictures", NAMES, 64)
    records = [{"file_name": str(pictures / name), "text": f"a {name}"} for name in NAMES]
    (made.folder / "listed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_dataset_file(made.folder / "dataset.toml", pictures, resolution=64)
    write_dataset_file(made.folder / "listed.toml", pictures, resolution=64, extra='metadata_file = "listed.jsonl"')
    write_dataset_file(made.folder / "table.toml", pictures, resolution=64, extra='metadata_file = "listed.json"')
    write_dataset_file(made.folder / "columns.toml", pictures, resolution=64, extra='metadata_file = "listed.csv"')
    table = {str(pictures / name): {"caption": f"a {name}", "tags": ["one", "two"]} for name in NAMES}
    (made.folder / "listed.json").write_text(json.dumps(table))
    columns = "".join(f"{pictures / name},a {name}\n" for name in NAMES)
    (made.folder / "listed.csv").write_text(f"file_name,text\n{columns}")
    dataset = tomllib.loads((made.folder / "dataset.toml").read_text())
    (made.folder / "dataset.json").write_text(json.dumps(dataset))
    (made.folder / "prompts.txt").write_text(PROMPTS)
    (made.folder / "prompts.toml").write_text(PROMPTS_TOML)
    (made.folder / "prompts.json").write_text(json.dumps(PROMPTS_JSON))
    (made.folder / "gui.json").write_text(json.dumps(GUI))
    (made.folder / "config.toml").write_text(CONFIG_TOML)
    (made.folder / "train.toml").write_text(TRAIN_TOML)
    (made.folder / "project.toml").write_text(PROJECT_TOML)
    for name in ("encode-latents", "encode-text", "encode-prompts", "train", "sample", "export"):
        assert quiet(made.words(name)) == 0
    shutil.copy(made.folder / "out.safetensors", made.folder / "foreign.safetensors")
    return made


Reads = Callable[[Project, Path], Words]  # of a project and the damaged file


@dataclass(frozen=True)
class Kind:
    """A kind of file: which files of a project are it, how they are damaged, and which commands read them."""

    files: str  # a glob in the project
    damages: tuple[d.Damage, ...]
    reads: tuple[Reads, ...]
    after: Callable[[Path], None] = field(default=lambda file: None)  # what makes the damage count


def stage(name: str, *more: object) -> Reads:
    return lambda project, file: [*project.words(name), *more]


def on_cache(*words: object) -> Reads:
    """Returns a command about the cache that a file belongs to."""
    return lambda project, file: [
        *words, next(parent for parent in file.parents if parent.parent.name.startswith("caches"))
    ]  # fmt: skip


def on_file(*words: object) -> Reads:
    return lambda project, file: [*words, file]


def with_file(name: str, option: str) -> Reads:
    return lambda project, file: [*project.words(name), option, file]


def with_dataset(name: str) -> Reads:
    return lambda project, file: [*project.words("encode-text"), "--dataset", file.with_name(name)]


def translation(project: Project, file: Path) -> Words:
    return ["from-kohya", file, "--out", file.with_name("translated")]


def name_anew(file: Path) -> None:
    """Lets state.json say what the damaged file beside it is, as one without a digest may."""
    state_file = file.with_name("state.json")
    state = json.loads(state_file.read_text())
    del state["digest"]
    state["files"][file.name] = {"bytes": file.stat().st_size, "blake3": hash_file(file)}
    state_file.write_text(json.dumps(state))


def name_index_anew(file: Path) -> None:
    """Gives the index with a damaged array the hash that it has, where it can be read at all."""
    folder = file.parent.parent
    cache = folder.parent.parent
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    try:
        arrays = {name: read_array(lambda part: (folder / part).read_bytes(), name, "") for name in names}
        manifest = read_manifest(cache / "manifest.json")
    except InputError:
        return
    assert manifest is not None
    digest = arrays_hash(arrays)
    (cache / "manifest.json").write_text((cache / "manifest.json").read_text().replace(manifest.index, digest))
    folder.rename(folder.with_name(f"{digest}.zarr"))


def forget_pictures(latents: Path) -> None:
    """Lets the pictures be decoded again."""
    shutil.rmtree(latents.parent.parent / "pictures")


LS, VERIFY = on_cache("cache", "ls"), on_cache("cache", "verify")
TRAIN, TRAIN_ON = stage("train"), stage("train", "--max-train-steps", 3)
DECODE = stage("sample", "--decode")
DRAW = stage("sample", "--seeds", 3)


def why(project: Project, file: Path) -> Words:
    return ["cache", "why", project.folder / "caches" / "text", "coffee.png"]


KINDS = {
    "adapter": Kind("run/final/adapter.safetensors", d.SAFETENSORS, (on_file("adapter", "inspect"), stage("export"))),
    "foreign adapter": Kind("foreign.safetensors", d.TENSORS, (
        on_file("adapter", "inspect"),
        lambda project, file: ["adapter", "convert", file, "--format", "diffusers", "--out", file.with_name("new")],
        lambda project, file: ["adapter", "resize", file, "--rank", 1, "--out", file.with_name("new")],
        with_file("train", "--network-weights"),
    )),
    "base": Kind("base.safetensors", d.SAFETENSORS, (on_file("plan", "--model"), stage("encode-latents"))),
    "tensors of the base": Kind("base.safetensors", d.TENSORS, (
        on_file("plan", "--model"), stage("encode-latents"), stage("encode-text"), TRAIN,
        lambda project, file: [*project.words("export"), "--format", "checkpoint", "--model", file],
    )),
    "tokenizers": Kind("tokenizers/*/*", (*d.BYTES, d.change_json), (stage("encode-text"),)),
    "manifest": Kind("caches*/*/manifest.json", d.JSON, (LS, VERIFY, TRAIN, stage("encode-text"), DRAW)),
    "index": Kind("caches*/*/index/*/*/*", (*d.BYTES, d.change_json), (LS, VERIFY, TRAIN)),
    "named index": Kind("caches*/*/index/*/*/c.*", d.BYTES, (VERIFY, TRAIN, DRAW, why), name_index_anew),
    "segment": Kind("caches*/*/segments/*", d.SAFETENSORS, (
        VERIFY, stage("train", "--seed", 1),
        lambda project, file: ["cache", "export", file.parent.parent, "--out", "plain.zarr"],
    )),
    "state": Kind("run/checkpoints/*/state.json", d.JSON, (TRAIN_ON, stage("export"))),
    "optimizer": Kind("run/checkpoints/*2/optimizer.safetensors", (*d.SAFETENSORS, *d.TENSORS), (TRAIN_ON,), name_anew),
    "run report": Kind("run/report.json", d.JSON, (stage("report"),)),
    "encode report": Kind("caches/*.report.json", d.JSON, (stage("report"),)),
    "export report": Kind("out.safetensors.report.json", d.JSON, (stage("export"),)),
    "inputs": Kind("run/final/inputs.json", d.JSON, (stage("report"), TRAIN)),
    "metrics": Kind("run/metrics.jsonl", d.JSON_LINES, (stage("report"), TRAIN_ON)),
    "sheet": Kind("drawn/sheet.json", d.JSON, (DECODE,)),
    "latents": Kind("drawn/latents/*", (*d.SAFETENSORS, *d.TENSORS), (DECODE,), forget_pictures),
    "drawn pictures": Kind("drawn/pictures/*", d.BYTES, (DECODE,)),
    "stage file": Kind("train.toml", d.TOML, (with_file("train", "--config"),)),
    "dataset": Kind("dataset.toml", d.TOML, (stage("encode-latents"), stage("encode-text"))),
    "prompts": Kind("prompts.txt", d.BYTES, (stage("encode-prompts"),)),
    "dataset in JSON": Kind("dataset.json", d.JSON, (with_file("encode-text", "--dataset"),)),
    "prompts in TOML": Kind("prompts.toml", d.TOML, (with_file("encode-prompts", "--sample-prompts"),)),
    "prompts in JSON": Kind("prompts.json", d.JSON, (with_file("encode-prompts", "--sample-prompts"),)),
    "metadata": Kind("listed.jsonl", d.JSON_LINES, (with_dataset("listed.toml"),)),
    "metadata in JSON": Kind("listed.json", d.JSON, (with_dataset("table.toml"),)),
    "metadata in CSV": Kind("listed.csv", d.BYTES, (with_dataset("columns.toml"),)),
    "settings of a GUI": Kind("gui.json", d.JSON, (translation,)),
    "config of sd-scripts": Kind("config.toml", d.TOML, (translation,)),
    "captions": Kind("pictures/*.txt", d.BYTES, (stage("encode-text"),)),
    "pictures": Kind("pictures/*.png", d.BYTES, (stage("encode-latents", "--max-quarantined", "1"),)),
    "notes": Kind("caches/.sd3pipe/**/*.json", d.JSON, (
        stage("encode-text"), stage("encode-latents"), TRAIN, why,
    )),
    "project": Kind("project.toml", d.TOML, (lambda project, file: ["run", "--dry-run"],)),
}  # fmt: skip


@pytest.fixture
def project(whole, tmp_path, monkeypatch) -> Project:
    """A copy of the project in the place of the whole one, whose paths stand in its files."""
    folder = tmp_path / "project"
    shutil.copytree(whole.folder, folder)
    monkeypatch.chdir(folder)
    return Project(folder)


def mend(whole: Project, project: Project) -> None:
    """Makes the copy what the whole project is; files that nobody changed are left."""
    found = {path.relative_to(project.folder) for path in project.folder.rglob("*")}
    there = {path.relative_to(whole.folder): path for path in whole.folder.rglob("*")}
    for name in sorted(found - there.keys(), reverse=True):
        path = project.folder / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, path in sorted(there.items()):
        copy = project.folder / name
        if path.is_dir():
            copy.mkdir(exist_ok=True)
        elif name not in found or stamp(copy) != stamp(path):
            copy.unlink(missing_ok=True)
            shutil.copy2(path, copy)


def stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def seconds_used() -> float:
    """Returns the processor time of this process and of its children: a clock would count what others do."""
    return sum(os.times()[:4])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_up(*_: object) -> None:
    raise TimeoutError(f"nothing after {HANGS_SECONDS} s")


def undocumented_ends(whole: Project, project: Project, name: str, numbers: range, capsys) -> list[str]:
    """Returns a line for each damage that does not end as documented, in time and within bounds."""
    kind = KINDS[name]
    wrong = []
    signal.signal(signal.SIGALRM, give_up)
    for number in numbers:
        mend(whole, project)
        files = sorted(path for path in project.folder.glob(kind.files) if path.is_file())
        file = files[number * 7 % len(files)]  # so that neighbours are damaged in turn
        how = d.damage(file, kind.damages, f"{name} {number}", tuple(files))
        kind.after(file)
        words = kind.reads[number % len(kind.reads)](project, file)
        seconds, peak = seconds_used(), peak_bytes()
        signal.alarm(HANGS_SECONDS)
        code = quiet(words)
        signal.alarm(0)
        seconds, grown = seconds_used() - seconds, peak_bytes() - peak
        said = capsys.readouterr().err.strip().splitlines()[-3:]
        if code not in FINE or seconds > MOST_SECONDS or grown > MOST_BYTES:
            wrong.append(f"{number}: {how}: {words[0]} {words[1]} -> {code}, {seconds:.1f} s, {grown:,} bytes: {said}")
    return wrong


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_ends_in_a_documented_code(whole, project, name, capsys):
    assert not undocumented_ends(whole, project, name, range(FEW), capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_end_in_documented_codes(whole, project, name, capsys):
    assert not undocumented_ends(whole, project, name, range(FEW, MANY), capsys)
