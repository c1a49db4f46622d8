"""Sample prompts in the three forms of sd-scripts: text lines, TOML and JSON.

Text: one prompt a line, # for comments, then --n negative prompt, --w --h size, --s steps, --l scale, --d seed. TOML:
[prompt] with what all share and one [[prompt.subset]] each. JSON: a list of tables. A value that is left out is chosen
when the picture is drawn.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sd3pipe.documents import DocumentError, parse_json, parse_toml, read_text
from sd3pipe.errors import InputError, ParameterError

log = logging.getLogger(__name__)

_SIZE_STEP_PX = 16  # the VAE divides a side by 8, the MMDiT's patches by 2 more
_MAX_SIZE_PX = 4096
_SEED_END = 2**63

# sd-scripts' one-letter options, and what TOML and JSON call them
_LETTERS = {"n": "negative_prompt", "w": "width", "h": "height", "s": "sample_steps", "l": "scale", "d": "seed"}
_UNUSED = {
    "g": "guidance_scale belongs to Flux",
    "guidance_scale": "guidance_scale belongs to Flux",
    "ss": "the sampler is Euler's for flow matching",
    "sample_sampler": "the sampler is Euler's for flow matching",
    "cn": "ControlNet is not supported",
    "controlnet_image": "ControlNet is not supported",
    "ctr": "CFG truncation belongs to Lumina",
    "rcfg": "renormalised CFG belongs to Lumina",
    "fs": "the flow shift of samples is 3.0",
    "flow_shift": "the flow shift of samples is 3.0",
    "enum": "prompts are numbered as they stand",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrompt:
    """One picture to draw. None means: as the model's variant wants it."""

    prompt: str
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    sample_steps: int | None = None
    scale: float | None = None
    seed: int | None = None

    def settings(self) -> dict[str, int | float]:
        """Returns what was given beside the texts: width, height, steps, scale, seed."""
        given = {
            "width": self.width,
            "height": self.height,
            "steps": self.sample_steps,
            "scale": self.scale,
            "seed": self.seed,
        }
        return {name: value for name, value in given.items() if value is not None}


def load_prompts(path: Path) -> list[SamplePrompt]:
    """Returns the prompts of a file, by its ending .txt, .toml or .json, in order.

    Raises InputError for a file that cannot be read, ParameterError with one line for each problem in it.
    """
    text = read_text(path)
    readers: dict[str, Callable[[str, Path], Iterator[_Draft]]] = {".toml": _from_toml, ".json": _from_json}
    try:
        drafts = list(readers.get(path.suffix.lower(), _from_lines)(text, path))
    except DocumentError as error:
        raise ParameterError(str(error)) from error
    problems = [f"{path}: {draft.where}: {problem}" for draft in drafts for problem in draft.problems()]
    if problems:
        raise ParameterError("\n".join(problems))
    if not drafts:
        raise InputError(f"{path}: there is no prompt in it: write one a line")
    return [draft.prompt() for draft in drafts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """The unchecked values of one prompt."""

    where: str
    values: Mapping[str, Any]

    def problems(self) -> list[str]:
        """Returns what is wrong with the values."""
        found = [problem for key, value in self.values.items() if (problem := _problem(key, value))]
        return found if "prompt" in self.values else [*found, "the prompt is missing"]

    def prompt(self) -> SamplePrompt:
        """Returns the checked prompt; sides are rounded to multiples of 16 and options without effect named."""
        values = {}
        for key, value in self.values.items():
            if key in _UNUSED:
                log.warning("sample prompt, %s: %s = %r has no effect: %s", self.where, key, value, _UNUSED[key])
            else:
                values[key] = self._side(key, value) if key in ("width", "height") else value
        return SamplePrompt(**values)

    def _side(self, key: str, value: int) -> int:
        side = max(1, round(value / _SIZE_STEP_PX)) * _SIZE_STEP_PX
        if side != value:
            log.warning("sample prompt, %s: %s %d becomes %d, a multiple of 16", self.where, key, value, side)
        return side


def _problem(key: str, value: Any) -> str | None:
    """Returns why a value cannot be used, or None."""
    if key in ("prompt", "negative_prompt"):
        return None if isinstance(value, str) else f"{key}: must be a text"
    if key in ("width", "height"):
        return None if _is_int(value, 1, _MAX_SIZE_PX) else f"{key} = {value!r}: must be 1 to {_MAX_SIZE_PX}"
    if key == "sample_steps":
        return None if _is_int(value, 1, 1000) else f"{key} = {value!r}: must be 1 to 1000"
    if key == "seed":
        return None if _is_int(value, 0, _SEED_END - 1) else f"{key} = {value!r}: must be a whole number from 0 on"
    if key == "scale":
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1000
        return None if good else f"{key} = {value!r}: must be a number from 0 on"
    if key in _UNUSED:
        return None
    return f"{key}: unknown key: there are prompt, {', '.join(_LETTERS.values())}"


def _is_int(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _from_lines(text: str, path: Path) -> Iterator[_Draft]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            prompt, *options = re.split(r"(?:^|\s)--(?=[A-Za-z]+(?:\s|$))", line)
            values: dict[str, Any] = {"prompt": prompt.strip()}
            for option in options:
                letter, _, value = option.strip().partition(" ")
                name = _LETTERS.get(letter.lower(), letter.lower())
                values[name if name != "prompt" else "--prompt"] = _parsed(name, value.strip())
            yield _Draft(where=f"line {number}", values=values)


def _parsed(name: str, text: str) -> Any:
    """Returns a number where the option wants one and the text is one, else the text, which is then a problem."""
    numbers = ("width", "height", "sample_steps", "seed")
    kind: Callable[[str], Any] = int if name in numbers else float if name == "scale" else str
    try:
        return kind(text)
    except ValueError:
        return text


def _from_toml(text: str, path: Path) -> Iterator[_Draft]:
    content = parse_toml(text, str(path))
    shared = content.get("prompt")
    if not isinstance(shared, Mapping) or set(content) != {"prompt"}:
        raise ParameterError(f"{path}: must hold one table [prompt], with [[prompt.subset]] for each prompt")
    tables = shared.get("subset", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ParameterError(f"{path}: prompt.subset must be an array of tables: [[prompt.subset]]")
    common = {key: value for key, value in shared.items() if key != "subset"}
    for number, table in enumerate(tables, start=1):
        yield _Draft(where=f"[[prompt.subset]] {number}", values={**common, **table})


def _from_json(text: str, path: Path) -> Iterator[_Draft]:
    content = parse_json(text, TypeAdapter(Any), str(path))
    if not isinstance(content, list) or not all(isinstance(table, dict) for table in content):
        raise ParameterError(f"{path}: must hold a list of tables, each with a prompt")
    for number, table in enumerate(content, start=1):
        yield _Draft(where=f"prompt {number}", values=table)
