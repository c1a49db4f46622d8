"""Storing an adapter in fewer bits: what it costs, module by module, and a form that costs less."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sd3pipe.adapters.kind import Adapter, Delta
from sd3pipe.errors import ParameterError
from sd3pipe.words import StoredFormat

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FP16_TOLERANCE = 1e-3  # relative error of a module's change up to which `auto` stores fp16
_TOLERANCES: Mapping[str, float] = {"auto": FP16_TOLERANCE, "same": 1e-6, "fp32": 1e-6, "fp16": 1e-2, "bf16": 2e-2}


@dataclass(frozen=True, slots=True)
class Rounded:
    """A delta as it will be stored, and how far its change then is from the source's, relative to it."""

    delta: Delta
    error: float


def rounded_adapter(source: Adapter, held: Adapter, dtype: StoredFormat) -> dict[str, Rounded]:
    """Returns each delta of `held`, which changes the model as `source` does, as it will be stored.

    `auto` is fp16 where every module keeps within FP16_TOLERANCE, else fp32. Raises ParameterError where a number
    format cannot hold a module.
    """
    result: dict[str, Rounded] = {}
    for path, delta in held.items():
        result[path] = _rounded(source[path], delta, dtype)
        if dtype == "auto" and not result[path].error < FP16_TOLERANCE:
            return rounded_adapter(source, held, "fp32")
        check_error(path, result[path].error, dtype)
    return result


def check_error(path: str, error: float, dtype: StoredFormat) -> None:
    """Raises ParameterError where a module's change differs by more than its number format explains."""
    if not error <= _TOLERANCES[dtype]:
        raise ParameterError(
            f"{path} would change by {error:.1e} of itself when stored as {dtype}, and at most "
            f"{_TOLERANCES[dtype]:.0e} is accepted: use --dtype fp32"
        )


def _rounded(source: Delta, held: Delta, dtype: StoredFormat) -> Rounded:
    """Returns a delta in a number format; factors of fp16 are balanced where that helps."""
    if dtype == "same":
        return Rounded(held, source.difference(held))
    plain = held.cast(DTYPES.get(dtype, torch.float16))
    found = Rounded(plain, source.difference(plain))
    if dtype not in ("auto", "fp16") or found.error < FP16_TOLERANCE / 2:
        return found
    balanced = held.balanced()
    if balanced is held:
        return found
    balanced = balanced.cast(torch.float16)
    other = Rounded(balanced, source.difference(balanced))
    return other if other.error < found.error or math.isnan(found.error) else found
