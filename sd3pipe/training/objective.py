"""The loss of a micro-batch: noising, prediction, target, penalty."""

# B batch, C latent channels, h w latent pixels

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from sd3pipe.adapters.network import AdapterNetwork
from sd3pipe.memory.model import ModelInputs
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.pos_embed import crop_range
from sd3pipe.rules.flow import NUM_TIMESTEPS, LossRules
from sd3pipe.training import flow
from sd3pipe.training.feed import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """A batch with the arguments of the model's forward, and its target where that is not the flow's own velocity."""

    batch: Batch
    inputs: ModelInputs
    target: Tensor | None  # [B, C, h, w]


class Objective:
    """Computes losses with one model and the adapter that is attached to it."""

    def __init__(
        self, mmdit: MMDiT, network: AdapterNetwork, rules: LossRules, *, position_crop_rate: float = 0.0
    ) -> None:
        self.mmdit, self.network, self.rules = mmdit, network, rules
        self._position_crop_rate = position_crop_rate

    def prepare(self, batch: Batch) -> ForwardPass:
        """Returns the forward pass's arguments; where the base's own output is the target, it is computed here."""
        inputs = self._inputs(batch, batch.sigmas, self._crop_offset(batch.crop_draws, batch.latents.shape[-2:]))
        target_BChw = None
        if batch.preserve is not None:
            with self.network.detached(), torch.no_grad(), batch.modulation or contextlib.nullcontext():
                base_BChw = self.mmdit(**inputs)
            wanted_BChw = flow.velocity_target(batch.latents, batch.noise)
            target_BChw = torch.where(batch.preserve[:, None, None, None], base_BChw, wanted_BChw)
        return ForwardPass(batch=batch, inputs=inputs, target=target_BChw)

    def predict(self, forward_pass: ForwardPass) -> Tensor:
        """Returns the model's velocity."""
        self.select(forward_pass)
        with forward_pass.batch.modulation or contextlib.nullcontext():
            return self.mmdit(**forward_pass.inputs)

    def select(self, forward_pass: ForwardPass) -> None:
        """Makes the adapter act by this batch's samples: their dropout, their noise levels."""
        self.network.set_dropout_keys(forward_pass.batch.dropout_keys)
        self.network.set_timesteps(forward_pass.inputs["timesteps_B"])

    def losses(self, forward_pass: ForwardPass, velocity_BChw: Tensor) -> Tensor:
        """Returns loss_B of a predicted velocity, before the samples' own weights."""
        return self._penalised(velocity_BChw, forward_pass.batch, forward_pass.batch.sigmas, forward_pass.target)

    @torch.no_grad()
    def losses_at(self, batch: Batch, sigma: float) -> Tensor:
        """Returns loss_B with every sample at one noise level, in eval mode: for validation."""
        sigmas_B = torch.full_like(batch.sigmas, sigma)
        velocity_BChw = self.mmdit(**self._inputs(batch, sigmas_B, None))
        return self._penalised(velocity_BChw, batch, sigmas_B, None)

    def _inputs(self, batch: Batch, sigmas_B: Tensor, crop_offset: tuple[int, int] | None) -> ModelInputs:
        return {
            "latents_BChw": flow.add_noise(batch.latents, batch.noise, sigmas_B),
            "timesteps_B": sigmas_B * NUM_TIMESTEPS,
            "context_BLD": batch.context,
            "pooled_BP": batch.pooled,
            "crop_offset": crop_offset,
        }

    def _penalised(self, velocity_BChw: Tensor, batch: Batch, sigmas_B: Tensor, target_BChw: Tensor | None) -> Tensor:
        return flow.losses(
            velocity_BChw,
            batch.latents,
            batch.noise,
            sigmas_B,
            self.rules,
            mask_Bhw=batch.mask,
            target_BChw=target_BChw,
        )

    def _crop_offset(self, draws: Sequence[float], latent_size: Sequence[int]) -> tuple[int, int] | None:
        """Returns where the window lies in the position table, for the share of batches that move it."""
        moves, down, right = draws
        if moves >= self._position_crop_rate:
            return None
        height, width = (side // self.mmdit.architecture.patch_size for side in latent_size)
        side = isqrt(len(self.mmdit.position_table(height, width)))
        rows, columns = crop_range(side, height, width)
        return int(down * (rows + 1)), int(right * (columns + 1))
