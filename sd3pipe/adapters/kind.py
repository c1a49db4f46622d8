"""What a kind of adapter is: the layer that trains it, and its factors, which are all that others know of it (Delta).

An adapter is a mapping from module path ("joint_blocks.0.x_block.attn.qkv") to deltas. kinds.py lists the kinds.
"""

# B batch, I in features, O out features, R rank; a name without axes has any between B and I

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn

from sd3pipe.adapters.dropout import BatchState, as_int64, kept
from sd3pipe.adapters.fusing import Rows, rows_of_part
from sd3pipe.adapters.keymap import Form
from sd3pipe.adapters.parts import LayerParts
from sd3pipe.adapters.targets import QKV_PARTS, AdapterSpec, DropoutRates
from sd3pipe.errors import InputError, ParameterError

log = logging.getLogger(__name__)

_KINDS_OF_DROPOUT = 3


class AdaptedLinear(Protocol):
    """What an adapter layer asks of the linear layer that it is attached to."""

    @property
    def bias(self) -> Tensor: ...

    def base(self, x: Tensor) -> Tensor:
        """Returns x W^T + b for the base weight alone."""
        ...

    def dense_weight(self) -> Tensor:
        """Returns the base weight [O, I], unpacked if need be."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSetup:
    """What every kind of layer is built from. `stream` is the layer's number, `batch` the whole network's."""

    in_features: int
    out_features: int
    rank: int
    alpha: float
    dropout: DropoutRates
    batch: BatchState
    stream: int
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def parameter(self, *shape: int) -> nn.Parameter:
        """Returns an uninitialised trained tensor."""
        return nn.Parameter(torch.empty(shape, device=self.device, dtype=self.dtype))


class AdapterLayer(nn.Module, ABC):
    """base(x) + multiplier * term(x). Training drops parts of the term; evaluation never does."""

    follows_noise: ClassVar[bool] = False  # whether it acts by the noise level of each sample
    through_weight: ClassVar[bool] = False  # whether its own gradient goes through the base's weight
    _dropout_streams: Tensor  # one for each kind of dropout

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__()
        self.setup = setup
        self.multiplier = 1.0
        numbers = [as_int64(setup.stream * _KINDS_OF_DROPOUT + kind) for kind in range(_KINDS_OF_DROPOUT)]
        self.register_buffer("_dropout_streams", torch.tensor(numbers, device=setup.device), persistent=False)

    def forward(self, x: Tensor, linear: AdaptedLinear) -> Tensor:
        return linear.base(x) + self.acting(self.term(x))

    @abstractmethod
    def term(self, x: Tensor) -> Tensor:
        """Returns what the layer adds to the output [B, ..., O] for x [B, ..., I]; a rotation adds to what it turns."""

    @abstractmethod
    def reset(self, generator: torch.Generator) -> None:
        """Draws the start values on the CPU, so that they are the same on every device; the term is then zero."""

    def measure(self, linear: AdaptedLinear) -> None:
        """Sets start values that depend on the base weight."""

    @abstractmethod
    def delta(self) -> "Delta":
        """Returns the change of the weight as its factors on the CPU, detached; they may be the layer's own memory."""

    @torch.no_grad()
    def take(self, delta: "Delta") -> None:
        """Copies factors that were checked to be of this layer's kind, shape and scale."""
        for parameter, tensor in zip(self.parameters(), delta.tensors().values(), strict=True):
            parameter.copy_(tensor)

    def load(self, delta: "Delta") -> None:
        """Takes over trained factors. Raises InputError where kind, shape, rank or scale differ."""
        ours = self.delta()
        if (ours.algorithm, ours.shape, ours.rank) != (delta.algorithm, delta.shape, delta.rank):
            raise InputError(f"the file has {_described(delta)}, the network {_described(ours)}")
        if not math.isclose(ours.scale, delta.scale, rel_tol=1e-5):
            raise InputError(f"the file acts at alpha / rank {delta.scale:g}, the network at {ours.scale:g}")
        self.take(delta)

    def limit_norm(self, largest: float) -> tuple[Tensor, Tensor]:
        """Shrinks the factors where the norm of their product exceeds `largest`.

        Returns the norm that remains and whether the factors shrank, both without a host sync. Raises ParameterError
        for a kind that does not have the option scale_weight_norms.
        """
        raise ParameterError(f"scale_weight_norms limits products of two factors, and {type(self).__name__} has none")

    def acting(self, term: Tensor) -> Tensor:
        """Returns the term at its strength, without that of dropped samples; others stay as in sd-scripts."""
        rate = self.setup.dropout.module
        if self.training and rate:
            term = term * self._kept((term.shape[0],) + (1,) * (term.ndim - 1), rate, kind=0)
        return term if self.multiplier == 1.0 else term * self.multiplier

    def drop_ranks(self, low: Tensor) -> Tensor:
        """Drops rank activations [B, ..., R], and whole ranks of some samples; what stays is scaled up."""
        dropout = self.setup.dropout
        if self.training and dropout.neuron:
            low = low * self._kept(tuple(low.shape), dropout.neuron, kind=1) / (1.0 - dropout.neuron)
        if self.training and dropout.rank:
            shape = (low.shape[0], *(1,) * (low.ndim - 2), low.shape[-1])
            low = low * self._kept(shape, dropout.rank, kind=2) / (1.0 - dropout.rank)
        return low

    def _kept(self, shape: tuple[int, ...], rate: float, *, kind: int) -> Tensor:
        keys_B = self.setup.batch.keys
        assert keys_B is not None, "dropout needs AdapterNetwork.set_dropout_keys before each training batch"
        return kept(keys_B, self._dropout_streams[kind], shape, rate)


class Product(NamedTuple):
    """A change of the weight that is scale * up down."""

    up: Tensor
    down: Tensor
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delta(ABC):
    """What an adapter does to one linear layer, as its factors: the form that all layers and file formats share.

    `options` are the options that only some kinds have, and this one does; sd-scripts trains the kind with
    `network_module` and `network_args`. Where `needs_base` is set the change depends on the base weight, and `dense` is
    the rest of it.
    """

    algorithm: ClassVar[str]
    title: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()
    default_alpha: ClassVar[float | None] = None  # without one given; None: the rank
    network_module: ClassVar[str] = "lycoris.kohya"
    network_args: ClassVar[Mapping[str, str]] = {}
    part_names: ClassVar[Mapping[str, tuple[str, ...]]]  # part -> ends of the keys that stand for it in files
    file_prefix: ClassVar[str] = ""  # before the names of tensors() in a file
    layer_class: ClassVar[type[AdapterLayer]]
    note_keys: ClassVar[frozenset[str]] = frozenset()  # of what notes() may return
    in_pipelines: ClassVar[bool] = True  # whether what loads LoRAs in diffusers loads the kind's diffusers form
    lost: ClassVar[str] = ""  # by plain(), as a warning says it

    alpha: float

    @property
    def rank(self) -> int:
        """The rank that alpha is divided by; 0 where alpha does not count."""
        return 0

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The out and in features of the layer; 0 for the side that the factors do not tell."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    @property
    def needs_base(self) -> bool:
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Returns the trained tensors by name, in the order of the layer's parameters."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Returns the delta with other values under the names of tensors()."""
        return replace(self, **tensors)

    def on(self, device: torch.device | str) -> Self:
        """Returns the delta with its tensors on a device."""
        return self.with_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def plain(self) -> "Delta":
        """Returns what other programs can make of it: itself, or a kind without what they do not know."""
        return self

    def cast(self, dtype: torch.dtype) -> Self:
        """Returns the delta as files of a number format hold it."""
        return self.with_tensors({name: tensor.to(dtype) for name, tensor in self.tensors().items()})

    def balanced(self) -> Self:
        """Returns the same change by factors that few bits hold better, where there are such."""
        return self

    # --- what it does to the layer

    @abstractmethod
    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the change of the weight [O, I]."""

    def product(self) -> Product | None:
        """Returns `dense` as a product of two thin matrices, None where it is none."""
        return None

    def change(self, weight_OI: Tensor, rows: Rows | None = None) -> Tensor:
        """Returns the change of a base weight in fp32; with `rows` that weight has those rows of the layer alone."""
        change_OI = self.dense()
        return change_OI if rows is None else rows(change_OI)

    def merged(self, weight_OI: Tensor, strength: float = 1.0, rows: Rows | None = None) -> Tensor:
        """Returns the base weight with the adapter in it, in fp32: W + strength (W' - W)."""
        weight_OI = weight_OI.float()
        return weight_OI + strength * self.change(weight_OI, rows)

    def bias_change(self) -> Tensor | None:
        """Returns the change of the layer's bias [O], None where it stays."""
        return None

    def norm(self) -> float:
        """Returns the Frobenius norm of `dense`."""
        return float(torch.linalg.vector_norm(self.dense(torch.float64)))

    def difference(self, other: "Delta") -> float:
        """Returns |self - other| / |self| of the effective changes; 0 where all factors are equal bit for bit."""
        if self.same_as(other):
            return 0.0
        comparable = type(self) is type(other) or not (self.needs_base or other.needs_base)
        if self.shape != other.shape or not comparable or self.notes() != other.notes():
            return math.inf
        return self._difference(other)

    def _difference(self, other: "Delta") -> float:
        apart_OI = self.dense(torch.float64) - other.dense(torch.float64)
        return ratio(float(torch.linalg.vector_norm(apart_OI)), self.norm())

    def same_as(self, other: "Delta") -> bool:
        """Whether two deltas are equal bit for bit, whatever number format holds them."""
        ours, theirs = self.tensors(), other.tensors()
        return (
            (self.algorithm, self.scale, self.notes()) == (other.algorithm, other.scale, other.notes())
            and ours.keys() == theirs.keys()
            and all(torch.equal(tensor.float(), theirs[name].float()) for name, tensor in ours.items())
        )

    def scaled(self, weight: float) -> Self:
        """Returns the change times `weight`."""
        return replace(self, alpha=self.alpha * weight)

    # --- fused layers

    @abstractmethod
    def with_rows(self, rows: Rows) -> "Delta":
        """Returns the change of some rows, or of all in another order. Raises InputError where it has no such part."""

    def split(self) -> Mapping[int, "Delta"]:
        """Returns the changes of q (0), k (1) and v (2)."""
        return {index: self.with_rows(rows_of_part(index)) for index in range(QKV_PARTS)}

    @classmethod
    def join(cls, parts: Mapping[int, Any]) -> "Delta | None":
        """Returns the one change of a fused layer whose q, k and v rows change as given, or do not if missing.

        All are of this kind; None where no single delta of it does that.
        """
        return None

    # --- files

    @classmethod
    def reads(cls, parts: Set[str], metadata: Mapping[str, str]) -> bool:
        """Whether these tensors of a layer in a file, with the file's metadata, are all of this kind."""
        return parts <= {"alpha", *cls.part_names}

    @classmethod
    @abstractmethod
    def read(cls, parts: LayerParts) -> Self:
        """Returns the delta that a file's tensors of one layer make. Raises ValueError."""

    def file_tensors(self, form: Form, *, patches: bool) -> dict[str, Tensor]:
        """Returns the tensors of a file by the end of their key; `patches` asks for a convolution's axes."""
        return {self.file_prefix + name: tensor for name, tensor in self.tensors().items()}

    def notes(self) -> dict[str, str]:
        """Returns the metadata without which a native form would be read wrongly."""
        return {}

    def held_by(self, form: Form) -> Self:
        """Returns the same change as a form holds it: diffusers' has no alpha. Raises ParameterError if it cannot."""
        if form == "diffusers":
            raise ParameterError(
                f"diffusers has no form for {self.algorithm}: export it as comfyui, or turn it into a LoRA with "
                "`sd3pipe adapter resize --rank N`"
            )
        return self

    def suits(self, form: Form) -> bool:
        """Whether the readers of a form, or our own layers for "native", act by these numbers as is meant."""
        return True

    def suited(self, form: Form, weight_OI: Tensor) -> "Delta":
        """Returns the same change of `weight_OI` in numbers that suit a form."""
        return self

    # --- layers

    @classmethod
    def alpha_of(cls, spec: AdapterSpec, rank: int) -> float:
        """Returns the alpha that a fresh layer of a rank has, by what the user said of it or did not."""
        default = rank if cls.default_alpha is None else cls.default_alpha
        return default if spec.alpha is None else spec.alpha

    @property
    def trainable(self) -> bool:
        """Whether training can go on from these factors."""
        return True

    @classmethod
    def fresh_layer(cls, path: str, setup: LayerSetup, spec: AdapterSpec) -> AdapterLayer:
        """Returns the layer that trains this kind, without values."""
        return cls.layer_class(setup)

    def layer(self, setup: LayerSetup) -> AdapterLayer:
        """Returns a layer that can load these factors."""
        return self.layer_class(setup)


Adapter: TypeAlias = Mapping[str, Delta]


def plain_adapter(adapter: Adapter) -> dict[str, Delta]:
    """Returns an adapter as other programs know it, with a warning of what that loses."""
    for title, lost in {(delta.title, delta.lost) for delta in adapter.values() if delta.lost}:
        log.warning("a %s: %s", title, lost)
    return {path: delta.plain() for path, delta in adapter.items()}


def ratio(apart: float, norm: float) -> float:
    """Returns apart / norm; 0 where nothing is apart."""
    if apart == 0.0:
        return 0.0
    return apart / norm if norm > 0.0 else math.inf


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns |ours - theirs| / |ours|; infinity where their shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    return ratio(float(torch.linalg.vector_norm(ours - theirs)), float(torch.linalg.vector_norm(ours)))


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns an fp32 matrix uniform in +-1/sqrt(columns): kaiming_uniform_ with a = sqrt(5)."""
    bound = 1.0 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def on_cpu(tensor: Tensor) -> Tensor:
    """Returns the values on the CPU in fp32, which holds every trained dtype exactly: a copy unless they are that."""
    return tensor.detach().to("cpu", torch.float32)


def _described(delta: Delta) -> str:
    return f"{delta.algorithm} of rank {delta.rank} on {list(delta.shape)}"
