"""How many bytes a joint block keeps for its backward pass, by what it is set to keep. Free of torch.

Counted as the block's forward pass is written and torch differentiates it, with a LoRA on every layer; fewer adapted
layers keep less, and so do compiled blocks, which compute sums and norms again of their own accord.
"""

from dataclasses import dataclass
from typing import Literal

from sd3pipe.memory.sizes import BlockSize
from sd3pipe.words import KeptActivations

_HEAD_WIDTH = 64
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


def kept_bytes(block: BlockSize, tokens: Tokens, kept: KeptActivations) -> int:
    """Returns the bytes that one block keeps for its backward pass, its inputs among them."""
    if kept == "none":
        return tokens.input_bytes
    attended = tokens.all + (tokens.image if block.dual else 0)  # tokens, once for each attention that they are in
    statistics = _STATISTIC_BYTES * (tokens.width // _HEAD_WIDTH) * attended  # the sums of softmax, one for each head
    if kept == "attention":
        return tokens.input_bytes + attended * tokens.width * tokens.dtype_bytes + statistics
    if tokens.qk_norm:
        statistics *= 1 + 2  # and of the norms of q and k
    values = _values(block, tokens, "image") * tokens.image + _values(block, tokens, "text") * tokens.text
    return values * tokens.dtype_bytes + statistics


def _values(block: BlockSize, tokens: Tokens, side: Literal["image", "text"]) -> int:
    """Returns how many values one token keeps."""
    widths, ranks = _INPUT + _ENTRANCE + _ATTENDED + (_NORMED_HEADS if tokens.qk_norm else 0), _LINEARS_OF_LENDER
    if not (side == "text" and block.pre_only):
        widths, ranks = widths + _EXIT, _LINEARS
    if side == "image" and block.dual:
        widths += _SECOND + (_SECOND_NORMED if tokens.qk_norm else 0)
        ranks += _LINEARS_OF_SECOND
    return widths * tokens.width + ranks * tokens.rank
