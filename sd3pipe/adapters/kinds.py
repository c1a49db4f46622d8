"""The table of adapter kinds. A kind is a file with its Delta, which names all else, and a line here."""

from collections.abc import Mapping

from sd3pipe.adapters.dora import DoRADelta
from sd3pipe.adapters.full import FullDelta
from sd3pipe.adapters.kind import Delta
from sd3pipe.adapters.loha import LoHaDelta
from sd3pipe.adapters.lokr import LoKrDelta
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.adapters.oft import OFTDelta
from sd3pipe.adapters.oftv2 import OFTv2Delta
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.adapters.tlora import TLoRADelta
from sd3pipe.console import listed
from sd3pipe.errors import ParameterError

# In the order in which a file's tensors are tried: a T-LoRA's are a LoRA's.
_KINDS: tuple[type[Delta], ...] = (
    TLoRADelta, LoRADelta, DoRADelta, LoHaDelta, LoKrDelta, OFTDelta, OFTv2Delta, FullDelta,
)  # fmt: skip
KINDS: dict[str, type[Delta]] = {kind.algorithm: kind for kind in _KINDS}


def check_spec(spec: AdapterSpec, algorithm: str | None = None) -> None:
    """Raises ParameterError for options that the kind of adapter, or `algorithm` in its place, does not have."""
    given: Mapping[str, bool] = {
        "network_alpha": spec.alpha is not None,
        "network_dropout": spec.dropout.neuron > 0.0,
        "rank_dropout": spec.dropout.rank > 0.0,
        "split_qkv": spec.split_qkv,
        "lokr_factor": spec.lokr_factor != -1,
        "rs_lora": spec.rs_lora,
        "tlora_min_rank": spec.tlora_min_rank != 1,
    }
    for option, is_given in given.items():
        if is_given:
            check_option(algorithm or spec.algorithm, option)


def check_option(algorithm: str, option: str) -> None:
    """Raises ParameterError where an option is for other kinds of adapters, saying for which."""
    if option not in KINDS[algorithm].options:
        others = listed([kind.title for kind in KINDS.values() if option in kind.options])
        raise ParameterError(f"{option} is for {others} alone, not for {KINDS[algorithm].title}")
