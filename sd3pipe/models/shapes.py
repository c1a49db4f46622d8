"""Canonical keys with their shapes: what the three architectures share. Free of torch."""

import math
from collections.abc import Iterable, Mapping

from sd3pipe.console import listed
from sd3pipe.errors import InputError

Shapes = dict[str, tuple[int, ...]]


def linear_shapes(name: str, out_features: int, in_features: int) -> Shapes:
    """Returns weight and bias of a linear layer."""
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def linear_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Returns (out features, in features) of every linear layer by its path; patches are projected by one, too."""
    weights = {key: shape for key, shape in shapes.items() if key.endswith(".weight") and len(shape) > 1}
    return {key.removesuffix(".weight"): (shape[0], math.prod(shape[1:])) for key, shape in weights.items()}


def vector_shapes(name: str, width: int) -> Shapes:
    """Returns weight and bias of a norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def count_numbered(names: Iterable[str], prefix: str) -> int:
    """Returns how many different numbers follow `prefix` in the names: the layers of a stack."""
    numbers = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    return len({number for number in numbers if number.isdecimal()})


def compare_shapes(what: str, expected: Shapes, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError unless keys and shapes are the expected ones. `what` begins the sentence: 'FILE: the VAE'."""
    missing = [key for key in expected if key not in found]
    excess = sorted(found.keys() - expected.keys())
    other = [key for key, shape in expected.items() if key in found and tuple(found[key]) != shape]
    if missing:
        raise InputError(f"{what} lacks {listed(missing)}: the file is incomplete")
    if excess:
        raise InputError(f"{what} has tensors that are not understood: {listed(excess)}")
    if other:
        key = other[0]
        raise InputError(
            f"{what} has tensors of unexpected shape: {listed(other)}; "
            f"{key} is {list(found[key])} and should be {list(expected[key])}"
        )
