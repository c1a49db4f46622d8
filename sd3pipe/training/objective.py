"""The loss of a micro-batch: noising, prediction, target, penalty."""

# B batch, C latent channels, h w latent pixels

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3pipe.adapters.network import AdapterNetwork
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.models.pos_embed import crop_range
from sd3pipe.training import flow
from sd3pipe.training.feed import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRules:
    """What is compared, and how an error is penalised."""

    weighting_scheme: flow.WeightingScheme
    loss_form: flow.LossForm
    loss_type: flow.LossType
    huber: flow.Huber
    mask_normalisation: flow.MaskNormalisation
    position_crop_rate: float = 0.0


class Objective:
    """Computes losses with one model and the adapter that is attached to it."""

    def __init__(self, mmdit: MMDiT, network: AdapterNetwork, rules: LossRules) -> None:
        self.mmdit, self.network, self.rules = mmdit, network, rules

    def losses(self, batch: Batch) -> Tensor:
        """Returns loss_B of a batch on the model's device, before the samples' own weights."""
        noisy_BChw = flow.add_noise(batch.latents, batch.noise, batch.sigmas)
        crop = self._crop_offset(batch.crop_draws, noisy_BChw.shape[-2:])
        self.network.set_dropout_keys(batch.dropout_keys)
        velocity_BChw = self._velocity(batch, noisy_BChw, batch.sigmas, crop)
        target_BChw = None
        if batch.preserve is not None:
            with self.network.detached(), torch.no_grad():
                base_BChw = self._velocity(batch, noisy_BChw, batch.sigmas, crop)
            wanted_BChw = flow.velocity_target(batch.latents, batch.noise)
            target_BChw = torch.where(batch.preserve[:, None, None, None], base_BChw, wanted_BChw)
        return self._penalised(velocity_BChw, batch, batch.sigmas, target_BChw)

    @torch.no_grad()
    def losses_at(self, batch: Batch, sigma: float) -> Tensor:
        """Returns loss_B with every sample at one noise level, in eval mode: for validation."""
        sigmas_B = torch.full_like(batch.sigmas, sigma)
        noisy_BChw = flow.add_noise(batch.latents, batch.noise, sigmas_B)
        return self._penalised(self._velocity(batch, noisy_BChw, sigmas_B, None), batch, sigmas_B, None)

    def _velocity(
        self, batch: Batch, noisy_BChw: Tensor, sigmas_B: Tensor, crop_offset: tuple[int, int] | None
    ) -> Tensor:
        timesteps_B = sigmas_B * flow.NUM_TIMESTEPS
        return self.mmdit(noisy_BChw, timesteps_B, batch.context, batch.pooled, crop_offset=crop_offset)

    def _penalised(self, velocity_BChw: Tensor, batch: Batch, sigmas_B: Tensor, target_BChw: Tensor | None) -> Tensor:
        return flow.loss(
            velocity_BChw,
            batch.latents,
            batch.noise,
            sigmas_B,
            weighting_scheme=self.rules.weighting_scheme,
            loss_form=self.rules.loss_form,
            loss_type=self.rules.loss_type,
            huber=self.rules.huber,
            mask_Bhw=batch.mask,
            mask_normalisation=self.rules.mask_normalisation,
            target_BChw=target_BChw,
        )

    def _crop_offset(self, draws: Sequence[float], latent_size: Sequence[int]) -> tuple[int, int] | None:
        """Returns where the window lies in the position table, for the share of batches that move it."""
        moves, down, right = draws
        if moves >= self.rules.position_crop_rate:
            return None
        architecture = self.mmdit.architecture
        height, width = (side // architecture.patch_size for side in latent_size)
        rows, columns = crop_range(architecture.pos_embed_max, height, width)
        return int(down * (rows + 1)), int(right * (columns + 1))
