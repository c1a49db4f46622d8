"""What training changes: the adapter's tensors, their running average, and their form between the steps."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sd3pipe.diffusion.draws import torch_seed
from sd3pipe.errors import InputError
from sd3pipe.training.optimizers import ParameterGroups, set_training

_WEIGHTS, _AVERAGE = "weights/", "ema/"
_EMA_HEAD_START = 10  # decay rises as (1 + n) / (10 + n), so that the average forgets the fresh adapter soon


class TrainedWeights:
    """The adapter's parameters under training.

    With bfloat16 parameters the optimizer works on float32 copies that live only during its step; the result is rounded
    stochastically, so that steps smaller than half a bit still count on average. `ema_decay` keeps a float32 average.
    """

    def __init__(self, network: nn.Module, *, seed: int, ema_decay: float | None = None) -> None:
        self._parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self._seed = seed
        self._decay = ema_decay
        self._copies = {
            name: nn.Parameter(p.detach().float())  # whole until the first step: some optimizers look at shapes at once
            for name, p in self._parameters.items()
            if p.dtype != torch.float32
        }
        self._average = {name: p.detach().float().clone() for name, p in self._parameters.items()} if ema_decay else {}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The tensors that gradients arrive at."""
        return list(self._parameters.values())

    @property
    def optimized(self) -> dict[Tensor, str]:
        """The tensors that the optimizer may change, with their names."""
        return {self._copies.get(name, parameter): name for name, parameter in self._parameters.items()}

    def optimizer_groups(self, groups: ParameterGroups) -> ParameterGroups:
        """Returns the groups with every parameter replaced by what the optimizer changes in its place."""
        names = {parameter: name for name, parameter in self._parameters.items()}
        return [{**group, "params": [self._copies.get(names[p], p) for p in group["params"]]} for group in groups]

    def begin_update(self) -> None:
        """Fills the float32 copies and their gradients."""
        for name, copy in self._copies.items():
            parameter = self._parameters[name]
            copy.data = parameter.detach().float()
            copy.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def end_update(self, step: int) -> None:
        """Takes the optimizer's result over and frees the copies."""
        if self._copies:
            generator = torch.Generator(next(iter(self._copies.values())).device)
            generator.manual_seed(torch_seed(self._seed, "rounding", step))
            for name, copy in self._copies.items():
                self._parameters[name].copy_(stochastically_rounded(copy.data, generator))
        self._free_copies()

    def clear_gradients(self) -> None:
        """Frees the gradients, and the float32 copies if they are filled."""
        for parameter in self._parameters.values():
            parameter.grad = None
        self._free_copies()

    @torch.no_grad()
    def move_average(self, step: int) -> None:
        """Moves the running average towards the parameters."""
        if self._decay is not None:
            weight = 1 - min(self._decay, (1 + step) / (_EMA_HEAD_START + step))
            for name, average in self._average.items():
                average.lerp_(self._parameters[name].float(), weight)

    @contextlib.contextmanager
    def delivered(self, optimizer: Optimizer) -> Iterator[None]:
        """Puts what is saved, sampled and validated in place for a block: the average where there is one.

        That is the EMA, or a schedule-free optimizer's own average. The training weights come back bit for bit.
        """
        if not self._average and not hasattr(optimizer, "eval"):
            yield
            return
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        with torch.no_grad():
            for name, average in (self._average or self._optimizers_average(optimizer)).items():
                self._parameters[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(kept[name])

    def export(self) -> dict[str, Tensor]:
        """Returns the training weights and the average where they lie, for a checkpoint before the next step."""
        tensors = {_WEIGHTS + name: parameter for name, parameter in self._parameters.items()}
        tensors |= {_AVERAGE + name: average for name, average in self._average.items()}
        return {name: tensor.detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `export` returned. Raises InputError if it is of another adapter."""
        places = {_WEIGHTS + name: parameter for name, parameter in self._parameters.items()}
        places |= {_AVERAGE + name: average for name, average in self._average.items()}
        for name, place in places.items():
            if name not in tensors or tensors[name].shape != place.shape:
                raise InputError(f"the checkpoint has no {name} of shape {list(place.shape)}")
            place.copy_(tensors[name])
        for name, copy in self._copies.items():
            copy.data = self._parameters[name].detach().float()  # whole, as before the first step

    def _optimizers_average(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.begin_update()
        set_training(optimizer, training=False)
        averaged = {name: tensor.detach().clone() for tensor, name in self.optimized.items()}
        set_training(optimizer, training=True)
        self._free_copies()
        return averaged

    def _free_copies(self) -> None:
        for copy in self._copies.values():
            copy.data, copy.grad = copy.data.new_empty(0), None


def stochastically_rounded(values: Tensor, generator: torch.Generator) -> Tensor:
    """Returns float32 values as bfloat16, rounded up with the probability of their distance from below."""
    noise = torch.randint(0, 1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
