"""The demo base's MMDiT: three blocks, 192 wide, one with dual attention, trained on latents and texts encoded once."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_base_text import SHORT_T5_LENGTH, encode
from demo_base_vae import SIZE_SHARES, SIZES, Log, as_pixels, set_rate
from torch import Tensor

from sd3pipe.demo.base_files import T5_LENGTH
from sd3pipe.demo.drawings import WORDINGS, Subject, all_subjects, draw
from sd3pipe.demo.measure import Reading, read_picture
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.pos_embed import scaled_table
from sd3pipe.models.vae import VAE, to_model_space
from sd3pipe.training import flow
from sd3pipe.training.sampling import (
    SamplingSettings,
    TextCondition,
    decode_pictures,
    sample_latents,
    start_noise,
)

ARCHITECTURE = MMDiTArchitecture(
    depth=3, pos_embed_max=12, pooled_width=128, context_width=128, qk_norm=True, dual_attention_blocks=(0,)
)
STEPS, BATCH = 5000, 32
FULL_TEXT_CYCLES = ((3000, 8e-4), (2400, 1e-3), (3000, 8e-4), (2400, 1e-3))  # steps and highest rate
LEARNING_RATE = 1.5e-3
EMA_DECAY, FULL_TEXT_EMA_DECAY = 0.999, 0.995
SAMPLING = flow.SigmaSampling(weighting_scheme="logit_normal", loss_form="velocity", training_shift=1.5)
CAPTION_DROPOUT = 0.1
DRAWINGS_PER_SUBJECT = (5, 2, 2)  # of each size
LONG_EVERY, LONG_LENGTHS, LONG_BATCH, LONG_CAPTIONS = 20, (77, 256), 9, 500
HELD_OUT = 200
FIELDS = ("shape", "colour", "size", "background")
GUIDED = SamplingSettings(steps=28, scale=3.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Encoded captions; the last one is empty. `numbers` are those of the captions among all training captions."""

    condition: TextCondition
    numbers: Tensor

    @property
    def empty(self) -> int:
        return len(self.numbers) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawings:
    """Latents of one size in the MMDiT's space, and the number of each one's subject."""

    latents: Tensor
    subjects: Tensor


def split_subjects() -> tuple[list[Subject], list[Subject]]:
    """Returns the subjects to train on, and those held out for measuring; no caption of the latter is ever seen."""
    subjects = all_subjects()
    order = np.random.default_rng(5).permutation(len(subjects))
    return [subjects[i] for i in order[HELD_OUT:]], [subjects[i] for i in order[:HELD_OUT]]


def train_mmdit(work: Path, vae: VAE, log: Log) -> MMDiT:
    """Returns the trained MMDiT, its weights averaged over the last steps."""
    subjects, _ = split_subjects()
    captions = [subject.caption(wording) for subject in subjects for wording in range(len(WORDINGS))] + [""]
    drawings = draw_latents(vae, subjects)
    log(f"mmdit: {len(captions)} captions, {sum(len(size.subjects) for size in drawings)} drawings")
    mmdit = initial_mmdit()
    log(f"mmdit: {sum(parameter.numel() for parameter in mmdit.parameters())} parameters")
    generator = torch.Generator().manual_seed(9)
    texts = encode_texts(captions, work, SHORT_T5_LENGTH)
    run_phase(mmdit, drawings, texts, generator, log, STEPS, LEARNING_RATE, EMA_DECAY)
    meet_full_texts(mmdit, drawings, encode_texts(captions, work, T5_LENGTH), generator, log)
    return mmdit.eval().requires_grad_(False)


def meet_full_texts(
    mmdit: MMDiT, drawings: list[Drawings], texts: list[Texts], generator: torch.Generator, log: Log
) -> None:
    """Goes on with T5's whole captions, in cycles of a falling rate, each from the average that the last one left."""
    for steps, peak in FULL_TEXT_CYCLES:
        run_phase(mmdit, drawings, texts, generator, log, steps, peak, FULL_TEXT_EMA_DECAY)


def encode_texts(captions: list[str], work: Path, t5_length: int) -> list[Texts]:
    """Returns all captions at one T5 length, then some of them at the lengths that other programs pad to."""
    order = np.random.default_rng(12).permutation(len(captions) - 1)
    some = [*order[:LONG_CAPTIONS].tolist(), len(captions) - 1]
    chosen = {t5_length: list(range(len(captions))), **dict.fromkeys(LONG_LENGTHS, some)}
    return [
        Texts(
            condition=encode([captions[number] for number in numbers], work, t5_length=length),
            numbers=torch.tensor(numbers),
        )
        for length, numbers in chosen.items()
    ]


@torch.no_grad()
def draw_latents(vae: VAE, subjects: list[Subject]) -> list[Drawings]:
    """Returns drawings of every subject at every size, encoded."""
    generator = np.random.default_rng(6)
    sizes = []
    for (height, width), count in zip(SIZES, DRAWINGS_PER_SUBJECT, strict=True):
        numbers = [number for number in range(len(subjects)) for _ in range(count)]
        pictures = np.stack(
            [draw(subjects[number], height=height, width=width, generator=generator) for number in numbers]
        )
        latents = [
            to_model_space(vae.encode(as_pixels(part))[0]) for part in np.split(pictures, range(64, len(pictures), 64))
        ]
        sizes.append(Drawings(latents=torch.cat(latents), subjects=torch.tensor(numbers)))
    return sizes


def initial_mmdit() -> MMDiT:
    """Returns an untrained MMDiT: modulation and last layer zero, as in DiT, so that blocks begin as the identity."""
    generator = torch.Generator().manual_seed(8)
    mmdit = MMDiT(ARCHITECTURE)
    mmdit.load_state_dict({key: _initial(key, shape, generator) for key, shape in ARCHITECTURE.shapes().items()})
    return mmdit.requires_grad_(True)


def measure(
    mmdit: MMDiT, vae: VAE, subjects: list[Subject], texts: TextCondition, seed: int = 1000
) -> dict[str, float]:
    """Returns the share of pictures whose shape, colour, size and background are what the prompt says.

    `texts` are the subjects' captions and, last, the empty one.
    """
    right = dict.fromkeys(FIELDS, 0)
    negative = TextCondition(context=texts.context[-1:], pooled=texts.pooled[-1:])
    for start in range(0, len(subjects), 25):
        part = slice(start, min(start + 25, len(subjects)))
        positive = TextCondition(context=texts.context[part], pooled=texts.pooled[part])
        noise = start_noise(range(seed + part.start, seed + part.stop), height_px=64, width_px=64)
        latents = sample_latents(mmdit, positive, negative, noise_BChw=noise, settings=GUIDED)
        readings: list[Reading] = [read_picture(picture) for picture in decode_pictures(vae, latents).numpy()]
        for subject, reading in zip(subjects[part], readings, strict=True):
            for field in FIELDS:
                right[field] += getattr(reading, field) == getattr(subject, field)
    return {field: count / len(subjects) for field, count in right.items()}


def run_phase(
    mmdit: MMDiT,
    drawings: list[Drawings],
    texts: list[Texts],
    generator: torch.Generator,
    log: Log,
    steps: int,
    peak: float,
    decay: float,
) -> None:
    """Trains for some steps and leaves the running average in the model."""
    optimizer = torch.optim.AdamW(mmdit.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    average = {name: parameter.detach().clone() for name, parameter in mmdit.named_parameters()}
    for step in range(steps):
        set_rate(optimizer, peak, step, steps, warmup=min(200, steps // 10 + 1))
        loss = _loss(mmdit, *_batch(drawings, texts, generator, long=step % LONG_EVERY == LONG_EVERY - 1), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mmdit.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in mmdit.named_parameters():
                average[name].lerp_(parameter, 1 - min(decay, (step + 1) / (step + 10)))
        if step % 50 == 0:
            log(f"mmdit: step {step} of {steps}, loss {loss.item():.4f}")
    mmdit.load_state_dict(average, strict=False)  # the position table is no parameter


def _batch(
    drawings: list[Drawings], texts: list[Texts], generator: torch.Generator, *, long: bool
) -> tuple[Tensor, TextCondition]:
    """Returns latents of one size and the texts that belong to them, some of them dropped."""
    size = drawings[int(torch.multinomial(torch.tensor(SIZE_SHARES), 1, generator=generator))]
    text = texts[1 + int(torch.randint(len(LONG_LENGTHS), (1,), generator=generator))] if long else texts[0]
    batch = LONG_BATCH if long else BATCH
    captions = torch.randint(text.empty, (batch,), generator=generator)
    chosen = torch.stack(
        [_drawing_of(size, int(text.numbers[caption]) // len(WORDINGS), generator) for caption in captions]
    )
    dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
    captions = torch.where(dropped, text.empty, captions)
    condition = TextCondition(context=text.condition.context[captions], pooled=text.condition.pooled[captions])
    return size.latents[chosen], condition


def _drawing_of(size: Drawings, subject: int, generator: torch.Generator) -> Tensor:
    """Returns the number of a random drawing of a subject; those of one subject lie side by side."""
    count = len(size.subjects) // (int(size.subjects[-1]) + 1)
    return subject * count + torch.randint(count, (), generator=generator)


def _loss(mmdit: MMDiT, latents_BChw: Tensor, text: TextCondition, generator: torch.Generator) -> Tensor:
    batch = len(latents_BChw)
    spread_B = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    sigmas_B = flow.sample_sigmas(spread_B, torch.ones(batch), SAMPLING)
    noise_BChw = torch.randn(latents_BChw.shape, generator=generator)
    noisy_BChw = flow.add_noise(latents_BChw, noise_BChw, sigmas_B)
    with torch.autocast("cpu", torch.bfloat16):
        velocity_BChw = mmdit(noisy_BChw, sigmas_B * flow.NUM_TIMESTEPS, text.context, text.pooled)
    return flow.loss(
        velocity_BChw, latents_BChw, noise_BChw, sigmas_B, weighting_scheme="logit_normal", loss_form="velocity"
    ).mean()


def _initial(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if key == "pos_embed":
        return scaled_table(2 * ARCHITECTURE.pos_embed_max // 3, ARCHITECTURE.width)[None]
    if len(shape) == 1:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    if "adaLN" in key or "final_layer" in key:
        return torch.zeros(shape)
    values = torch.randn(shape, generator=generator)
    if "embedder.mlp" in key:
        return 0.02 * values
    fan_in, fan_out = math.prod(shape[1:]), shape[0]
    return values * (2 / (fan_in + fan_out)) ** 0.5
