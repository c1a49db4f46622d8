"""Which linear layers an adapter trains, with what rank and learning rate. The defaults are sd-scripts' own.

Free of torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from sd3pipe.errors import ParameterError
from sd3pipe.words import Algorithm

BlockPart = Literal["context_attn", "context_mlp", "context_mod", "x_attn", "x_mlp", "x_mod"]
BLOCK_PARTS: tuple[BlockPart, ...] = get_args(BlockPart)

QKV_PARTS = 3  # of a fused layer "...qkv"
# In the order of sd-scripts' emb_dims.
EMBEDDERS = ("context_embedder", "t_embedder", "x_embedder", "y_embedder", "final_layer.adaLN", "final_layer.linear")

T = TypeVar("T", int, float)

_LAYERS_OF_PART = {"attn": "attn", "attn2": "attn", "mlp": "mlp", "adaLN_modulation": "mod"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DropoutRates:
    """Probabilities of being dropped: single rank activations, whole ranks of a sample, a sample's whole layer."""

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __post_init__(self) -> None:
        for name in ("neuron", "rank", "module"):
            rate = getattr(self, name)
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"{name} dropout is {rate}, and must be at least 0 and below 1")

    @property
    def active(self) -> bool:
        return max(self.neuron, self.rank, self.module) > 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Everything that fixes an adapter's parameters and their start values, but for the base model.

    `part_ranks` overrides `rank` for parts of the blocks, 0 leaves a part out. `embedder_ranks` are six numbers in the
    order of EMBEDDERS, or empty. `blocks` is "all", "none" or a list such as "0,3-5". Rules are pairs of a regular
    expression, searched in the module path, and a value; the first that matches counts, before part and block.
    Without `alpha` each layer's alpha is its rank.
    """

    algorithm: Algorithm = "lora"
    rank: int = 16
    alpha: float | None = None
    rs_lora: bool = False
    part_ranks: Mapping[BlockPart, int] = field(default_factory=dict)
    embedder_ranks: tuple[int, ...] = ()
    blocks: str = "all"
    rank_rules: tuple[tuple[str, int], ...] = ()
    learning_rate_rules: tuple[tuple[str, float], ...] = ()
    split_qkv: bool = False
    lokr_factor: int = -1
    tlora_min_rank: int = 1
    dropout: DropoutRates = field(default_factory=DropoutRates)
    seed: int = 42

    def __post_init__(self) -> None:
        if self.embedder_ranks and len(self.embedder_ranks) != len(EMBEDDERS):
            names = ", ".join(EMBEDDERS)
            raise ParameterError(f"emb_dims has {len(self.embedder_ranks)} numbers and needs {len(EMBEDDERS)}: {names}")
        ranks = (self.rank, *self.part_ranks.values(), *self.embedder_ranks, *(rank for _, rank in self.rank_rules))
        if min(ranks) < 0:
            raise ParameterError(f"a rank is {min(ranks)}: ranks are 0 (left out) or more")
        if not 1 <= self.tlora_min_rank <= max(ranks):
            raise ParameterError(f"tlora_min_rank is {self.tlora_min_rank}, and must be from 1 to the rank")


def target_ranks(paths: Iterable[str], spec: AdapterSpec) -> dict[str, int]:
    """Returns the rank of each module path that is trained, in the order of `paths`.

    Raises ParameterError where a block does not exist, a rule matches nothing, or nothing is left to train.
    """
    paths = list(paths)
    depth = 1 + max(block_of(path) or 0 for path in paths)
    blocks = parse_blocks(spec.blocks, depth)
    rules = _compiled(spec.rank_rules, paths)
    embedder_ranks = dict(zip(EMBEDDERS, spec.embedder_ranks, strict=False))
    chosen: dict[str, int] = {}
    for path in paths:
        part = part_of(path)
        if part is not None:
            default = spec.part_ranks.get(part, spec.rank) if block_of(path) in blocks else 0
        else:
            default = next((rank for name, rank in embedder_ranks.items() if path.startswith(name)), 0)
        rank = _first_match(rules, path, default)
        if rank:
            chosen[path] = rank
    if not chosen:
        raise ParameterError("the adapter has nothing to train: every rank is 0 or every block is left out")
    return chosen


def learning_rates(paths: Iterable[str], spec: AdapterSpec, learning_rate: float) -> dict[str, float]:
    """Returns the learning rate of each module path, 0 or less where it is not trained.

    Raises ParameterError where a rule matches nothing, or nothing is left to train.
    """
    paths = list(paths)
    rules = _compiled(spec.learning_rate_rules, paths)
    rates = {path: _first_match(rules, path, learning_rate) for path in paths}
    if max(rates.values()) <= 0:
        raise ParameterError("lr_rules leave nothing to train: every learning rate is 0")
    return rates


def block_of(path: str) -> int | None:
    """Returns the joint block that a module path lies in, or None."""
    words = path.split(".")
    return int(words[1]) if words[0] == "joint_blocks" else None


def part_of(path: str) -> BlockPart | None:
    """Returns which part of its block a module path belongs to, or None outside the blocks."""
    words = path.split(".")
    if words[0] != "joint_blocks":
        return None
    side = "x" if words[2] == "x_block" else "context"
    return next(part for part in BLOCK_PARTS if part == f"{side}_{_LAYERS_OF_PART[words[3]]}")


def parse_blocks(text: str, depth: int) -> frozenset[int]:
    """Returns the blocks that "all", "none" or "0,3-5" stands for. Raises ParameterError beyond `depth`."""
    if text == "all":
        return frozenset(range(depth))
    if text in ("none", ""):
        return frozenset()
    chosen: set[int] = set()
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", item)
        if match is None:
            raise ParameterError(f"train_block_indices: {item.strip()!r} is neither a block nor a range such as 3-5")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= depth:
            raise ParameterError(f"train_block_indices: {item.strip()}: the model has the blocks 0 to {depth - 1}")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def _compiled(rules: Iterable[tuple[str, T]], paths: list[str]) -> list[tuple[re.Pattern[str], T]]:
    compiled = []
    for text, value in rules:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ParameterError(f"the rule {text!r} is not a regular expression: {error}") from error
        if not any(pattern.search(path) for path in paths):
            raise ParameterError(f"the rule {text!r} matches no module; one of them is called {paths[-1]}")
        compiled.append((pattern, value))
    return compiled


def _first_match(rules: list[tuple[re.Pattern[str], T]], path: str, default: T) -> T:
    return next((value for pattern, value in rules if pattern.search(path)), default)
