"""Attaches adapter layers to a model, and holds them together: parameters, strength, dropout keys, state."""

# B batch

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sd3pipe.adapters.dropout import BatchState
from sd3pipe.adapters.kind import AdaptedLinear, Adapter, AdapterLayer, Delta, LayerSetup, plain_adapter
from sd3pipe.adapters.kinds import KINDS, check_option, check_spec
from sd3pipe.adapters.sizes import Sizes, same_size
from sd3pipe.adapters.targets import AdapterSpec, DropoutRates, learning_rates, target_ranks
from sd3pipe.console import listed
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.fingerprint import digest_bytes


class LinearSlot(AdaptedLinear, Protocol):
    """A linear layer of the model with the place where an adapter goes."""

    in_features: int
    out_features: int
    adapter: Any  # the layer's own callable type, which this room does not import
    weight: nn.Parameter


class AdaptableModel(Protocol):
    def linears(self) -> Iterator[tuple[str, Any]]:
        """Yields every linear layer (a LinearSlot) with its native module path."""
        ...

    def register_forward_pre_hook(self, hook: Callable[..., None], *, with_kwargs: bool) -> RemovableHandle:
        """Has `hook` called with the arguments of each forward pass, as torch's modules do."""
        ...


class AdapterNetwork(nn.Module):
    """The layers of one adapter, by module path. They act as long as they are attached."""

    def __init__(
        self,
        model: AdaptableModel,
        layers: Mapping[str, AdapterLayer],
        slots: Mapping[str, LinearSlot],
        batch: BatchState,
    ) -> None:
        super().__init__()
        self.layers = dict(layers)
        self._slots = {path: slots[path] for path in layers}  # in a dict: the base's layers are no submodules of ours
        self._model = [model]  # in a list, for the same reason
        self._batch = batch
        self._hook: RemovableHandle | None = None
        for path, layer in layers.items():
            self.add_module(path.replace(".", "_"), layer)
        self.attach()

    def attach(self) -> None:
        """Puts every layer into its place in the model."""
        for path, layer in self.layers.items():
            assert self._slots[path].adapter in (None, layer), f"{path} already has an adapter: detach it first"
            self._slots[path].adapter = layer
        if self._hook is None and any(layer.follows_noise for layer in self.layers.values()):
            self._hook = self._model[0].register_forward_pre_hook(self._see_timesteps, with_kwargs=True)

    def detach(self) -> None:
        """Takes every layer out of the model, which then is the base model again."""
        for slot in self._slots.values():
            slot.adapter = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @contextlib.contextmanager
    def detached(self) -> Iterator[None]:
        """Makes the model the base model for the length of a block."""
        self.detach()
        try:
            yield
        finally:
            self.attach()

    def set_multiplier(self, multiplier: float) -> None:
        """Sets the strength at which all layers act."""
        for layer in self.layers.values():
            layer.multiplier = multiplier

    def set_dropout_keys(self, keys_B: Tensor | None) -> None:
        """Gives each sample of the next batch the int64 key that its dropout masks are made from."""
        self._batch.keys = keys_B

    def set_timesteps(self, timesteps_B: Tensor) -> None:
        """Gives each sample of the batch its noise level, 1000 sigma, where the model's forward is not what runs."""
        self._batch.timesteps = timesteps_B

    def _see_timesteps(self, model: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.set_timesteps(named["timesteps_B"] if "timesteps_B" in named else args[1])

    def parameter_groups(
        self, spec: AdapterSpec, learning_rate: float, *, loraplus_lr_ratio: float = 1.0
    ) -> list[dict[str, Any]]:
        """Returns the optimizer's groups, one per learning rate; LoRA+ (arXiv:2402.12354) multiplies that of `up`."""
        if loraplus_lr_ratio != 1.0:
            check_option(spec.algorithm, "loraplus_lr_ratio")
        rates = learning_rates(self.layers, spec, learning_rate)
        groups: dict[float, list[nn.Parameter]] = {}
        for path, layer in self.layers.items():
            for name, parameter in layer.named_parameters():
                rate = rates[path] * (loraplus_lr_ratio if name == "up" else 1.0)
                groups.setdefault(rate, []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if rate > 0.0]

    def deltas(self) -> dict[str, Delta]:
        """Returns the adapter as factors on the CPU, by module path: what file formats write before the next step."""
        return {path: layer.delta() for path, layer in self.layers.items()}

    def load(self, adapter: Adapter) -> None:
        """Takes over the factors of an adapter of exactly this shape. Raises InputError."""
        missing, excess = self.layers.keys() - adapter.keys(), adapter.keys() - self.layers.keys()
        if missing or excess:
            words = (("lacks", missing), ("has more", excess))
            told = "; ".join(f"{word} {listed(sorted(paths))}" for word, paths in words if paths)
            raise InputError(f"the adapter does not fit the network: {told}")
        for path, layer in self.layers.items():
            try:
                layer.load(_as_trained(adapter[path], self._slots[path]))
            except InputError as error:
                raise InputError(f"{path}: {error}") from error

    @torch.no_grad()
    def limit_norms(self, largest: float) -> tuple[Tensor, Tensor]:
        """Shrinks every layer whose norm exceeds `largest`; returns how many, and the mean norm after."""
        limited = [layer.limit_norm(largest) for layer in self.layers.values()]
        return torch.stack([shrunk for _, shrunk in limited]).sum(), torch.stack([norm for norm, _ in limited]).mean()


def attach(
    model: AdaptableModel,
    spec: AdapterSpec,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterNetwork:
    """Attaches a fresh adapter, which changes nothing; start values depend on the seed and the module path alone."""
    slots: dict[str, LinearSlot] = dict(model.linears())
    batch = BatchState()
    layers = _fresh_layers(_sizes(slots), spec, batch, device=device, dtype=dtype)
    for path, layer in layers.items():
        layer.reset(torch.Generator().manual_seed(_number(f"{spec.seed}/{path}")))
        layer.measure(slots[path])
    return AdapterNetwork(model, layers, slots, batch)


def _fresh_layers(
    sizes: Sizes, spec: AdapterSpec, batch: BatchState, *, device: torch.device | str | None, dtype: torch.dtype
) -> dict[str, AdapterLayer]:
    """Returns the layers of an adapter, by module path, without start values."""
    check_spec(spec)
    layers: dict[str, AdapterLayer] = {}
    for path, rank in target_ranks(sizes, spec).items():
        setup = LayerSetup(
            in_features=sizes[path][1],
            out_features=sizes[path][0],
            rank=rank,
            alpha=_alpha(spec, rank),
            dropout=spec.dropout,
            batch=batch,
            stream=_number(path),
            device=device,
            dtype=dtype,
        )
        layers[path] = KINDS[spec.algorithm].fresh_layer(path, setup, spec)
    return layers


def attach_deltas(
    model: AdaptableModel,
    adapter: Adapter,
    *,
    dropout: DropoutRates | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterNetwork:
    """Attaches an adapter with the kinds, ranks and alphas it was saved with. Raises InputError if it does not fit."""
    slots: dict[str, LinearSlot] = dict(model.linears())
    check_fit(_sizes(slots), adapter)
    batch = BatchState()
    layers: dict[str, AdapterLayer] = {}
    for path, read in adapter.items():
        delta = _as_trained(read, slots[path])
        setup = LayerSetup(
            in_features=slots[path].in_features,
            out_features=slots[path].out_features,
            rank=delta.rank or 1,
            alpha=delta.alpha,
            dropout=dropout or DropoutRates(),
            batch=batch,
            stream=_number(path),
            device=device,
            dtype=dtype,
        )
        layers[path] = delta.layer(setup)
        layers[path].load(delta)
    return AdapterNetwork(model, layers, slots, batch)


@torch.no_grad()
def merge_into(model: AdaptableModel, adapter: Adapter, multiplier: float = 1.0) -> None:
    """Adds an adapter to the weights of a model for good. Raises InputError if it does not fit."""
    slots: dict[str, LinearSlot] = dict(model.linears())
    check_fit(_sizes(slots), adapter)
    for path, delta in plain_adapter(adapter).items():
        weight = slots[path].weight
        if getattr(slots[path], "packing", None) is not None:
            raise ParameterError("base_weights need a base in 16 or 32 bit: they are added before it is quantised")
        merged = delta.merged(weight.detach().flatten(1).to("cpu"), multiplier)
        weight.copy_(merged.view_as(weight))
        bias_change = delta.bias_change()
        if bias_change is not None:
            slots[path].bias.add_(bias_change.to(slots[path].bias), alpha=multiplier)


def check_fit(sizes: Sizes, adapter: Adapter) -> None:
    """Raises InputError where the model lacks a module of the adapter, or has it in another size."""
    if not adapter:
        raise InputError("the adapter changes text encoders alone, and nothing in the MMDiT")
    foreign = adapter.keys() - sizes.keys()
    if foreign:
        raise InputError(f"the adapter does not fit the model, which has no {listed(sorted(foreign))}")
    for path, delta in adapter.items():
        if not same_size(delta.shape, sizes[path]):
            raise InputError(
                f"the adapter does not fit the model: {path} is {list(sizes[path])} there, "
                f"{list(delta.shape)} in the adapter"
            )


def _sizes(slots: Mapping[str, LinearSlot]) -> Sizes:
    return {path: (slot.out_features, slot.in_features) for path, slot in slots.items()}


def _as_trained(delta: Delta, slot: LinearSlot) -> Delta:
    """Returns a delta in the numbers of our layers, whoever's readers it was made for, or whatever trained it."""
    return delta if delta.suits("native") else delta.suited("native", slot.dense_weight().to("cpu"))


def _alpha(spec: AdapterSpec, rank: int) -> float:
    """Returns the alpha that files carry: it gives the right strength as alpha / rank, and is rounded as files do."""
    alpha = float(KINDS[spec.algorithm].alpha_of(spec, rank))
    if spec.rs_lora:
        alpha *= math.sqrt(rank)  # rsLoRA (arXiv:2312.03732) divides by sqrt(rank)
    return float(torch.tensor(alpha, dtype=torch.float32))


def _number(text: str) -> int:
    """Returns 63 bits that depend on `text` alone."""
    return int.from_bytes(digest_bytes(text.encode())[:8], "little") >> 1
