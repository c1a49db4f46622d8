"""What a file holds of one adapted layer, and the layer's factors, checked, out of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """A layer's tensors by part, and what the file says elsewhere.

    `strength` returns the factor of the change by the file's configuration, given the rank if the tensors show it;
    `metadata` is the file's. All methods raise ValueError.
    """

    tensors: Mapping[str, Tensor]
    strength: Callable[[int | None], float | None]
    metadata: Mapping[str, str]

    def matrices(self, *names: str) -> list[Tensor]:
        """Returns factors as matrices; where one is missing or has no rows or columns, the layer has no rank."""
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise ValueError(f"{' and '.join(missing)} missing beside {', '.join(sorted(self.tensors))}")
        for name in names:
            tensor = self.tensors[name]
            if tensor.ndim < 2 or not tensor.numel():
                raise ValueError(f"{name} has the shape {list(tensor.shape)}, and with it the layer no rank")
        return [self.tensors[name].flatten(1) for name in names]

    def own_alpha(self) -> float | None:
        """Returns the alpha that stands beside the factors."""
        alpha = self.tensors.get("alpha")
        if alpha is None:
            return None
        if alpha.numel() != 1:
            raise ValueError(f"alpha has the shape {list(alpha.shape)} and should be one number")
        return float(alpha.float())

    def alpha(self, rank: int) -> float:
        """Returns the layer's alpha: its own, else by the file's strength, else the rank, as ComfyUI has it."""
        own = self.own_alpha()
        if own is not None:
            return own
        scale = self.strength(rank)
        return float(rank) if scale is None else scale * rank
