"""Options of train that were set and cannot act, because another option leaves no room for them."""

from collections.abc import Mapping
from typing import Any

from sd3pipe.params.train import TrainParams

# option -> (the option that it depends on, the values, or the type of values, under which it acts)
_ACTS_UNDER: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "lr_decay_steps": ("lr_scheduler", ("warmup_stable_decay",)),
    "lr_scheduler_num_cycles": ("lr_scheduler", ("cosine_with_restarts",)),
    "lr_scheduler_power": ("lr_scheduler", ("polynomial",)),
    "lr_scheduler_timescale": ("lr_scheduler", ("inverse_sqrt",)),
    "lr_scheduler_min_lr_ratio": (
        "lr_scheduler",
        ("linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "warmup_stable_decay"),
    ),
    "logit_mean": ("weighting_scheme", ("logit_normal",)),
    "logit_std": ("weighting_scheme", ("logit_normal",)),
    "mode_scale": ("weighting_scheme", ("mode",)),
    "huber_schedule": ("loss_type", ("huber", "smooth_l1")),
    "huber_c": ("loss_type", ("huber", "smooth_l1")),
    "huber_scale": ("loss_type", ("huber", "smooth_l1")),
    "network_dim": ("dim_from_weights", (False,)),
    "network_alpha": ("dim_from_weights", (False,)),
    "adapter_type": ("dim_from_weights", (False,)),
    "train_layers": ("dim_from_weights", (False,)),
    "rank_rules": ("dim_from_weights", (False,)),
    "activation_offload": ("gradient_checkpointing", ("auto", "on", int)),
    "matmul_rotation": ("matmul_dtype", ("int8", "fp8")),
    "logging_dir": ("log_with", ("tensorboard", "wandb", "trackio", "all")),
    "log_tracker_name": ("log_with", ("tensorboard", "wandb", "trackio", "all")),
    "wandb_run_name": ("log_with", ("wandb", "all")),
}


def idle_options(params: TrainParams) -> list[str]:
    """Returns one line for each option that differs from its default and cannot act."""
    lines = []
    for name, (other, values) in _ACTS_UNDER.items():
        value, state = getattr(params, name), getattr(params, other)
        if state not in values and type(state) not in values and value != TrainParams.model_fields[name].get_default():
            wanted = " or ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values if v is not int)
            lines.append(f"{name} has no effect here: it acts under {other} = {wanted}")
    return lines
