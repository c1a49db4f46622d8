"""`sd3pipe doctor`: on one screen, what this machine has and what a stage would miss."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Literal

import torch

from sd3pipe.console import readable_bytes, say_json, say_table, version
from sd3pipe.cores import usable_cores
from sd3pipe.device import has_bfloat16, has_nvidia_card
from sd3pipe.errors import InputError
from sd3pipe.files import free_bytes
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.params.doctor import DoctorParams

Finding = tuple[Literal["ok", "note", "problem"], str]  # a verdict, and the words of one line of the screen

_COLOURS: dict[str, str] = {"ok": "green", "note": "yellow", "problem": "red"}
_ROOMY_DISK_BYTES = 20e9  # a text cache of 5,000 captions and its latents
_ROOMY_RAM_BYTES = 12e9  # T5-XXL in 16 bit, 9.5 GB, and the process


def main(params: DoctorParams) -> None:
    """Prints the findings as a table, or as JSON."""
    build = "CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    versions = f"sd3pipe {version()}, Python {platform.python_version()}, torch {torch.__version__} ({build} build)"
    found: dict[str, Finding] = {
        "versions": ("ok", versions),
        "device": _device(),
        "precision": _precision(),
        "memory": _memory(),
        "disk": _disk(params.caches or Path.cwd()),
        "tokenizers": _tokenizers(params.tokenizers, params.model),
        "bitsandbytes": _bitsandbytes(),
        "dvc": _dvc(),
    }
    if params.json_output:
        say_json([{"what": what, "verdict": verdict, "text": text} for what, (verdict, text) in found.items()])
    else:
        say_table([(what, *finding) for what, finding in found.items()], _COLOURS)


def _device() -> Finding:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "ok", ", ".join(f"{card.name} with {readable_bytes(card.total_memory)}" for card in cards)
    if has_nvidia_card():
        text = "an NVIDIA card that this torch cannot use: install a CUDA build as pytorch.org/get-started says"
        return "problem", text
    if torch.backends.mps.is_available():
        return "note", "a Mac's GPU: `--device mps` takes it, which nobody has tried; auto takes the CPU"
    return "note", f"CPU only, {usable_cores()} cores: good for the encode stages and the demo, slow for training"


def _precision() -> Finding:
    if not torch.cuda.is_available():
        return "ok", "float32, bfloat16"
    if has_bfloat16():
        return "ok", "bfloat16 (mixed_precision auto takes it)"
    return "note", "no bfloat16 on this card: mixed_precision auto takes fp16 with loss scaling"


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "note", "the system does not say how much memory there is"
    roomy = total >= _ROOMY_RAM_BYTES
    text = readable_bytes(total) + ("" if roomy else ": less than T5-XXL takes in 16 bit; use the fp8 file for --t5xxl")
    return "ok" if roomy else "note", text


def _disk(folder: Path) -> Finding:
    free = free_bytes(folder.absolute())
    roomy = free >= _ROOMY_DISK_BYTES
    text = f"{readable_bytes(free)} free for {folder}" + ("" if roomy else ": `sd3pipe plan` tells what caches weigh")
    return "ok" if roomy else "note", text


def _tokenizers(folder: Path | None, model: str | None) -> Finding:
    beside = Path(model) if model and Path(model).exists() else Path.cwd()  # a hub repository is not asked here
    try:
        found = find_tokenizers(folder=folder, model=beside)
    except InputError as error:
        return "note", str(error)
    places = sorted({str(path.parent) for path in found.values()})
    return "ok", ", ".join(places)


def _dvc() -> Finding:
    if Path(sys.executable).with_name("dvc").exists() or shutil.which("dvc"):
        return "ok", "`dvc repro` can run the pipeline"
    return "note", 'not installed; `sd3pipe run` does without: pip install "sd3pipe[dvc]"'


def _bitsandbytes() -> Finding:
    purpose = "8-bit optimizers and nf4/int8 bases"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "note", f"not installed; it brings {purpose}"
    usable = "" if torch.cuda.is_available() else " (most of them need a CUDA device)"
    return "ok", f"{importlib.metadata.version('bitsandbytes')}: {purpose}{usable}"
