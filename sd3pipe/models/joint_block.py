"""The joint block of the MMDiT: one attention over text and image tokens, separate weights for the two streams."""

# B batch, L tokens (context: text tokens, x: image patches), D width, H heads, E = 64 head width, K modulation width

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd3pipe.models.architecture import MLP_RATIO, MMDiTArchitecture
from sd3pipe.models.linear import Linear
from sd3pipe.models.recomputation import recomputed
from sd3pipe.variants import HEAD_WIDTH
from sd3pipe.words import KeptActivations, SideName

_EPSILON = 1e-6  # of all norms

DeviceLike = torch.device | str | None


class JointBlock(nn.Module):
    """One attention over text and image tokens together, with separate weights for the two streams.

    `kept` says what `run` keeps for the backward pass: all, attention's output and the inputs, or the inputs alone.
    """

    def __init__(
        self, architecture: MMDiTArchitecture, index: int, device: DeviceLike, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.kept: KeptActivations = "all"
        self.context_block = BlockSide(architecture, index, "context_block", device, dtype)
        self.x_block = BlockSide(architecture, index, "x_block", device, dtype)

    def modulation(self, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the modulation vectors of context and x; they depend on the timestep and the pooled text only."""
        return self.context_block.modulation(condition_BD), self.x_block.modulation(condition_BD)

    def forward(
        self, context_BLD: Tensor, x_BLD: Tensor, context_modulation_BK: Tensor, x_modulation_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        context_heads = self.context_block.heads(context_BLD, context_modulation_BK)
        x_heads = self.x_block.heads(x_BLD, x_modulation_BK)
        q_BHLE, k_BHLE, v_BHLE = (torch.cat(pair, dim=2) for pair in zip(context_heads, x_heads, strict=True))
        attended_BLD = attend(q_BHLE, k_BHLE, v_BHLE)
        lengths = [context_BLD.shape[1], x_BLD.shape[1]]
        context_attended_BLD, x_attended_BLD = attended_BLD.split(lengths, dim=1)
        return (
            self.context_block.residual(context_BLD, context_attended_BLD, context_modulation_BK),
            self.x_block.residual(x_BLD, x_attended_BLD, x_modulation_BK),
        )

    def run(
        self, context_BLD: Tensor, x_BLD: Tensor, context_modulation_BK: Tensor, x_modulation_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns what `forward` returns, and keeps for the backward pass what `kept` says.

        The modulation lies outside what is recomputed: it is small to keep, and its weights are a third of the block.
        """
        inputs = (context_BLD, x_BLD, context_modulation_BK, x_modulation_BK)
        if self.kept == "all" or not self._has_backward(inputs):
            return self(*inputs)
        return self._recomputed(*inputs) if self.kept == "none" else self._with_attention_kept(*inputs)

    def run_with_modulation(self, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what `run` returns with the modulation of a condition, which is recomputed with the rest."""

        def whole(context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
            return self(context_BLD, x_BLD, *self.modulation(condition_BD))

        inputs = (context_BLD, x_BLD, condition_BD)
        return whole(*inputs) if self.kept == "all" else recomputed(whole, *inputs, keep_attention=self.kept != "none")

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles `forward`, and what recomputes it, the latter with its backward pass as one graph."""
        super().compile(*args, **options)
        self._recomputed = torch.compile(self._recomputed, *args, **options)
        self._with_attention_kept = torch.compile(self._with_attention_kept, *args, **options)

    def _recomputed(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return recomputed(self, *inputs)

    def _with_attention_kept(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return recomputed(self, *inputs, keep_attention=True)

    def _has_backward(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether inputs or adapters want a gradient."""
        if not torch.is_grad_enabled() or any(t.requires_grad for t in inputs):
            return torch.is_grad_enabled()
        adapters = (module.adapter for module in self.modules() if isinstance(module, Linear))
        attached = (a for a in adapters if a is not None)
        return any(not isinstance(a, nn.Module) or any(p.requires_grad for p in a.parameters()) for a in attached)


class BlockSide(nn.Module):
    """One stream of a joint block. A side without projection and MLP (the last context) only lends keys and values."""

    def __init__(
        self,
        architecture: MMDiTArchitecture,
        index: int,
        side: SideName,
        device: DeviceLike,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        width = architecture.width
        self.chunks = architecture.modulation_chunks(index, side)
        whole = self.chunks > 2
        modulation = Linear(width, self.chunks * width, device=device, dtype=dtype)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)
        self.attn = Attention(architecture, with_projection=whole, device=device, dtype=dtype)
        dual = self.chunks == 9
        self.attn2 = Attention(architecture, with_projection=True, device=device, dtype=dtype) if dual else None
        self.mlp = Mlp(width, device, dtype) if whole else None

    def modulation(self, condition_BD: Tensor) -> Tensor:
        """Returns the shifts, scales and gates [B, K] of this side; `condition_BD` has passed SiLU already."""
        return self.adaLN_modulation[1](condition_BD)

    def heads(self, x_BLD: Tensor, modulation_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what this side brings into the joint attention."""
        shift, scale, *_ = self._parts(modulation_BK)
        return self.attn.heads(modulate(x_BLD, shift, scale))

    def residual(self, x_BLD: Tensor, attended_BLD: Tensor, modulation_BK: Tensor) -> Tensor:
        """Returns the stream after attention and MLP."""
        if self.attn.proj is None or self.mlp is None:
            return x_BLD
        _, _, gate_msa, shift_mlp, scale_mlp, gate_mlp, *second = self._parts(modulation_BK)
        result_BLD = x_BLD + gate_msa * self.attn.proj(attended_BLD)
        if self.attn2 is not None and self.attn2.proj is not None:
            shift2, scale2, gate2 = second
            own_BLD = attend(*self.attn2.heads(modulate(x_BLD, shift2, scale2)))  # of the block's input
            result_BLD = result_BLD + gate2 * self.attn2.proj(own_BLD)
        return result_BLD + gate_mlp * self.mlp(modulate(result_BLD, shift_mlp, scale_mlp))

    def _parts(self, modulation_BK: Tensor) -> tuple[Tensor, ...]:
        return modulation_BK[:, None].chunk(self.chunks, dim=-1)


class Attention(nn.Module):
    """The projections of one attention: fused q, k, v, their norms, and the output (absent in the last context)."""

    def __init__(
        self, architecture: MMDiTArchitecture, *, with_projection: bool, device: DeviceLike, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        width = architecture.width
        self.qkv = Linear(width, 3 * width, device=device, dtype=dtype)
        self.ln_q = HeadNorm(device, dtype) if architecture.qk_norm else nn.Identity()
        self.ln_k = HeadNorm(device, dtype) if architecture.qk_norm else nn.Identity()
        self.proj = Linear(width, width, device=device, dtype=dtype) if with_projection else None

    def heads(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k and v [B, H, L, E]; heads are 64 wide, however many there are."""
        q_BHLE, k_BHLE, v_BHLE = self.qkv(x_BLD).unflatten(-1, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        return self.ln_q(q_BHLE), self.ln_k(k_BHLE), v_BHLE


class HeadNorm(nn.Module):
    """RMS norm over the width of a head."""

    def __init__(self, device: DeviceLike, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HEAD_WIDTH, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x_BHLE: Tensor) -> Tensor:
        normed_BHLE = functional.rms_norm(x_BHLE, (HEAD_WIDTH,), self.weight.to(x_BHLE.dtype), _EPSILON)
        return normed_BHLE.to(x_BHLE.dtype)


class Mlp(nn.Module):
    """Linear, GELU (tanh), linear, four times as wide inside."""

    def __init__(self, width: int, device: DeviceLike, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.fc1 = Linear(width, MLP_RATIO * width, device=device, dtype=dtype)
        self.fc2 = Linear(MLP_RATIO * width, width, device=device, dtype=dtype)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x_BLD), approximate="tanh"))


def modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Returns LayerNorm(x) (1 + scale) + shift; the norm has no weights of its own."""
    normed_BLD = functional.layer_norm(x_BLD, x_BLD.shape[-1:], eps=_EPSILON)
    return normed_BLD * (1 + scale_B1D) + shift_B1D


def attend(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor) -> Tensor:
    """Returns softmax(q k^T / 8) v with the heads side by side, [B, L, D]. No token is masked."""
    return functional.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE).transpose(1, 2).flatten(2)
