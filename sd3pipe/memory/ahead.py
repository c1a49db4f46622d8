"""Modulation vectors computed on the host, one step ahead: their weights need no device memory and no copies."""

# B batch, D width, P pooled width, K modulation width

import contextlib
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, Self, cast

import torch
from torch import Tensor, nn

from sd3pipe.errors import ParameterError
from sd3pipe.memory.model import Pair, StreamedModel, through_weight

_SIDES = ("context_block", "x_block")


class ModulationLinear(Protocol):
    """The adaLN layer of one side of a block."""

    adapter: Callable[[Tensor, object], Tensor] | None
    bias: Tensor

    def base(self, x: Tensor) -> Tensor: ...

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor: ...


class PendingModulation:
    """Modulation vectors that are being computed; inside the `with`, the model's forward pass uses them."""

    def __init__(self, owner: "AheadModulation", vectors: dict[int, Future[Pair]]) -> None:
        self._owner = owner
        self.vectors = vectors

    def __enter__(self) -> Self:
        self._owner.pending = self
        return self

    def __exit__(self, *error: object) -> None:
        self._owner.pending = None


class AheadModulation:
    """Computes base modulation on the host; an adapter on adaLN adds its term on the device.

    Vectors computed on another device kind differ from the device's own by rounding. Embedders must be frozen and
    without adapters, since no gradient reaches them from here.
    """

    def __init__(self, mmdit: nn.Module, blocks: Sequence[int], device: torch.device) -> None:
        model = self._model = cast(StreamedModel, mmdit)
        self._device = device
        self._embedders = (model.t_embedder, model.y_embedder)
        self._on_host = tuple(copy.deepcopy(m).to("cpu") for m in self._embedders) if device.type != "cpu" else None
        self._linears = {index: modulation_linears(mmdit, index) for index in blocks}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="modulation")
        self.pending: PendingModulation | None = None
        self._unprepared: tuple[Tensor, dict[int, Future[Pair]]] | None = None

    def close(self) -> None:
        """Ends the worker thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def prepare(self, timesteps_B: Tensor, pooled_BP: Tensor) -> PendingModulation:
        """Starts computing all vectors for a coming forward pass from tensors on the host.

        Autocast, where the forward pass runs under it, must be on here, too.
        """
        t_embedder, y_embedder = self._on_host or self._embedders
        autocast = self._autocast()

        def condition() -> Tensor:
            with _host_autocast(autocast), torch.no_grad():
                return self._model.embed_condition(t_embedder, y_embedder, timesteps_B, pooled_BP)

        return PendingModulation(self, self._start(self._worker.submit(condition), autocast))

    def modulation(self, index: int, condition_BD: Tensor) -> Pair:
        """Returns the vectors of one block on the device, with its adapters' terms.

        Without pending ones, the first block asked for starts the host on all of them, so that it stays ahead of the
        device within the forward pass.
        """
        layers = (layer for embedder in self._embedders for layer in embedder.modules())
        if condition_BD.requires_grad or any(getattr(layer, "adapter", None) is not None for layer in layers):
            raise ParameterError(
                "modulation = ahead computes without the adapters of t_embedder and y_embedder: "
                "use modulation = stream or resident, or train no embedders"
            )
        if self.pending is not None:
            vectors = self.pending.vectors
        else:
            if self._unprepared is None or self._unprepared[0] is not condition_BD:
                on_host: Future[Tensor] = Future()
                on_host.set_result(condition_BD.detach().to("cpu"))
                self._unprepared = (condition_BD, self._start(on_host, self._autocast()))
            vectors = self._unprepared[1]
        linears = zip(self._linears[index], vectors[index].result(), strict=True)
        context_BK, x_BK = (self._adapted(linear, vector_BK, condition_BD) for linear, vector_BK in linears)
        return context_BK, x_BK

    def _start(self, condition: Future[Tensor], autocast: torch.dtype | None) -> dict[int, Future[Pair]]:
        return {index: self._worker.submit(self._block, index, condition, autocast) for index in self._linears}

    @torch.no_grad()
    def _block(self, index: int, condition: Future[Tensor], autocast: torch.dtype | None) -> Pair:
        with _host_autocast(autocast):
            context_BK, x_BK = (linear.base(condition.result()) for linear in self._linears[index])
        if self._device.type == "cuda":  # else the host would wait for the device at each block
            return context_BK.pin_memory(), x_BK.pin_memory()
        return context_BK, x_BK

    def _adapted(self, linear: ModulationLinear, base_BK: Tensor, condition_BD: Tensor) -> Tensor:
        base_BK = base_BK.to(self._device, non_blocking=True)
        if linear.adapter is None:
            return base_BK
        if through_weight(linear.adapter):
            raise ParameterError(
                "modulation = ahead knows the base's product before an adapter has turned its input (OFTv2): use "
                "modulation = stream or resident, or leave modulation out of train_layers"
            )
        return linear.adapter(condition_BD, _Computed(linear, base_BK))

    def _autocast(self) -> torch.dtype | None:
        kind = self._device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _Computed:
    """A linear layer to an adapter's eyes, whose base product is known already."""

    def __init__(self, linear: ModulationLinear, base_BK: Tensor) -> None:
        self._linear = linear
        self._base_BK = base_BK

    @property
    def bias(self) -> Tensor:
        return self._linear.bias.to(self._base_BK.device)

    def base(self, x: Tensor) -> Tensor:
        return self._base_BK

    def dense_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._linear.dense_weight(dtype).to(self._base_BK.device)


def modulation_linears(mmdit: nn.Module, index: int) -> tuple[ModulationLinear, ...]:
    """Returns the adaLN layers of a block, that of the context first."""
    names = (f"joint_blocks.{index}.{side}.adaLN_modulation.1" for side in _SIDES)
    return tuple(cast(ModulationLinear, mmdit.get_submodule(name)) for name in names)


def _host_autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
