"""How strong peft's and diffusers' configuration makes each module, by peft's rules.

peft keeps it in adapter_config.json beside its file, diffusers in the file's metadata with the model's part before
every key. A scale is alpha / rank, for LoRA with `use_rslora` alpha / sqrt(rank); patterns give single modules others.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from torch import Tensor

from sd3pipe.documents import DocumentError, first_problem, parse_json, read_json
from sd3pipe.errors import InputError

T = TypeVar("T", int, float)

PEFT_CONFIG_KEY = "lora_adapter_metadata"
CAYLEY_KEY, EXACT_CAYLEY = "sd3pipe_oft_cayley", "exact"  # in a file's metadata: OFT without Neumann's series

_FILE_OF_PEFT, _CONFIG_BESIDE_IT = "adapter_model.safetensors", "adapter_config.json"
_PREFIX_OF_PEFT = "base_model.model."
_UP = ".lora_B.weight"
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_NEUMANN_TERMS = 5
_SERIES_OF_TODAY = (0, 18)  # the first peft with it
_MOST_REPETITIONS = 3  # matching takes time in the power of their number


def _compiled(pattern: str) -> re.Pattern[str]:
    """Returns what a name is matched with in no time, as peft does. Raises ValueError, which re.error is not."""
    if len(re.findall(r"[*+{]", pattern)) > _MOST_REPETITIONS or re.search(r"\)[*+{]", pattern):
        raise ValueError(f"the pattern {pattern[:60]!r} repeats too much to be matched with every module")
    try:
        re.compile(pattern)
        return re.compile(rf"(.*\.)?({pattern})$")  # peft's own: the first pattern that fits the end of a name
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:60]!r} is no regular expression ({error})") from error


_Rank: TypeAlias = Annotated[int, Field(ge=1)]
_Alpha: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
_Pattern: TypeAlias = Annotated[re.Pattern[str], BeforeValidator(_compiled)]
_Kind = Literal["LORA", "LOHA", "LOKR", "OFT"]


class PeftConfig(BaseModel):
    """The part of a configuration that a trained module's strength depends on; what is not given is as in peft."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: _Kind = "LORA"
    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    alpha: _Alpha = 8.0  # what LoHa and LoKr call it
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, _Alpha] | None = None
    use_rslora: bool = False
    init_lora_weights: bool | str | None = None
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = _NEUMANN_TERMS
    coft: bool = False
    block_share: bool = False
    peft_version: str = ""

    @property
    def unread_oft(self) -> str:
        """What of an OFT's configuration is not read, "" where all is."""
        version = re.match(r"(\d{1,9})\.(\d{1,9})", self.peft_version)
        if self.coft:
            return "coft = true, which projects the rotations while they act"
        if self.block_share:
            return "block_share = true, one rotation for all blocks of a layer"
        if not self.use_cayley_neumann:
            return ""
        if self.num_cayley_neumann_terms != _NEUMANN_TERMS:
            return f"num_cayley_neumann_terms = {self.num_cayley_neumann_terms}, and a series of 5 terms"
        if version is None or (int(version[1]), int(version[2])) < _SERIES_OF_TODAY:
            return "a peft_version before 0.18, whose series ended otherwise"
        return ""

    def scale(self, module: str, rank: int | None) -> float:
        """Returns the factor of a module's change; `rank` is that of its tensors, None where they do not show it.

        Raises ValueError where the configuration gives another rank.
        """
        configured = _of_pattern(self.rank_pattern, module, self.r)
        if rank is not None and rank != configured:
            raise ValueError(
                f"its tensors have rank {rank}, and its configuration, which says {configured}, is another's"
            )
        usual = self.lora_alpha if self.peft_type == "LORA" else self.alpha
        alpha = _of_pattern(self.alpha_pattern, module, usual)
        return alpha / (configured**0.5 if self.use_rslora and self.peft_type == "LORA" else configured)


def _of_pattern(patterns: Mapping[re.Pattern[str], T] | None, module: str, default: T) -> T:
    return next((value for pattern, value in (patterns or {}).items() if pattern.match(module)), default)


@dataclass(frozen=True, slots=True)
class Strengths:
    """The configurations of a file's parts by the prefix of their modules' names; without any, nothing is known."""

    configs: Mapping[str, PeftConfig]

    @property
    def notes(self) -> dict[str, str]:
        """What the configurations say of a kind of adapter, as metadata of the file."""
        exact = any(config.peft_type == "OFT" and not config.use_cayley_neumann for config in self.configs.values())
        return {CAYLEY_KEY: EXACT_CAYLEY} if exact else {}

    def __call__(self, name: str, rank: int | None) -> float | None:
        """Returns a module's scale, None where no configuration speaks of it. Raises ValueError."""
        for prefix, config in self.configs.items():
            if name.startswith(prefix):
                return config.scale(name.removeprefix(prefix), rank)
        return None


def read_strengths(path: Path, metadata: Mapping[str, str]) -> Strengths:
    """Returns what an adapter file's configuration says. Raises InputError where it cannot be understood."""
    if path.name == _FILE_OF_PEFT:
        where = path.with_name(_CONFIG_BESIDE_IT)
        try:
            config = _checked(read_json(where, TypeAdapter(dict[str, JsonValue])), str(where))
        except DocumentError as error:
            if not error.missing:
                raise
        else:
            return Strengths({_PREFIX_OF_PEFT: config, "": config})
    if PEFT_CONFIG_KEY not in metadata:
        return Strengths({})
    where = f"{path}: {PEFT_CONFIG_KEY}"
    values = parse_json(metadata[PEFT_CONFIG_KEY], TypeAdapter(dict[str, JsonValue]), where)
    parts: dict[str, dict[str, JsonValue]] = {}
    for key, value in values.items():
        part, _, name = key.partition(".")
        parts.setdefault(f"{part}.", {})[name] = value
    return Strengths({prefix: _checked(part, where) for prefix, part in parts.items()})


def _checked(values: Mapping[str, JsonValue], where: str) -> PeftConfig:
    """Returns a configuration that is understood. Raises InputError that names what is not."""
    kind = values.get("peft_type", "LORA")
    if kind not in get_args(_Kind):
        raise InputError(f"{where}: its peft_type is {str(kind)[:40]!r}, and {', '.join(get_args(_Kind))} are read")
    try:
        config = PeftConfig.model_validate(values)
    except ValidationError as error:
        raise DocumentError(f"{where}: {first_problem(error)}") from error
    if config.peft_type == "OFT" and config.unread_oft:
        raise InputError(f"{where}: has {config.unread_oft}: train it with peft's own defaults")
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        raise InputError(
            f"{where}: init_lora_weights = {start[:40]!r} changed the base model, which this file does not hold: save "
            "it in peft with path_initial_model_for_weight_conversion"
        )
    return config


def needed_config(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the metadata with diffusers' configuration for tensors of strength 1 in its form; none if not needed.

    Without it older diffusers takes the first module's rank for everybody's alpha. ComfyUI does not read it.
    """
    ranks = {name.removesuffix(_UP): tensor.shape[1] for name, tensor in tensors.items() if name.endswith(_UP)}
    if len(set(ranks.values())) < 2:
        return {}
    config: dict[str, object] = {}
    for prefix in sorted({name.partition(".")[0] for name in ranks}):
        modules = {name.partition(".")[2]: rank for name, rank in ranks.items() if name.startswith(prefix + ".")}
        (usual, _), *_ = Counter(modules.values()).most_common(1)
        pattern = {f"^{module}": rank for module, rank in sorted(modules.items()) if rank != usual}
        config |= {
            f"{prefix}.r": usual,
            f"{prefix}.lora_alpha": usual,
            f"{prefix}.rank_pattern": pattern,
            f"{prefix}.alpha_pattern": pattern,
            f"{prefix}.target_modules": sorted(modules),
            f"{prefix}.use_dora": len(tensors) > 2 * len(ranks),
        }
    return {PEFT_CONFIG_KEY: json.dumps(config, sort_keys=True)}
