"""Norms and differences are those of the changes in full, and are told from the factors: layers have 24 M weights."""

import pytest
import torch
from support.random_adapters import random_delta
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd3pipe.adapters.kind import Delta

ROWS, COLUMNS = 576, 192
KINDS = {"loha": ("loha", 3), "lokr, thin": ("lokr", 3), "lokr, whole": ("lokr", 10_000)}
FP32 = 1e-6  # of sums in fp32 against sums in fp64


def drawn(name, seed=0, alpha=1.5):
    kind, rank = KINDS[name]
    generator = torch.Generator().manual_seed(seed)
    return random_delta(kind, (ROWS, COLUMNS), rank=rank, alpha=alpha, generator=generator)


def nudged(delta, share):
    """The same delta in fp64, each entry of it by about a share of itself elsewhere."""
    generator = torch.Generator().manual_seed(9)
    noise = {name: torch.randn(t.shape, generator=generator).double() for name, t in delta.tensors().items()}
    return delta.with_tensors({name: t.double() * (1 + share * noise[name]) for name, t in delta.tensors().items()})


OTHERS = {
    "rounded": lambda name: drawn(name).cast(torch.bfloat16),
    "nearly the same": lambda name: nudged(drawn(name), 1e-7),
    "another": lambda name: drawn(name, seed=1),
    "the opposite": lambda name: drawn(name).scaled(-1.0),
    "nothing": lambda name: drawn(name).scaled(0.0),
    "of another rank": lambda name: random_delta(
        KINDS[name][0], (ROWS, COLUMNS), rank=4, alpha=1.0, generator=torch.Generator().manual_seed(2)
    ),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("name", KINDS)
def test_a_difference_is_that_of_the_changes_in_full(name, other):
    delta, theirs = drawn(name), other(name)
    in_full = delta.dense(torch.float64)
    expected = torch.linalg.vector_norm(in_full - theirs.dense(torch.float64)) / torch.linalg.vector_norm(in_full)
    assert delta.difference(theirs) == pytest.approx(float(expected), rel=FP32)


@pytest.mark.parametrize("name", KINDS)
def test_a_norm_is_that_of_the_change_in_full(name):
    delta = drawn(name)
    assert delta.norm() == pytest.approx(float(torch.linalg.vector_norm(delta.dense(torch.float64))), rel=FP32)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_factors_of_any_size_are_compared(name, size):
    drawn_one = drawn(name)
    delta = drawn_one.with_tensors({name: t.double() * size for name, t in drawn_one.tensors().items()})
    theirs = nudged(delta, 1e-3)
    assert delta.difference(theirs) == pytest.approx(Delta._difference(delta, theirs), rel=FP32)


@pytest.mark.parametrize("name", KINDS)
def test_the_same_change_by_other_factors_is_no_difference(name):
    delta = drawn(name)
    tensors = {n: t.double() for n, t in delta.tensors().items()}
    first, *_, last = tensors
    other = delta.with_tensors(tensors | {first: tensors[first] * 3, last: tensors[last] / 3})
    assert delta.difference(other) < (FP32 if name == "loha" else 1e-14)


class LargestTensor(TorchDispatchMode):
    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.entries = max([self.entries, *found])
        return result


@pytest.mark.parametrize("name", KINDS)
def test_no_change_is_formed_to_tell_its_norm_or_a_difference(name):
    delta, theirs = drawn(name), drawn(name, seed=1)
    with LargestTensor() as seen:
        delta.norm()
        delta.difference(theirs)
    assert seen.entries < ROWS * COLUMNS / 8
