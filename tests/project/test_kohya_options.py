"""Every option of sd-scripts leaves a trace: it changes a file of the project, or a line says what becomes of it."""

import contextlib
import io
import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from sd3pipe.commands.from_kohya import main
from sd3pipe.data.dataset_file import load_dataset
from sd3pipe.data.dataset_keys import Keys
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.from_kohya import FromKohyaParams
from sd3pipe.params.resolve import resolve
from sd3pipe.params.sd_scripts import DATASET_KEYS, OPTIONS, SECRETS, answer

LIST = Path(__file__).with_name("sd_scripts_options.txt")
PARTS = [(*line.split("\t"), None)[:3] for line in LIST.read_text().splitlines()[1:]]
THEIRS = {name: (kind, default) for name, kind, default in PARTS}

# option -> value that differs from its default; a flag is given, another option is given one of its type
VALUES = {
    "dataset_config": "d.toml",
    "config_file": "c.toml",
    "train_data_dir": "others",
    "reg_data_dir": "others",
    "in_json": "meta.json",
    "conditioning_data_dir": "td",
    "resolution": "64,128",
    "face_crop_aug_range": "1.0,2.0",
    "network_weights": "old.safetensors",
    "base_weights": "old.safetensors",
    "network_args": "split_qkv=True",
    "optimizer_args": "weight_decay=0.5",
    "optimizer_type": "Lion",
    "lr_scheduler": "cosine",
    "lr_scheduler_args": "step_rules=1:2,0.1",
    "sample_prompts": "prompts.txt",
    "metadata_thumbnail": "thumbnail.png",
    "mixed_precision": "bf16",
    "loss_type": "l1",
    "weighting_scheme": "mode",
    "log_with": "wandb",
    "save_precision": "fp16",
    "resize_interpolation": "area",
    "network_module": "networks.lora",
    "save_model_as": "ckpt",
    "save_n_epoch_ratio": "3",
}
SAID_LATER = {"network_dim", "optimizer_type"}  # 4 and AdamW, where nothing is said
OF_TYPE = {"flag": "", "int": "3", "float": "0.25", "str": "word", "str*": "word", "float*": "0.25"}


BASE = ("--train_data_dir=td", "--resolution=32")
Outcome = tuple[dict[str, str], set[str]]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("here")
    for pictures in ("td/10_cat", "others/2_dog"):
        (folder / pictures).mkdir(parents=True)
        Image.new("RGB", (64, 64), (40, 90, 30)).save(folder / pictures / "0.png")
    for name in ("old.safetensors", "thumbnail.png", "meta.json"):
        (folder / name).touch()
    (folder / "prompts.txt").write_text("a cat --d 1")
    (folder / "c.toml").write_text("network_dim = 7")
    (folder / "d.toml").write_text('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "others/2_dog"\n')
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def without(here) -> Outcome:
    """What comes of a command without further options."""
    return outcome(*BASE, out="without")


def outcome(*words: str, out: str, **options: bool) -> Outcome:
    """Returns the texts of the project's files, which its stages have read, and the lines that were printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(FromKohyaParams(source=("sd3_train_network.py", *words), out=Path(out), all=True, **options))
    models = load_stage_models()
    for file in (Path(out) / "stages").glob("*.toml"):
        required = {name: "x" for name, field in models[file.stem].model_fields.items() if field.is_required()}
        resolve(models[file.stem], file.stem, required, config=file)
    texts = {str(file.relative_to(out)): file.read_text() for file in Path(out).rglob("*") if file.is_file()}
    return texts, set(printed.getvalue().splitlines())


def words_for(name: str) -> list[str]:
    kind, default = THEIRS[name]
    value = VALUES.get(name, OF_TYPE[kind.replace("int_or_float", "int").replace("Path", "str")])
    assert value != default, name
    return [f"--{name}", value] if value else [f"--{name}"]


def test_the_table_has_all_options_with_their_types_and_defaults():
    kinds = {"size": "str", "range": "str", "steps": "int_or_float", "words": "str*", "floats": "float*"}
    assert len(THEIRS) == 218
    assert set(OPTIONS) == set(THEIRS)
    for name, (kind, default) in THEIRS.items():
        row = OPTIONS[name]
        assert kinds.get(row.kind, row.kind) == kind.replace("Path", "str"), name
        if name not in SAID_LATER:
            shown = "" if row.default is None else str(row.default)
            assert shown == (default or "") or float(shown) == float(default), name


@pytest.mark.parametrize("name", THEIRS)
def test_an_option_changes_a_file_or_prints_a_line(name, without):
    texts, lines = without
    changed, more = outcome(*BASE, *words_for(name), out=f"with-{name}")
    named = {line for line in more - lines if name in line}
    assert changed != texts or named
    if name in SECRETS:
        assert not any("word" in text for text in (*changed.values(), *more))
    if OPTIONS[name].fate == "acts":
        for place in OPTIONS[name].places:
            file = {"dataset": "dataset.toml", "project": "project.toml"}.get(place.file, f"stages/{place.file}.toml")
            assert changed[file] != texts[file], f"{file} says nothing of it"
    else:
        assert OPTIONS[name].fate == "read" or named


def test_all_options_together_make_a_project_that_the_stages_read(here):
    words = itertools.chain.from_iterable(
        words_for(name) for name in THEIRS if name not in ("dataset_config", "in_json")
    )
    outcome(*words, out="project")
    assert load_dataset(here / "project" / "dataset.toml").subsets


@pytest.mark.parametrize("modernize", [False, True])
@pytest.mark.parametrize("warmup", [(), ("--lr_warmup_steps", "10")])
@pytest.mark.parametrize("scheduler", ["constant", "constant_with_warmup", "cosine"])
def test_a_warm_up_that_a_schedule_has_not_is_left_out(scheduler, warmup, modernize, here):
    out = f"{scheduler}-{len(warmup)}-{modernize}"
    texts, lines = outcome(*BASE, "--lr_scheduler", scheduler, *warmup, out=out, modernize=modernize)
    train = tomllib.loads(texts["stages/train.toml"])
    assert train["lr_scheduler"] == scheduler
    if scheduler == "constant":
        assert train["lr_warmup_steps"] == 0
        assert any("constant has no warm-up" in line for line in lines) == bool(warmup)
    elif warmup:
        assert train["lr_warmup_steps"] == 10


def test_places_are_those_that_the_project_has():
    models = load_stage_models()
    for name, row in OPTIONS.items():
        assert bool(row.places) == (row.fate == "acts"), name
        assert row.places or row.text, name
        for place in row.places:
            if place.file in models:
                assert place.key in models[place.file].model_fields, name
            else:
                assert place.file == "project" or place.key in Keys.model_fields, name


def test_every_key_of_a_dataset_file_is_known_as_one():
    for key in Keys.model_fields.keys() - {"prior_loss_weight"}:  # which train has, too
        told = answer(key, None)
        assert told is not None and not told.accepted, key
    assert set(DATASET_KEYS) <= set(Keys.model_fields)
