"""Commands that SIGKILL or SIGTERM ends at random times: the same command again ends as if nothing had happened.

The commands run in forked processes, which have torch and transformers already, so that a kill costs a moment.
"""

import importlib
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import forked
from support.comparing import folder_bytes
from support.fake_cache import captions, fill, wanted_texts
from support.photographs import write_dataset_file, write_photographs
from support.random_adapters import random_adapter
from support.random_runs import write_base_and_prompts, write_random_checkpoints
from support.tiny_base import write_tiny_base
from support.tiny_captioners import blip
from support.tiny_clip import write_tiny_clip
from support.tiny_mmdit import tiny_architecture
from support.tiny_training import make_inputs, pictures

from sd3pipe import cli
from sd3pipe.adapters.files import save_adapter
from sd3pipe.errors import ExitCode

# imported before a command's process is forked, so that it dies at work and not while it imports
PRELOADED = (
    "transformers.models.blip.modeling_blip",
    "transformers.models.blip.processing_blip",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "transformers.models.clip.image_processing_clip",
    "sd3pipe.captioning.image_text",
    "sd3pipe.commands.caption",
    "sd3pipe.commands.check_captions",
    "sd3pipe.commands.encode_latents",
    "sd3pipe.commands.encode_text",
    "sd3pipe.commands.export",
    "sd3pipe.commands.init",
    "sd3pipe.commands.judge",
    "sd3pipe.commands.train",
    "sd3pipe.encoding.latent_rows",
    "sd3pipe.encoding.text_encoding",
)
LONGEST_SECONDS = 60.0  # a process that was told to end has ended by then
STEPS = 4
CAPTIONS = 40
_STEP = f"step-{STEPS:08d}"
_RESULT_ROWS = ("/.sd3pipe/embeddings/", "/.sd3pipe/errors/")  # segments of as many as were made at a time
_ATTIC = "/attic/"  # has what was encoded before a SIGTERM, in a segment that the whole plan does not have
_OF_A_TIME = (
    ".report.json",
    "report.json",
    "stat.json",
    "weights.json",
    "last_run.json",
    "run.lock",
)  # hold times, places


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line to be run in a folder that `prepare` has filled, with which it begins and ends."""

    words: tuple[object, ...]
    prepare: Callable[[Path], object] = lambda folder: None
    extra: Callable[[str], bool] = lambda name: False  # what may be there or not, depending on when it was stopped


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    for name in PRELOADED:
        importlib.import_module(name)


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, Command]:
    folder = tmp_path_factory.mktemp("given")
    base = write_tiny_base(folder / "base", layout="separate")
    photographs = write_photographs(folder / "photographs", ("chelsea.png", "coffee.png", "rocket.jpg"), 64)
    dataset = write_dataset_file(folder / "dataset.toml", photographs, resolution=64)
    training = make_inputs(folder / "training", pictures(3))
    training.train(folder / "older" / "run", seed=7, max_train_steps=2)
    save_adapter(folder / "adapter.safetensors", random_adapter(tiny_architecture("sd35-medium"), seed=1))
    for machine, start in (("a", 0), ("b", CAPTIONS)):
        fill(folder / machine / "text", wanted_texts(captions(CAPTIONS, start)))
    fill(folder / "used" / "text", wanted_texts(captions(CAPTIONS)))
    fill(folder / "used" / "text", wanted_texts(captions(CAPTIONS, start=CAPTIONS - 5)))
    judged = folder / "judged"
    drawing = write_base_and_prompts(
        judged, "a wubble --w 32 --h 32 --s 2\na cat --w 32 --h 32 --s 2\n", cache="caches/prompts"
    )
    make_inputs(judged, pictures(4))
    write_random_checkpoints(judged / "runs/r", drawing, (10, 20))
    write_tiny_clip(folder / "clip")
    asked = make_inputs(folder / "asked", pictures(4))
    write_random_checkpoints(folder / "asked" / "runs/r", asked.model, (10, 20))
    one_thread = ("--threads", 1, "--device", "cpu")
    return {
        "train": Command(
            words=(
                "train", "--model", training.model, "--text", training.text, "--latents", training.latents,
                "--out", "runs/run", "--network-dim", 2, "--max-train-steps", STEPS, "--save-every-n-steps", 1,
                *one_thread,
            ),
            prepare=lambda out: shutil.copytree(folder / "older", out / "runs"),
            extra=lambda name: "checkpoints/" in name and _STEP not in name,
        ),
        "encode-text": Command(
            words=(
                "encode-text", "--model", base.model, *base.encoder_options(), "--dataset", dataset,
                "--out", "caches/text", "--t5xxl-max-token-length", 16, *one_thread,
            ),
            extra=lambda name: _ATTIC in name,
        ),
        "caption": Command(
            words=(
                "caption", "--images", "photographs", "--captioner", blip(folder / "blip"), "--out", "caches/captions",
                "--captioner-dtype", "float32", "--max-new-tokens", 4, "--captioner-batch-size", 1, *one_thread,
            ),
            prepare=lambda out: shutil.copytree(photographs, out / "photographs"),
            extra=lambda name: _ATTIC in name,
        ),
        "encode-latents": Command(
            words=(
                "encode-latents", "--model", base.model, "--dataset", dataset,
                "--out", "caches/latents", "--max-data-loader-n-workers", 0, *one_thread,
            ),
            extra=lambda name: _ATTIC in name,
        ),
        "export": Command(
            words=("export", "--adapter", folder / "adapter.safetensors", "--out", "cat.safetensors", *one_thread)
        ),
        "merge": Command(words=("cache", "merge", folder / "a" / "text", folder / "b" / "text", "--out", "all/text")),
        "gc": Command(
            words=("cache", "gc", "used/text"), prepare=lambda out: shutil.copytree(folder / "used", out / "used")
        ),
        "judge": Command(
            words=(
                "judge", "--model", drawing, "--adapter", "runs/r", "--prompts", "caches/prompts",
                "--latents", "caches/latents", "--judge-model", folder / "clip", "--trigger", "wubble",
                "--seeds", "1,2", "--out", "runs/r/judge", *one_thread,
            ),
            prepare=lambda out: shutil.copytree(judged, out, dirs_exist_ok=True),
            extra=lambda name: any(rows in name for rows in _RESULT_ROWS),
        ),
        "check-captions": Command(
            words=(
                "check-captions", "--model", asked.model, "--text", "caches/text", "--latents", "caches/latents",
                "--adapter", "runs/r", "--checkpoints", "all", "--draws", 2, "--out", "check.json", *one_thread,
            ),
            prepare=lambda out: shutil.copytree(folder / "asked", out, dirs_exist_ok=True),
            extra=lambda name: any(rows in name for rows in _RESULT_ROWS),
        ),
        "init": Command(
            words=(
                "init", "cat", "--model", base.model, "--images", photographs, "--trigger", "cat",
                "--tokenizers", base.tokenizers,
            ),
        ),
    }  # fmt: skip


def start(command: Command, folder: Path) -> int:
    """Returns the id of a process that runs the command line in a folder."""

    def act():
        os.chdir(folder)
        os._exit(cli.run([str(word) for word in command.words]))

    return forked.start(act)


def outcome(command: Command, folder: Path) -> dict[str, object]:
    """Returns the content of every file below a folder, but for times and what depends on the moment of a stop."""
    files = {name: data for name, data in folder_bytes(folder).items() if not command.extra(name)}
    return {name: _without_times(name, data) for name, data in files.items()}


def _without_times(name: str, data: bytes) -> object:
    if name.endswith(_OF_A_TIME):
        return None
    if name.endswith("metrics.jsonl"):
        return [{**json.loads(line), "seconds": None} for line in data.splitlines()]
    return data


def ended(process: int, seconds: float) -> int | None:
    """Returns the exit code of a process that ends within some seconds, else None."""
    end = time.monotonic() + seconds
    while (found := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            return None
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(found[1])


def finish(process: int) -> int:
    """Returns the exit code of a process that has to end soon."""
    code = ended(process, LONGEST_SECONDS)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        pytest.fail("a process that was to end goes on")
    return code


NAMES = (
    "train",
    "caption",
    "encode-text",
    "encode-latents",
    "export",
    "merge",
    "gc",
    "init",
    pytest.param("judge", marks=pytest.mark.slow),
    pytest.param("check-captions", marks=pytest.mark.slow),
)
ENDS = {
    signal.SIGKILL: (-signal.SIGKILL, ExitCode.DONE),
    # ended by the signal before anything began, or done before anything looked at it
    signal.SIGTERM: (ExitCode.STOPPED, -signal.SIGTERM, ExitCode.DONE),
}


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory) -> Callable[[str], tuple[float, dict[str, object]]]:
    """Returns how long a command takes, and what it leaves, when nothing happens to it."""
    known: dict[str, tuple[float, dict[str, object]]] = {}

    def of(name: str) -> tuple[float, dict[str, object]]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            commands[name].prepare(folder)
            began = time.monotonic()
            assert finish(start(commands[name], folder)) == ExitCode.DONE
            known[name] = time.monotonic() - began, outcome(commands[name], folder)
        return known[name]

    return of


@pytest.mark.long
@pytest.mark.parametrize(
    ("sent", "number"),
    [(signal.SIGKILL, 1), *(pytest.param(sent, 10, marks=pytest.mark.slow) for sent in ENDS)],
    ids=lambda value: getattr(value, "name", str(value)),
)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_command_again_ends_as_if_nothing_had_happened(commands, undisturbed, tmp_path, name, sent, number):
    command, (seconds, expected) = commands[name], undisturbed(name)
    chance, codes = random.Random(f"{name} {sent} {number}"), []
    for attempt in itertools.count():
        folder = tmp_path / str(attempt)
        folder.mkdir()
        command.prepare(folder)
        began, process = time.monotonic(), start(command, folder)
        if ended(process, chance.uniform(0.0, seconds)) is not None:  # the first time takes longer than later ones
            seconds = min(seconds, time.monotonic() - began)
            continue
        os.kill(process, sent)
        codes.append(finish(process))
        assert codes[-1] in ENDS[sent]
        assert finish(start(command, folder)) == ExitCode.DONE
        found = outcome(command, folder)
        assert sorted(found) == sorted(expected), f"of the exit codes {codes} after the last"
        assert found == expected, f"of the exit codes {codes} after the last"
        if len(codes) == number:
            break
