"""Which noise levels are trained on, and how an error is penalised."""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Gt

from sd3pipe.errors import ParameterError
from sd3pipe.rules.declaring import check_words, rule
from sd3pipe.words import HuberSchedule, LossForm, LossType, MaskedLoss, WeightingScheme

NUM_TIMESTEPS = 1000

# fmt: off


def _shift(value: Any) -> Any:
    """Returns the number in a command line's text; "auto" stays."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[0-9.]+(e-?\d+)?", value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseScheme:
    """What draws and weights share. Under the velocity form the scheme is a density; under x0 it is sd-scripts'."""

    loss_form: LossForm = rule("velocity", "velocity: as SD3 was trained; x0: sd-scripts', weighted by sigma^2.")
    weighting_scheme: WeightingScheme = rule("logit_normal", "How noise levels are drawn, and under x0 weighted.")

    def __post_init__(self) -> None:
        """Raises ParameterError for unknown words, and for the one scheme that means nothing under velocity."""
        check_words(self)
        if self.weighting_scheme == "sigma_sqrt" and self.loss_form == "velocity":
            raise ParameterError(
                "weighting_scheme = sigma_sqrt with loss_form = velocity: sigma_sqrt undoes the sigma^2 weight of the "
                "x0 form, and the velocity form has none: choose loss_form = x0, or weighting_scheme = uniform (the "
                "same loss)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaSampling(NoiseScheme):
    """How noise levels are drawn. "auto" is the pre-training's resolution rule; timesteps lie in [min, max)."""

    training_shift: Annotated[float, Gt(0)] | Literal["auto"] = rule(
        "auto", "Moves noise levels towards noise above 1; auto: 3 at 1024 x 1024 pixels, less below.", parse=_shift
    )
    logit_mean: float = rule(0.0, "Mean of logit_normal.", advanced=True)
    logit_std: float = rule(1.0, "Standard deviation of logit_normal.", advanced=True, gt=0)
    mode_scale: float = rule(1.29, "Scale of mode.", advanced=True)
    min_timestep: int = rule(0, "Lowest timestep of 0..1000.", advanced=True, ge=0, le=999)
    max_timestep: int = rule(NUM_TIMESTEPS, "Highest timestep of 0..1000.", advanced=True, ge=1, le=1000)

    def __post_init__(self) -> None:
        NoiseScheme.__post_init__(self)  # super() finds no class in a slotted dataclass
        if not 0 <= self.min_timestep < self.max_timestep <= NUM_TIMESTEPS:
            raise ParameterError(
                f"min_timestep = {self.min_timestep}, max_timestep = {self.max_timestep}: "
                f"choose 0 <= min_timestep < max_timestep <= {NUM_TIMESTEPS}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossRules(NoiseScheme):
    """What is compared, and how an error is penalised."""

    loss_type: LossType = rule("l2", "Penalty of an error.", advanced=True)
    huber_schedule: HuberSchedule = rule(
        "snr", "Where huber and smooth_l1 turn linear, over the noise levels.", advanced=True
    )
    huber_c: float = rule(0.1, "Where they turn linear.", advanced=True, gt=0)
    huber_scale: float = rule(1.0, "Multiplies huber_c.", advanced=True, gt=0)
    masked_loss: MaskedLoss = rule(
        "mean", "Masks encoded with the pictures: mean over their area, sum over the picture as in sd-scripts, or off.",
        advanced=True,
    )
