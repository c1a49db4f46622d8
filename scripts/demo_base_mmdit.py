"""The demo base's MMDiT: three blocks, 192 wide, one with dual attention, trained on latents and texts encoded once."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from demo_base_shards import THREADS, Average, Part, Shards
from demo_base_text import encode
from demo_base_vae import SIZE_SHARES, SIZES, Log, as_pixels, set_rate
from torch import Tensor, nn

from sd3pipe.demo.base_files import T5_LENGTH
from sd3pipe.demo.drawings import WORDINGS, Subject, all_subjects, draw
from sd3pipe.demo.measure import Reading, read_picture
from sd3pipe.diffusion.sampler import (
    SamplingSettings,
    TextCondition,
    decode_pictures,
    sample_latents,
    start_noise,
)
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.pos_embed import scaled_table
from sd3pipe.models.vae import VAE, to_model_space
from sd3pipe.rules.flow import NUM_TIMESTEPS, SigmaSampling
from sd3pipe.training import flow

ARCHITECTURE = MMDiTArchitecture(
    depth=3, pos_embed_max=12, pooled_width=128, context_width=128, qk_norm=True, dual_attention_blocks=(0,)
)
STEPS, BATCH = 3600, 32
LEARNING_RATE, WARMUP = 1.5e-3, 200
EMA_DECAY = 0.995
SAMPLING = SigmaSampling(weighting_scheme="logit_normal", loss_form="velocity", training_shift=1.5)
CAPTION_DROPOUT = 0.1
DRAWINGS_PER_SUBJECT = (4, 1, 1)  # of each size
LONG_EVERY, LONG_LENGTHS, LONG_BATCH, LONG_CAPTIONS = 25, (77, 256), 8, 500
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
    """Latents of one size in the MMDiT's space; the `count` drawings of one subject lie side by side."""

    latents: Tensor
    count: int


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
    log(f"mmdit: {len(captions)} captions, {sum(len(size.latents) for size in drawings)} drawings")
    texts = encode_texts(captions, work)
    mmdit = initial_mmdit()
    log(f"mmdit: {sum(parameter.numel() for parameter in mmdit.parameters())} parameters")
    generator = torch.Generator().manual_seed(9)
    optimizer = torch.optim.AdamW(
        mmdit.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    shards, average = Shards(mmdit, _loss), Average(mmdit, EMA_DECAY)
    for step in range(STEPS):
        set_rate(optimizer, LEARNING_RATE, step, STEPS, warmup=WARMUP)
        batch = _batch(drawings, texts, generator, long=step % LONG_EVERY == LONG_EVERY - 1)
        loss = shards.backward(list(zip(*(values.chunk(THREADS) for values in batch), strict=True)))
        torch.nn.utils.clip_grad_norm_(mmdit.parameters(), 1.0)
        optimizer.step()
        average.update()
        if step % 50 == 0:
            log(f"mmdit: step {step} of {STEPS}, loss {loss:.4f}")
    average.take_over()
    return mmdit.eval().requires_grad_(False)


def encode_texts(captions: list[str], work: Path) -> list[Texts]:
    """Returns all captions at the base's own T5 length, then some at the lengths that other programs pad to."""
    order = np.random.default_rng(12).permutation(len(captions) - 1)
    some = [*order[:LONG_CAPTIONS].tolist(), len(captions) - 1]
    chosen = {T5_LENGTH: list(range(len(captions))), **dict.fromkeys(LONG_LENGTHS, some)}
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
        sizes.append(Drawings(latents=torch.cat(latents), count=count))
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


def _batch(drawings: list[Drawings], texts: list[Texts], generator: torch.Generator, *, long: bool) -> Part:
    """Returns latents of one size, noise, noise levels, and context and pooled of the texts, some of them dropped."""
    size = drawings[int(torch.multinomial(torch.tensor(SIZE_SHARES), 1, generator=generator))]
    text = texts[1 + int(torch.randint(len(LONG_LENGTHS), (1,), generator=generator))] if long else texts[0]
    batch = LONG_BATCH if long else BATCH
    captions = torch.randint(text.empty, (batch,), generator=generator)
    subjects = text.numbers[captions] // len(WORDINGS)
    latents = size.latents[subjects * size.count + torch.randint(size.count, (batch,), generator=generator)]
    captions[torch.rand(batch, generator=generator) < CAPTION_DROPOUT] = text.empty
    spread_B = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    sigmas_B = flow.sample_sigmas(spread_B, torch.ones(batch), SAMPLING)
    noise = torch.randn(latents.shape, generator=generator)
    return latents, noise, sigmas_B, text.condition.context[captions], text.condition.pooled[captions]


def _loss(mmdit: nn.Module, part: Part) -> Tensor:
    latents_BChw, noise_BChw, sigmas_B, context_BLD, pooled_BP = part
    noisy_BChw = flow.add_noise(latents_BChw, noise_BChw, sigmas_B)
    velocity_BChw = mmdit(noisy_BChw, sigmas_B * NUM_TIMESTEPS, context_BLD, pooled_BP)
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
