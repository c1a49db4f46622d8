"""Turns planned micro-batches into tensors: rows from the caches, and every random number of every sample.

It runs in worker processes or in the main one; a batch is a pure function of its plan, so their number changes nothing.
"""

# B batch, L tokens, D context width, P pooled width, E the three encoders, C latent channels, h w latent pixels

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sd3pipe import stopping
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.rows import latents_name
from sd3pipe.cache.tensors import row_to_torch, to_torch
from sd3pipe.diffusion.draws import hashes, normals, uniforms
from sd3pipe.diffusion.sampler import PIXELS_PER_LATENT
from sd3pipe.memory.ahead import PendingModulation
from sd3pipe.models.conditioning import assemble_conditioning
from sd3pipe.models.vae import draw_latents, to_model_space
from sd3pipe.params.train import TrainParams
from sd3pipe.rules.feeding import EncoderDropout
from sd3pipe.rules.flow import NUM_TIMESTEPS, SigmaSampling
from sd3pipe.training.batches import Items, MicroBatch, StepPlan
from sd3pipe.training.flow import sample_sigmas


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch as the training step wants it; latents are in the model's space."""

    plan: MicroBatch
    latents: Tensor  # [B, C, h, w]
    noise: Tensor  # [B, C, h, w]
    sigmas: Tensor  # [B]
    context: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]
    weights: Tensor  # [B]
    pictures: Tensor  # [B] int64, as the items number them
    subsets: Tensor  # [B] int64
    dropout_keys: Tensor  # [B] int64
    crop_draws: tuple[float, ...]  # three uniform numbers: whether to move the position window, and where to
    mask: Tensor | None = None  # [B, h, w]
    preserve: Tensor | None = None  # [B] bool: samples whose target is the base model's own output
    modulation: PendingModulation | None = None  # computed ahead on the host

    def __len__(self) -> int:
        return len(self.plan)

    def to(self, device: torch.device) -> Self:
        """Returns the batch on a device; the copy does not wait."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """Returns the batch in pinned memory; torch's DataLoader calls this."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The micro-batches of one step on one process."""

    plan: StepPlan
    batches: list[Batch]

    def pin_memory(self) -> "Step":
        return Step(plan=self.plan, batches=[batch.pin_memory() for batch in self.batches])


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedRules:
    """What changes a batch's numbers, beside the rows."""

    seed: int
    sampling: SigmaSampling
    use_masks: bool = True
    encoder_dropout: EncoderDropout = EncoderDropout()
    context_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, params: TrainParams, context_dtype: torch.dtype) -> Self:
        """Returns the rules that options ask for."""
        return cls(
            seed=params.seed,
            sampling=params.noise,
            use_masks=params.loss.masked_loss != "off",
            encoder_dropout=params.encoder_dropout,
            context_dtype=context_dtype,
        )


class Feed(Dataset[Step]):
    """Makes tensors from plans."""

    def __init__(self, items: Items, latents: CacheReader, text: CacheReader, rules: FeedRules) -> None:
        self.items, self.latents, self.text, self.rules = items, latents, text, rules

    def __getitem__(self, plan: StepPlan) -> "Step":
        return Step(plan=plan, batches=[self.batch(micro_batch) for micro_batch in plan.micro_batches])

    def batch(self, plan: MicroBatch) -> Batch:
        """Returns the training batch of a plan."""
        seed, epoch = self.rules.seed, plan.epoch
        latents, mask = self._latents(plan)
        noise = [normals(tuple(latents.shape[1:]), seed, "noise", epoch, int(number)) for number in plan.ids]
        draws = torch.from_numpy(uniforms(plan.ids, seed, "sigma", epoch))
        sides = self.items.latent_shapes[plan.latent_rows] * PIXELS_PER_LATENT
        preserve = self.items.rule("diff_output_preservation")[plan.pictures] > 0
        context, pooled = self._conditioning(plan)
        return Batch(
            plan=plan,
            latents=latents,
            noise=torch.from_numpy(np.stack(noise)),
            sigmas=sample_sigmas(draws, _floats(sides.prod(axis=1)), self.rules.sampling),
            context=context,
            pooled=pooled,
            weights=_floats(self.items.rule("loss_weight")[plan.pictures]),
            pictures=torch.from_numpy(plan.pictures),
            subsets=torch.from_numpy(self.items.subsets[plan.pictures]),
            dropout_keys=torch.from_numpy(hashes(plan.ids, seed, "adapter dropout", epoch).view(np.int64)),
            crop_draws=tuple(uniforms(plan.ids[:1] + np.arange(3, dtype=np.uint64), seed, "position crop", epoch)),
            mask=mask,
            preserve=torch.from_numpy(preserve) if preserve.any() else None,
        )

    def _latents(self, plan: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Returns a sample of each row's distribution, or what was encoded instead of one; and the loss masks."""
        latents, masks = [], []
        for number, row_number in zip(plan.ids, plan.latent_rows, strict=True):
            row = self.latents.row(int(row_number))
            name = latents_name(row)
            values = to_torch(row[name]).float()
            if name == "moments":
                mean, logvar = values.chunk(2)
                noise = normals(tuple(mean.shape), self.rules.seed, "latent", plan.epoch, int(number))
                values = draw_latents(mean, logvar, torch.from_numpy(noise))
            latents.append(values)
            masks.append(to_torch(row["mask"]).float() if "mask" in row else None)
        latents_BChw = to_model_space(torch.stack(latents))
        if not self.rules.use_masks or all(mask is None for mask in masks):
            return latents_BChw, None
        ones = torch.ones(latents_BChw.shape[-2:])
        return latents_BChw, torch.stack([ones if mask is None else mask for mask in masks])

    def _conditioning(self, plan: MicroBatch) -> tuple[Tensor, Tensor]:
        """Returns context and pooled text, with whole encoders replaced by zeros where they are dropped."""
        tensors = {number: row_to_torch(self.text.row(number)) for number in set(plan.text_rows.tolist())}
        seed, epoch = self.rules.seed, plan.epoch
        dropout = self.rules.encoder_dropout
        rates = {
            "clip_l": dropout.clip_l_dropout_rate,
            "clip_g": dropout.clip_g_dropout_rate,
            "t5xxl": dropout.t5_dropout_rate,
        }
        kept = [uniforms(plan.ids, seed, f"{name} dropout", epoch) >= rate for name, rate in rates.items()]
        return assemble_conditioning(
            [tensors[number] for number in plan.text_rows.tolist()],
            keep_BE=torch.from_numpy(np.column_stack(kept)),
            dtype=self.rules.context_dtype,
        )


def load_steps(feed: Feed, plans: Iterator[StepPlan], *, workers: int, pin_memory: bool) -> Iterator[Step]:
    """Yields the tensors of each step, in order, read ahead by worker processes if there are any."""
    loader = DataLoader(
        feed,
        sampler=plans,
        batch_size=None,  # what the feed returns is passed on as it is
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # else the loader draws its base seed from the global generator
    )
    return iter(loader)


def _begin_worker(number: int) -> None:
    stopping.leave_to_parent()


def with_modulation(steps: Iterator[Step], prepare: Callable[[Tensor, Tensor], PendingModulation]) -> Iterator[Step]:
    """Yields the steps with their modulation pending, which the host begins with one step ahead.

    `prepare` takes timesteps and pooled text of a batch, in host memory.
    """
    ready = _prepared(next(steps), prepare)
    for step in steps:
        following = _prepared(step, prepare)
        yield ready
        ready = following
    yield ready


def _prepared(step: Step, prepare: Callable[[Tensor, Tensor], PendingModulation]) -> Step:
    batches = [replace(batch, modulation=prepare(batch.sigmas * NUM_TIMESTEPS, batch.pooled)) for batch in step.batches]
    return Step(plan=step.plan, batches=batches)


def _floats(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
