"""Makes the demo base: a tiny SD3.5-medium that draws what a prompt of the drawings' grammar says, in genuine layout.

    python scripts/make_demo_base.py [--work DIR]

writes sd3pipe/demo/base: demo-base.safetensors with MMDiT, VAE, both CLIPs and T5 under a single-file checkpoint's keys
in half precision, tokenizers/, and README.md, the model card with what was measured. Seeds are fixed; it
takes about ten minutes on two cores. Finished parts lie in the work folder, and a second run goes on from them.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from demo_base_mmdit import (
    ARCHITECTURE,
    BATCH,
    FIELDS,
    LONG_EVERY,
    STEPS,
    measure,
    split_subjects,
    train_mmdit,
)
from demo_base_text import CLIP_POSITIONS, encode, write_text_encoders
from demo_base_vae import ARCHITECTURE as VAE_ARCHITECTURE
from demo_base_vae import CROP_STEPS, DECODER_STEPS, WHOLE_STEPS, train_vae
from safetensors.torch import load_file, save_file
from torch import nn

from sd3pipe.console import setup_logging
from sd3pipe.demo.base_files import T5_LENGTH
from sd3pipe.demo.drawings import NEW_WORD, OUTLINES, RADII, WORDINGS
from sd3pipe.models.checkpoint import load_mmdit, load_vae
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.vae import VAE

TARGET = Path(__file__).resolve().parent.parent / "sd3pipe" / "demo" / "base"
FILE_NAME = "demo-base.safetensors"
log = logging.getLogger("sd3pipe.make_demo_base")


def main() -> None:
    """Trains what the work folder lacks, then writes and measures the base."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("demo-base-work"), help="folder for finished parts")
    options = parser.parse_args()
    setup_logging()
    torch.set_num_threads(1)  # threads share batches, not layers
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "text.safetensors").is_file():
        write_text_encoders(options.work)
    tell = _Teller(options.work / "log.txt")
    vae = _part(options.work / "vae.safetensors", VAE(VAE_ARCHITECTURE), lambda: train_vae(tell))
    mmdit = _part(options.work / "mmdit.safetensors", MMDiT(ARCHITECTURE), lambda: train_mmdit(options.work, vae, tell))
    write_base(options.work, vae, mmdit)
    figures = measure_base(options.work)
    tell(f"measured: {figures}")
    (TARGET / "README.md").write_text(_card(figures), encoding="utf-8")


def write_base(work: Path, vae: nn.Module, mmdit: nn.Module) -> None:
    """Writes the checkpoint in half precision, and the tokenizers beside it."""
    TARGET.mkdir(parents=True, exist_ok=True)
    tensors = load_file(work / "text.safetensors")
    for prefix, module in (("model.diffusion_model.", mmdit), ("first_stage_model.", vae)):
        tensors |= {prefix + key: value.half().contiguous() for key, value in module.state_dict().items()}
    save_file(tensors, TARGET / FILE_NAME, metadata={"format": "pt"})
    (TARGET / FILE_NAME).chmod(0o644)  # save_file leaves a file that others cannot read
    for file in sorted((work / "tokenizers").rglob("*.*")):
        copy = TARGET / "tokenizers" / file.relative_to(work / "tokenizers")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())


def measure_base(work: Path) -> dict[str, float]:
    """Returns the accuracy of the written file on the held-out prompts."""
    _, subjects = split_subjects()
    captions = [subject.caption(number % len(WORDINGS)) for number, subject in enumerate(subjects)]
    return measure(
        load_mmdit(TARGET / FILE_NAME), load_vae(TARGET / FILE_NAME), subjects, encode([*captions, ""], work)
    )


class _Teller:
    """Logs a line with the seconds so far, to the terminal and to a file."""

    def __init__(self, file: Path) -> None:
        self._file, self._start = file, time.monotonic()

    def __call__(self, line: str) -> None:
        line = f"{time.monotonic() - self._start:7.0f} s  {line}"
        log.info("%s", line)
        with open(self._file, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")


def _part(file: Path, module: nn.Module, train) -> nn.Module:
    """Returns a part from its file, or trains it and writes the file."""
    if file.is_file():
        module.load_state_dict(load_file(file))
        return module.eval().requires_grad_(False)
    trained = train()
    save_file({key: value.contiguous() for key, value in trained.state_dict().items()}, file)
    return trained


def _card(figures: dict[str, float]) -> str:
    accuracy = "\n".join(f"| {field} | {100 * figures[field]:.1f} % |" for field in FIELDS)
    return f"""# Demo base

A tiny Stable Diffusion 3.5-medium that draws simple shapes, made by `scripts/make_demo_base.py` for tests and for
`sd3pipe demo`. It is no artist: it exists so that training can be seen to work within minutes, on any machine.

| part | size |
|---|---|
| MMDiT | {ARCHITECTURE.depth} blocks, {ARCHITECTURE.width} wide, qk norm, dual attention in block 0, up to 192 px |
| VAE | 16 channels, 8 x smaller, widths {", ".join(map(str, VAE_ARCHITECTURE.level_widths))} |
| CLIP-L, CLIP-G | 64 wide, 2 layers, {CLIP_POSITIONS} tokens, random weights |
| T5 | 128 wide, 2 layers, random weights |

`{FILE_NAME}` has the keys of a public single-file checkpoint (`model.diffusion_model.`, `first_stage_model.`,
`text_encoders.`), in float16; `tokenizers/` goes with it.

## Data

Drawings made by code (`sd3pipe/demo/drawings.py`): {", ".join(OUTLINES)}; eight colours, nine backgrounds,
{" and ".join(RADII)}; 64 x 64, 96 x 64 and 64 x 96 pixels. Captions by a grammar of {len(WORDINGS)} wordings. The VAE
also saw random blobs. The word "{NEW_WORD}" is in the vocabulary, and in no caption; its shape, an hourglass, is in no
picture.

## Training

VAE: {CROP_STEPS} steps on crops, {WHOLE_STEPS} on whole pictures, {DECODER_STEPS} of the decoder alone.
MMDiT: {STEPS} steps of {BATCH} drawings with the velocity loss, logit-normal noise levels and shift 1.5; one step in
{LONG_EVERY} with T5 padded to 77 or 256 tokens, the others with {T5_LENGTH} T5 tokens. One caption
in ten is dropped.

## Accuracy

Share of 200 prompts whose subjects never occurred in training, drawn with 28 steps at scale 3 and read back by
`sd3pipe/demo/measure.py`:

| | right |
|---|---|
{accuracy}

Figures as data: `{json.dumps(figures)}`
"""


if __name__ == "__main__":
    main()
