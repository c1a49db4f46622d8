"""`sd3pipe doctor`: on one screen, what this machine has and what a stage would miss."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from sd3pipe.console import readable_bytes, say_json, say_table, version
from sd3pipe.cores import usable_cores
from sd3pipe.device import has_nvidia_card
from sd3pipe.errors import InputError
from sd3pipe.files import free_bytes
from sd3pipe.models.tokenizer_folders import find_tokenizers
from sd3pipe.params.doctor import DoctorParams

Verdict = Literal["ok", "note", "problem"]

_COLOURS: dict[str, str] = {"ok": "green", "note": "yellow", "problem": "red"}
_ROOMY_DISK_BYTES = 20e9  # a text cache of 5,000 captions and its latents
_ROOMY_RAM_BYTES = 12e9  # T5-XXL in 16 bit, 9.5 GB, and the process


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the screen."""

    what: str
    verdict: Verdict
    text: str


def main(params: DoctorParams) -> None:
    """Prints the findings as a table, or as JSON."""
    findings = [
        _versions(),
        _device(),
        _precision(),
        _memory(),
        _disk(params.caches or Path.cwd()),
        _tokenizers(params.tokenizers, params.model),
        _bitsandbytes(),
        _dvc(),
    ]
    if params.json_output:
        say_json([asdict(finding) for finding in findings])
        return
    say_table([(finding.what, finding.verdict, finding.text) for finding in findings], _COLOURS)


def _versions() -> Finding:
    build = "CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    text = f"sd3pipe {version()}, Python {platform.python_version()}, torch {torch.__version__} ({build} build)"
    return Finding(what="versions", verdict="ok", text=text)


def _device() -> Finding:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        text = ", ".join(f"{card.name} with {readable_bytes(card.total_memory)}" for card in cards)
        return Finding(what="device", verdict="ok", text=text)
    if has_nvidia_card():
        text = "an NVIDIA card that this torch cannot use: install a CUDA build as pytorch.org/get-started says"
        return Finding(what="device", verdict="problem", text=text)
    if torch.backends.mps.is_available():
        text = "a Mac's GPU: `--device mps` takes it, which nobody has tried; auto takes the CPU"
        return Finding(what="device", verdict="note", text=text)
    text = f"CPU only, {usable_cores()} cores: good for the encode stages and the demo, slow for training"
    return Finding(what="device", verdict="note", text=text)


def _precision() -> Finding:
    if not torch.cuda.is_available():
        return Finding(what="precision", verdict="ok", text="float32, bfloat16")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Finding(what="precision", verdict="ok", text="bfloat16 (mixed_precision auto takes it)")
    text = "no bfloat16 on this card: mixed_precision auto takes fp16 with loss scaling"
    return Finding(what="precision", verdict="note", text=text)


def _memory() -> Finding:
    total = _ram_bytes()
    if total is None:
        return Finding(what="memory", verdict="note", text="the system does not say how much memory there is")
    roomy = total >= _ROOMY_RAM_BYTES
    text = readable_bytes(total) + ("" if roomy else ": less than T5-XXL takes in 16 bit; use the fp8 file for --t5xxl")
    return Finding(what="memory", verdict="ok" if roomy else "note", text=text)


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _disk(folder: Path) -> Finding:
    free = free_bytes(folder.absolute())
    roomy = free >= _ROOMY_DISK_BYTES
    text = f"{readable_bytes(free)} free for {folder}" + ("" if roomy else ": `sd3pipe plan` tells what caches weigh")
    return Finding(what="disk", verdict="ok" if roomy else "note", text=text)


def _tokenizers(folder: Path | None, model: str | None) -> Finding:
    beside = Path(model) if model and Path(model).exists() else Path.cwd()  # a hub repository is not asked here
    try:
        found = find_tokenizers(folder=folder, model=beside)
    except InputError as error:
        return Finding(what="tokenizers", verdict="note", text=str(error))
    places = sorted({str(path.parent) for path in found.values()})
    return Finding(what="tokenizers", verdict="ok", text=", ".join(places))


def _dvc() -> Finding:
    in_same_folder = Path(sys.executable).with_name("dvc").exists()
    if in_same_folder or shutil.which("dvc"):
        return Finding(what="dvc", verdict="ok", text="`dvc repro` can run the pipeline")
    return Finding(
        what="dvc", verdict="note", text="not installed; `sd3pipe run` does without: pip install 'sd3pipe[dvc]'"
    )


def _bitsandbytes() -> Finding:
    what, purpose = "bitsandbytes", "8-bit optimizers and nf4/int8 bases"
    if importlib.util.find_spec(what) is None:
        return Finding(what=what, verdict="note", text=f"not installed; it brings {purpose}")
    usable = "" if torch.cuda.is_available() else " (most of them need a CUDA device)"
    return Finding(what=what, verdict="ok", text=f"{importlib.metadata.version(what)}: {purpose}{usable}")
