"""The multimodal diffusion transformer of SD3 and SD3.5 (Esser et al. 2024, arXiv 2403.03206, figure 2).

Names of modules and parameters are the native checkpoint keys. Three variants differ in two features: RMS norms on
queries and keys (SD3.5), and a second attention of the image over itself in some blocks (SD3.5-medium, MMDiT-X).
"""

# B batch, L tokens (context: text tokens, x: image patches), D width, P pooled width, K modulation or patch width,
# C latent channels, h w latent pixels, p q offsets inside a patch

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.errors import InputError
from sd3pipe.models.architecture import TIMESTEP_FREQUENCIES, MMDiTArchitecture
from sd3pipe.models.joint_block import DeviceLike, JointBlock, modulate
from sd3pipe.models.linear import Linear, PatchProjection
from sd3pipe.models.pos_embed import ScaledPositions, beside, crop_positions
from sd3pipe.words import KeptActivations

_LONGEST_PERIOD = 10000.0


class BlockRunner(Protocol):
    """What runs joint blocks in the model's stead, for instance from weights that are streamed in."""

    def __call__(self, index: int, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns context and x after block `index`."""
        ...


class MMDiT(nn.Module):
    """Predicts the velocity of noisy latents. Weights are uninitialised and frozen until a checkpoint fills them.

    scaled_positions  position tables in place of the checkpoint's (sd-scripts' enable_scaled_pos_embed), if set
    block_runner      runs the blocks instead of `run_block`, if set
    """

    pos_embed: Tensor

    def __init__(
        self, architecture: MMDiTArchitecture, *, device: DeviceLike = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        a, width = architecture, architecture.width
        self.architecture = architecture
        self.scaled_positions: ScaledPositions | None = None
        self.block_runner: BlockRunner | None = None
        self.register_buffer("pos_embed", torch.empty(1, a.pos_embed_max**2, width, device=device, dtype=dtype))
        self.x_embedder = PatchEmbedder(a, device, dtype)
        self.t_embedder = VectorEmbedder(TIMESTEP_FREQUENCIES, width, device, dtype)
        self.y_embedder = VectorEmbedder(a.pooled_width, width, device, dtype)
        self.context_embedder = Linear(a.context_width, width, device=device, dtype=dtype)
        self.joint_blocks = nn.ModuleList(JointBlock(a, index, device, dtype) for index in range(a.depth))
        self.final_layer = FinalLayer(a, device, dtype)

    def forward(
        self,
        latents_BChw: Tensor,
        timesteps_B: Tensor,
        context_BLD: Tensor,
        pooled_BP: Tensor,
        *,
        skip_blocks: Collection[int] = (),
        crop_offset: tuple[int, int] | None = None,
    ) -> Tensor:
        """Returns the velocity [B, C, h, w] in the dtype of the latents.

        `timesteps_B` are 1000 sigma, in 0..1000; `context_BLD` has the text encoders' width. Blocks in `skip_blocks`
        pass both streams through (skip-layer guidance). `crop_offset` moves the window in the position table away from
        its middle (sd-scripts' pos_emb_random_crop). Raises InputError for sizes that the model cannot take.
        """
        x_BLD = self.embed_latents(latents_BChw, crop_offset)
        context_BLD = self.embed_context(context_BLD)
        condition_BD = self.condition(timesteps_B, pooled_BP)
        run = self.block_runner or self.run_block
        for index in range(self.architecture.depth):
            if index not in skip_blocks:
                context_BLD, x_BLD = run(index, context_BLD, x_BLD, condition_BD)
        return self.finish(x_BLD, condition_BD, latents_BChw)

    def embed_latents(self, latents_BChw: Tensor, crop_offset: tuple[int, int] | None = None) -> Tensor:
        """Returns the image tokens [B, L, D] with their position codes."""
        patch = self.architecture.patch_size
        _, channels, height, width = latents_BChw.shape
        if channels != self.architecture.in_channels:
            raise InputError(f"latents have {channels} channels, the model takes {self.architecture.in_channels}")
        if height % patch or width % patch:
            raise InputError(
                f"latents of {height} x {width} cannot be cut into {patch} x {patch} patches: "
                f"the sides of pictures must be divisible by {8 * patch} pixels"
            )
        rows, columns = height // patch, width // patch
        x_BLD = self.x_embedder(latents_BChw)
        positions_LD = crop_positions(self.position_table(rows, columns), rows, columns, crop_offset)
        return x_BLD + beside(positions_LD, x_BLD)

    def position_table(self, rows: int, columns: int) -> Tensor:
        """Returns the codes [P P, D] that a picture of rows x columns patches takes a window of."""
        return self.pos_embed[0] if self.scaled_positions is None else self.scaled_positions.table(rows, columns)

    def embed_context(self, context_BLD: Tensor) -> Tensor:
        """Returns the text tokens at the model's width."""
        if context_BLD.shape[-1] != self.architecture.context_width:
            raise InputError(
                f"text is {context_BLD.shape[-1]} wide, the model takes {self.architecture.context_width}: "
                "encode it with the text encoders that belong to the model"
            )
        return self.context_embedder(context_BLD.to(self.context_embedder.compute_dtype))

    def condition(self, timesteps_B: Tensor, pooled_BP: Tensor) -> Tensor:
        """Returns SiLU(c) [B, D], c = embedded timestep + embedded pooled text; all modulation is linear in it."""
        if pooled_BP.shape[-1] != self.architecture.pooled_width:
            raise InputError(
                f"pooled text is {pooled_BP.shape[-1]} wide, the model takes {self.architecture.pooled_width}: "
                "encode it with the text encoders that belong to the model"
            )
        return self.embed_condition(self.t_embedder, self.y_embedder, timesteps_B, pooled_BP)

    @staticmethod
    def embed_condition(t_embedder: nn.Module, y_embedder: nn.Module, timesteps_B: Tensor, pooled_BP: Tensor) -> Tensor:
        """Returns SiLU(c) by the given embedders, which may be copies on another device."""
        return functional.silu(t_embedder(sinusoid(timesteps_B)) + y_embedder(pooled_BP))

    def run_block(self, index: int, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns context and x after joint block `index`, which keeps what it is set to keep."""
        block = cast(JointBlock, self.joint_blocks[index])
        return block.run(context_BLD, x_BLD, *block.modulation(condition_BD))

    def keep_activations(self, kept: Sequence[KeptActivations]) -> None:
        """Sets what each joint block keeps for the backward pass, from the first block to the last."""
        for block, of_block in zip(self.joint_blocks, kept, strict=True):
            cast(JointBlock, block).kept = of_block

    def finish(self, x_BLD: Tensor, condition_BD: Tensor, latents_BChw: Tensor) -> Tensor:
        """Returns the velocity in the size and dtype of the latents."""
        patch = self.architecture.patch_size
        velocity_BLK = self.final_layer(x_BLD, condition_BD)
        rows, columns = (side // patch for side in latents_BChw.shape[-2:])
        velocity_BhwpqC = velocity_BLK.unflatten(1, (rows, columns)).unflatten(-1, (patch, patch, -1))
        velocity_BChw = velocity_BhwpqC.permute(0, 5, 1, 3, 2, 4).reshape(latents_BChw.shape)
        return velocity_BChw.to(latents_BChw.dtype)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Yields every linear layer by its native path, such as joint_blocks.0.x_block.attn.qkv."""
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                yield name, module


class PatchEmbedder(nn.Module):
    """Projects p x p patches of latents to tokens."""

    def __init__(self, architecture: MMDiTArchitecture, device: DeviceLike, dtype: torch.dtype | None) -> None:
        super().__init__()
        a = architecture
        self.proj = PatchProjection(a.in_channels, a.width, a.patch_size, device=device, dtype=dtype)

    def forward(self, latents_BChw: Tensor) -> Tensor:
        patch = self.proj.patch_size
        x_BChpwq = latents_BChw.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        x_BLK = x_BChpwq.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # K runs over (c, p, q) as in a convolution
        return self.proj(x_BLK.to(self.proj.compute_dtype))


class VectorEmbedder(nn.Module):
    """Maps one vector per picture to the model's width: linear, SiLU, linear."""

    def __init__(self, in_features: int, width: int, device: DeviceLike, dtype: torch.dtype | None) -> None:
        super().__init__()
        first = Linear(in_features, width, device=device, dtype=dtype)
        self.mlp = nn.Sequential(first, nn.SiLU(), Linear(width, width, device=device, dtype=dtype))

    def forward(self, vectors_BP: Tensor) -> Tensor:
        return self.mlp(vectors_BP.to(cast(Linear, self.mlp[0]).compute_dtype))


class FinalLayer(nn.Module):
    """Modulated norm and the projection of every token to its patch, channels fastest."""

    def __init__(self, architecture: MMDiTArchitecture, device: DeviceLike, dtype: torch.dtype | None) -> None:
        super().__init__()
        a, width = architecture, architecture.width
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(width, 2 * width, device=device, dtype=dtype))
        self.linear = Linear(width, a.patch_size**2 * a.in_channels, device=device, dtype=dtype)

    def forward(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation[1](condition_BD)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x_BLD, shift, scale))


def sinusoid(timesteps_B: Tensor) -> Tensor:
    """Returns 128 cosines, then 128 sines of every timestep, always in float32: bfloat16 rounds 900 to 896 or 904."""
    half = TIMESTEP_FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps_B.device)
    frequencies = torch.exp(-math.log(_LONGEST_PERIOD) * steps / half)
    angles = timesteps_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
