"""Products of a frozen base in eight bits: weights scaled per output channel, activations per token, on the fly.

y = x W^T is computed from whole numbers (int8) or float8_e4m3fn, and so is the gradient of x, whose sum runs over
output channels: there the weight's scales are folded into the gradient before it is rounded. Where the channels of x
differ much in size, a rotation R spreads each over its neighbours: x W^T = (x R) (W R)^T, with R orthogonal (QuaRot,
arXiv:2404.00456). It is made of Hadamard blocks, so that its entries are +1 and -1 but for one factor. Whole numbers
need it then; floating point keeps small values beside large ones by itself, and loses by it.
"""

# M tokens, O out features, I in features, K what a product sums over, N what it returns, R side of a rotation's block

import torch
from torch import Tensor

from sd3pipe.errors import ParameterError
from sd3pipe.memory.plan import Settings
from sd3pipe.memory.quantise import PACKINGS, PackableLinear, Packing
from sd3pipe.words import MatmulFormat

_LARGEST: dict[MatmulFormat, float] = {"int8": 127.0, "fp8": 448.0}
_CAPABILITY: dict[MatmulFormat, tuple[int, int]] = {"int8": (7, 5), "fp8": (8, 9)}  # Turing, Ada
_LARGEST_ROTATION = 128  # the power of two in SD3.5-large's width; 512 would cost a fifth of the MLP's own products
_FEWEST_ROWS = 32  # torch's integer product on CUDA wants more than 16


def block_packing(settings: Settings, device: torch.device) -> Packing | None:
    """Returns how the base's blocks are packed; None: not at all. Raises ParameterError for what cannot be had here."""
    if settings.matmul_dtype is not None:
        rotated = settings.matmul_dtype == "int8" if settings.matmul_rotation is None else settings.matmul_rotation
        return EightBitProducts(settings.matmul_dtype, rotated=rotated, device=device)
    return None if settings.base_format == "dense" else PACKINGS[settings.base_format]()


class EightBitProducts(Packing):
    """How a linear layer multiplies in eight bits; the packing of its weight.

    Raises ParameterError for a card that is older than such products.
    """

    def __init__(self, format: MatmulFormat, *, rotated: bool, device: torch.device) -> None:
        self._format: MatmulFormat = format
        self._is_rotated = rotated
        self._signs: dict[int, Tensor] = {}
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY[format]:
            raise ParameterError(f"--matmul-dtype {format}: this card has no such products: leave it out")

    def pack(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rotated weight in eight bits, and the scale of each output channel."""
        if self._is_rotated:
            side = rotation_side(weight_OI.shape[1])
            self._signs[side] = hadamard_signs(side).to(weight_OI.device)
        return self._rounded(self._rotated(weight_OI.float()))

    def dense(self, linear: PackableLinear, dtype: torch.dtype) -> Tensor:
        scaled_OI = linear.weight.detach().float() * linear.weight_scale[:, None]
        return self._rotated(scaled_OI).to(dtype)  # the rotation is its own inverse

    def output(self, x: Tensor, linear: PackableLinear) -> Tensor:
        values_MI, scale_M = self._rounded(self._rotated(x.flatten(0, -2)))
        product_MO = scaled_product(values_MI, scale_M, linear.weight.detach().t(), linear.weight_scale.detach())
        return (product_MO + linear.bias.float()).to(x.dtype).view(*x.shape[:-1], -1)

    def input_gradient(self, gradient: Tensor, linear: PackableLinear) -> Tensor:
        folded_MO = gradient.flatten(0, -2).float() * linear.weight_scale.detach()
        values_MO, scale_M = self._rounded(folded_MO)
        ones_I = linear.weight_scale.new_ones(linear.in_features)
        product_MI = scaled_product(values_MO, scale_M, linear.weight.detach(), ones_I)
        return self._rotated(product_MI.to(gradient.dtype)).to(gradient.dtype).view(*gradient.shape[:-1], -1)

    def _rotated(self, x_MI: Tensor) -> Tensor:
        """Returns x R in float32. The signs are exact in any format, and the factor is applied after the sum."""
        if not self._is_rotated:
            return x_MI.float()
        side = rotation_side(x_MI.shape[1])
        signs_RR = self._signs[side].to(x_MI)  # a streamed block's weight is unpacked where it lies
        return (x_MI.unflatten(-1, (-1, side)) @ signs_RR).flatten(1).float() * side**-0.5

    def _rounded(self, x_MK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns eight-bit values and the scale of each row."""
        largest = _LARGEST[self._format]
        scale_M = x_MK.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / largest
        scaled_MK = x_MK / scale_M[:, None]
        if self._format == "int8":
            return scaled_MK.round().to(torch.int8), scale_M
        return scaled_MK.clamp(-largest, largest).to(torch.float8_e4m3fn), scale_M


def rotation_side(in_features: int) -> int:
    """Returns the largest power of two that divides a width, at most 128."""
    return min(in_features & -in_features, _LARGEST_ROTATION)


def hadamard_signs(side: int) -> Tensor:
    """Returns the symmetric matrix of +1 and -1 whose square is `side` times the identity (Sylvester's)."""
    signs_RR = torch.ones(1, 1)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while signs_RR.shape[0] < side:
        signs_RR = torch.kron(pair, signs_RR)
    return signs_RR


def scaled_product(values_MK: Tensor, scale_M: Tensor, weight_KN: Tensor, scale_N: Tensor) -> Tensor:
    """Returns the product of eight-bit matrices times the scales of rows and columns."""
    if values_MK.dtype == torch.int8:
        return integer_product(values_MK, weight_KN).float() * scale_M[:, None] * scale_N
    if values_MK.device.type != "cuda":
        return values_MK.float() @ weight_KN.float() * scale_M[:, None] * scale_N
    columns_KN = weight_KN if weight_KN.stride(0) == 1 else weight_KN.t().contiguous().t()  # as the product wants it
    scales = (scale_M[:, None].contiguous(), scale_N[None].contiguous())
    return torch.ops.aten._scaled_mm(values_MK, columns_KN, *scales, out_dtype=torch.bfloat16)


def integer_product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Returns the int32 product of int8 matrices: torch's on CUDA, else one in float64, where every sum is exact."""
    if a_MK.device.type != "cuda":
        return (a_MK.double() @ b_KN.double()).to(torch.int32)
    missing = max(0, _FEWEST_ROWS - a_MK.shape[0])
    padded_MK = torch.nn.functional.pad(a_MK, (0, 0, 0, missing)) if missing else a_MK
    return torch.ops.aten._int_mm(padded_MK, b_KN)[: a_MK.shape[0]]
