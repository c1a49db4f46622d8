"""One block's weights in one flat buffer of bytes, so that one copy moves them all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd3pipe.memory.host import HostMemory

ALIGNMENT = 256  # bytes; what cudaMalloc promises, and enough for every kernel's widest load
MODULATION = "adaLN_modulation"  # part of the name of every modulation weight


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatTensor:
    """Where one tensor lies in a flat buffer."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def view(self, buffer: Tensor) -> Tensor:
        """Returns the tensor inside `buffer`."""
        return buffer[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatLayout:
    """The places of all tensors of a block: first the body, then the modulation, each tensor aligned.

    Two blocks with equal layouts can take turns in one ring.
    """

    tensors: tuple[FlatTensor, ...]
    body_bytes: int
    total_bytes: int

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Returns every tensor inside `buffer`, in order."""
        return [tensor.view(buffer) for tensor in self.tensors]


def is_modulation(name: str) -> bool:
    """Returns whether a parameter of a block depends on the timestep and the pooled text only."""
    return MODULATION in name


def flat_layout(parameters: Sequence[tuple[str, Tensor]]) -> FlatLayout:
    """Returns the layout of named parameters, the modulation after the body."""
    tensors, end, body_end = [], 0, 0
    for name, parameter in sorted(parameters, key=lambda item: is_modulation(item[0])):
        tensor = FlatTensor(name=name, offset=end, shape=tuple(parameter.shape), dtype=parameter.dtype)
        tensors.append(tensor)
        end = -(-(end + tensor.nbytes) // ALIGNMENT) * ALIGNMENT
        if not is_modulation(name):
            body_end = end
    return FlatLayout(tensors=tuple(tensors), body_bytes=body_end, total_bytes=end)


class FlatBlock:
    """A block whose streamed parameters lie in one host buffer, and may be bound to a copy on the device for a while.

    `with_modulation` says whether the modulation is part of the buffer; otherwise those parameters are left alone.
    The parameters stay the same objects for good: only the memory behind them changes.
    """

    def __init__(self, block: nn.Module, memory: HostMemory, *, with_modulation: bool) -> None:
        named = [(name, p) for name, p in block.named_parameters() if with_modulation or not is_modulation(name)]
        self.layout = flat_layout(named)
        self.host = memory.buffer(self.layout.total_bytes)
        self._host_views = self.layout.views(self.host)
        parameters = dict(named)
        self._ordered = [parameters[tensor.name] for tensor in self.layout.tensors]
        for parameter, view in zip(self._ordered, self._host_views, strict=True):
            view.copy_(parameter.data)
            parameter.data = view  # the parameter's former memory is freed here, tensor by tensor

    def bind(self, views: Sequence[Tensor]) -> None:
        """Lets the parameters read from `views`, which hold a copy of the host buffer."""
        bind(self._ordered, views)

    def unbind(self) -> None:
        """Lets the parameters read from the host buffer again."""
        self.bind(self._host_views)


def bind(parameters: Iterable[nn.Parameter], tensors: Iterable[Tensor]) -> None:
    """Lets parameters, which stay the same objects, read from other memory."""
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor
