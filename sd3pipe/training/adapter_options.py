"""The adapter that a run's options describe, checked against its kind."""

from sd3pipe.adapters.kinds import check_spec
from sd3pipe.adapters.options import described_adapter, network_args
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.rules.adapter import AdapterRules


def adapter_spec(rules: AdapterRules, *, seed: int) -> AdapterSpec:
    """Returns the adapter that the options describe. Raises ParameterError for options that its kind does not have."""
    spec = described_adapter(rules, seed=seed)
    check_spec(spec)
    return spec


def loraplus_ratio(rules: AdapterRules) -> float:
    """Returns by how much LoRA+ multiplies the learning rate of the up matrices; 1 without LoRA+."""
    args = network_args(rules.network_args)
    return args.loraplus_lr_ratio if args.loraplus_unet_lr_ratio is None else args.loraplus_unet_lr_ratio
