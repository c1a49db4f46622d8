"""The one linear layer of the MMDiT: the place where adapters attach and where weights may be stored packed."""

# B batch, L tokens, I in features, O out features, C channels, p q offsets inside a patch

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearAdapter(Protocol):
    """What replaces a Linear's forward: usually linear.base(x) plus a trained term."""

    def __call__(self, x: Tensor, linear: "Linear") -> Tensor: ...


class WeightPacking(Protocol):
    """How a packed weight is read. The packed tensors are parameters of the layer, found by name."""

    def dense(self, linear: "Linear", dtype: torch.dtype) -> Tensor:
        """Returns the weight [O, I] in `dtype`, without gradient."""
        ...

    def output(self, x: Tensor, linear: "Linear") -> Tensor:
        """Returns x W^T + b, without gradient."""
        ...

    def input_gradient(self, gradient: Tensor, linear: "Linear") -> Tensor:
        """Returns the gradient of x from that of the output."""
        ...


class Linear(nn.Module):
    """y = x W^T + b with a frozen weight, which an adapter may change and a packing may store in fewer bits.

    Parameters are created uninitialised and frozen: checkpoints fill them, adapters carry what is trained.
    `adapter` and `packing` are plain attributes, so that state_dict() holds the checkpoint's own keys.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = _frozen(self._weight_shape(), device, dtype)
        self.bias = _frozen((out_features,), device, dtype)
        self.adapter: LinearAdapter | None = None
        self.packing: WeightPacking | None = None

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "adapter":  # an adapter that is a Module must not become a submodule of the base
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that the layer was loaded in; the weight itself may be packed, the bias never is."""
        return self.bias.dtype

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the base weight as a matrix [O, I], unpacked if need be, in `dtype` or the dtype it was loaded in."""
        dtype = dtype or self.compute_dtype
        if self.packing is not None:
            return self.packing.dense(self, dtype)
        return self.weight.flatten(1).to(dtype)

    def base(self, x: Tensor) -> Tensor:
        """Returns x W^T + b for the base weight alone."""
        if self.packing is not None:
            kind = x.device.type
            x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
            return cast(Tensor, _PackedProduct.apply(x, self))
        return functional.linear(x, self.weight.flatten(1), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) if self.adapter is None else self.adapter(x, self)


class PatchProjection(Linear):
    """A p x p convolution of stride p, written as the linear map that it is on patches flattened in (c, p, q) order."""

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        patch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.in_channels = in_channels
        self.patch_size = patch_size
        super().__init__(in_channels * patch_size**2, out_features, device=device, dtype=dtype)

    def _weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_channels, self.patch_size, self.patch_size)


class _PackedProduct(torch.autograd.Function):
    """The product with a packed weight, as its packing takes it; what is unpacked for it never outlives its use."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Linear) -> Tensor:
        assert linear.packing is not None
        ctx.linear = linear
        with torch.autocast(x.device.type, enabled=False):
            return linear.packing.output(x, linear)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad,) = grads
        return ctx.linear.packing.input_gradient(grad, ctx.linear), None


def _frozen(shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
