"""What a model weighs, computes and keeps for its backward pass, told from the shapes in its header. Free of torch.

Formulas: a joint block takes 24 D^2 operations per token, and 4 D per pair of tokens for attention; its adaLN weights
are a third of its bytes and take no time. Dual attention adds 8 D^2 per image token and attention over the image.
What is kept is counted as the block's forward pass is written and torch differentiates it, with a LoRA on every layer;
fewer adapted layers keep less, and so do compiled blocks, which compute sums and norms again of their own accord.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sd3pipe.variants import HEAD_WIDTH
from sd3pipe.words import BaseFormat, KeptActivations

_PATCH_PX = 16  # 8 pixels a latent, 2 latents a patch
_PACKED_PARTS = (".attn.", ".attn2.", ".mlp.")
# A frozen weight needs the input's gradient only; flash attention's backward is 2.5 times its forward.
_ATTENTION_BACKWARD = 2.5
_STATISTIC_BYTES = 4  # sums of a row are kept in float32
# Values per token, in units of the width:
_INPUT = 1
_ENTRANCE = 1 + 1 + 3  # normed; modulated; q, k and v side by side
_NORMED_HEADS = 3  # q, k and v before the norms, beside those after them
_ATTENDED = 1 + 1  # attention's output, by heads and by tokens
_EXIT = 1 + 1 + 1 + 1 + 4 + 4 + 1  # projection; sum, normed, modulated; before and after GELU; the MLP's output
_SECOND = 1 + 1 + 3 + _ATTENDED + 1  # dual attention: normed, modulated, q k v; output; projection
_SECOND_NORMED = 2  # q and k after their norms; v is not copied there
_LINEARS, _LINEARS_OF_LENDER, _LINEARS_OF_SECOND = 4, 1, 2  # each keeps its adapter's rank activations


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSize:
    """Weights of one joint block: what may be packed, adaLN, and the small rest."""

    packable: int
    packable_rows: int
    modulation: int
    small: int
    dual: bool
    pre_only: bool  # its context lends keys and values, and goes no further

    def body_bytes(self, dtype_bytes: int, base_format: BaseFormat) -> int:
        return self.small * dtype_bytes + packed_bytes(self.packable, self.packable_rows, dtype_bytes, base_format)

    def modulation_bytes(self, dtype_bytes: int) -> int:
        return self.modulation * dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """All that the cost model asks of an MMDiT."""

    width: int
    qk_norm: bool
    blocks: tuple[BlockSize, ...]
    outside: int  # weights outside of the blocks, without the position table
    position_table: int

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def weights(self) -> int:
        blocks = sum(block.packable + block.modulation + block.small for block in self.blocks)
        return blocks + self.outside + self.position_table

    def forward_flop(self, batch: int, image_tokens: int, text_tokens: int) -> float:
        """Returns the floating point operations of one forward pass."""
        return sum(self.block_flop(number, batch, image_tokens, text_tokens) for number in range(self.depth))

    def block_flop(self, number: int, batch: int, image_tokens: int, text_tokens: int) -> float:
        """Returns those of one block's forward pass."""
        return sum(self._block_flop(self.blocks[number], batch, image_tokens, text_tokens))

    def backward_flop(
        self, batch: int, image_tokens: int, text_tokens: int, *, kept: Sequence[KeptActivations]
    ) -> float:
        """Returns those of the backward pass over frozen weights, which computes again what blocks do not keep."""
        total = 0.0
        for block, of_block in zip(self.blocks, kept, strict=True):
            products, attention = self._block_flop(block, batch, image_tokens, text_tokens)
            again = {"none": products + attention, "attention": products, "all": 0.0}[of_block]
            total += products + _ATTENTION_BACKWARD * attention + again
        return total

    def _block_flop(self, block: BlockSize, batch: int, image: int, text: int) -> tuple[float, float]:
        d, tokens = self.width, image + text
        products, attention = 24.0 * d * d * tokens * batch, 4.0 * tokens * tokens * d * batch
        if block.dual:
            products += 8.0 * d * d * image * batch
            attention += 4.0 * image * image * d * batch
        return products, attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What passes through a block, and in which format."""

    width: int
    image: int  # tokens, of the whole batch
    text: int
    dtype_bytes: int
    rank: int = 0
    qk_norm: bool = True

    @property
    def all(self) -> int:
        return self.image + self.text

    @property
    def input_bytes(self) -> int:
        """The inputs of one block, which it keeps in any case."""
        return _INPUT * self.all * self.width * self.dtype_bytes


def model_size(shapes: Mapping[str, tuple[int, ...]]) -> ModelSize:
    """Returns the sizes of an MMDiT from its native keys and shapes."""
    numbers = sorted({int(key.split(".")[1]) for key in shapes if key.startswith("joint_blocks.")})
    outside = sum(math.prod(s) for key, s in shapes.items() if not key.startswith(("joint_blocks.", "pos_embed")))
    return ModelSize(
        width=shapes["x_embedder.proj.weight"][0],
        qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
        blocks=tuple(_block_size(shapes, number) for number in numbers),
        outside=outside,
        position_table=math.prod(shapes["pos_embed"]),
    )


def image_tokens(width_px: int, height_px: int) -> int:
    """Returns how many tokens a picture has."""
    return (width_px // _PATCH_PX) * (height_px // _PATCH_PX)


def packed_bytes(weights: int, rows: int, dtype_bytes: int, base_format: BaseFormat) -> int:
    """Returns the bytes of matrices of `weights` entries in `rows` rows, their scales included."""
    if base_format == "dense":
        return weights * dtype_bytes
    if base_format == "nf4":
        return weights // 2 + weights // 64 * 4
    return weights + rows * 4


def kept_bytes(block: BlockSize, tokens: Tokens, kept: KeptActivations) -> int:
    """Returns the bytes that one block keeps for its backward pass, its inputs among them."""
    if kept == "none":
        return tokens.input_bytes
    attended = tokens.all + (tokens.image if block.dual else 0)  # tokens, once for each attention that they are in
    statistics = _STATISTIC_BYTES * (tokens.width // HEAD_WIDTH) * attended  # the sums of softmax, one for each head
    if kept == "attention":
        return tokens.input_bytes + attended * tokens.width * tokens.dtype_bytes + statistics
    if tokens.qk_norm:
        statistics *= 1 + 2  # and of the norms of q and k
    values = _values(block, tokens, "image") * tokens.image + _values(block, tokens, "text") * tokens.text
    return values * tokens.dtype_bytes + statistics


def _block_size(shapes: Mapping[str, tuple[int, ...]], number: int) -> BlockSize:
    prefix = f"joint_blocks.{number}."
    block = {key: shape for key, shape in shapes.items() if key.startswith(prefix)}
    modulation = sum(math.prod(shape) for key, shape in block.items() if "adaLN_modulation" in key)
    matrices = [s for key, s in block.items() if len(s) == 2 and any(part in key for part in _PACKED_PARTS)]
    packable = sum(map(math.prod, matrices))
    return BlockSize(
        packable=packable,
        packable_rows=sum(shape[0] for shape in matrices),
        modulation=modulation,
        small=sum(map(math.prod, block.values())) - packable - modulation,
        dual=f"{prefix}x_block.attn2.qkv.weight" in block,
        pre_only=f"{prefix}context_block.attn.proj.weight" not in block,
    )


def _values(block: BlockSize, tokens: Tokens, side: Literal["image", "text"]) -> int:
    """Returns how many values one token keeps."""
    widths, ranks = _INPUT + _ENTRANCE + _ATTENDED + (_NORMED_HEADS if tokens.qk_norm else 0), _LINEARS_OF_LENDER
    if not (side == "text" and block.pre_only):
        widths, ranks = widths + _EXIT, _LINEARS
    if side == "image" and block.dual:
        widths += _SECOND + (_SECOND_NORMED if tokens.qk_norm else 0)
        ranks += _LINEARS_OF_SECOND
    return widths * tokens.width + ranks * tokens.rank
