"""DoRA (arXiv:2402.09353): LoRA changes the direction of each row of the weight, a trained magnitude its norm."""

# I in features, O out features, R rank

import torch
from torch import Tensor

from sd3pipe.adapters.deltas import Delta, LoRADelta, merged_row_norms
from sd3pipe.adapters.layers import AdaptedLinear, LayerSetup, LoRA, on_cpu


class DoRA(LoRA):
    """W' = m (W + s up down) / |W + s up down|, rows apart; the norm passes no gradient, as in its section 4.3.

    The output is written as base(x) plus terms that are exactly zero at the start, where m equals the norms of W.
    """

    algorithm = "dora"

    def __init__(self, setup: LayerSetup) -> None:
        super().__init__(setup)
        self.magnitude = setup.parameter(setup.out_features)

    @torch.no_grad()
    def measure(self, linear: AdaptedLinear) -> None:
        """Sets the magnitude to the norms of the rows at hand, so that the layer changes nothing."""
        self.magnitude.copy_(self._norms(linear))

    def forward(self, x: Tensor, linear: AdaptedLinear) -> Tensor:
        y = linear.base(x)
        gain_O = self.magnitude.float() / self._norms(linear)
        product = y - linear.bias.to(y.dtype)
        change = (gain_O - 1.0).to(y.dtype) * product + gain_O.to(y.dtype) * self.term(x)
        return y + self.scaled(self.drop_module(change))

    @torch.no_grad()
    def _norms(self, linear: AdaptedLinear) -> Tensor:
        with torch.autocast(self.down.device.type, enabled=False):
            weight_OI = linear.dense_weight().to(self.down.device)
            return merged_row_norms(weight_OI, self.down, self.up, self.setup.scale)

    def delta(self) -> LoRADelta:
        return LoRADelta(
            down=on_cpu(self.down),
            up=on_cpu(self.up),
            alpha=self.setup.alpha,
            magnitude=on_cpu(self.magnitude),
        )

    @torch.no_grad()
    def take(self, delta: Delta) -> None:
        super().take(delta)
        assert isinstance(delta, LoRADelta) and delta.magnitude is not None
        self.magnitude.copy_(delta.magnitude)
