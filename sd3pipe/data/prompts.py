"""Sample prompts in the three forms of sd-scripts: text lines, TOML and JSON.

Text: one prompt a line, # for comments, and behind the prompt --n negative prompt, --w --h size, --s steps, --l scale,
--d seed. TOML: [prompt] with what all share and one [[prompt.subset]] each. JSON: a list of tables. A value that is
left out is chosen when the picture is drawn.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from sd3pipe.documents import DocumentError, parse_json, parse_toml, read_text
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.problems import check_table
from sd3pipe.prompt_settings import MOST_SIDE_PX, SIDE_STEP_PX, PromptSettings, Scale, Seed, Steps

log = logging.getLogger(__name__)

_DASHES = r"(?:^|\s)--(?=[^\s-])"  # an option begins; sd-scripts' rule, but for dashes that stand alone
_ONE_DASH = ("-", "\u2013", "\u2014")  # the latter two as word processors set --
_MISSPELT = re.compile(rf"(?:^|\s)((?:{'|'.join(_ONE_DASH)})[whsld][\s=:]*\d\S*)", re.IGNORECASE)
_Tables = Iterator[tuple[str, Mapping[str, Any]]]  # what to call each prompt, and its keys

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


_Side = Annotated[int, Field(ge=1, le=MOST_SIDE_PX)]


class WrittenPrompt(BaseModel):
    """One picture to draw. None means: as the model's variant wants it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: str
    negative_prompt: str = ""
    width: _Side | None = None
    height: _Side | None = None
    sample_steps: Steps | None = None
    scale: Scale | None = None
    seed: Seed | None = None

    def settings(self) -> PromptSettings:
        """Returns what was given beside the texts."""
        given = self.model_dump(include={"width", "height", "scale", "seed"}, exclude_none=True)
        return PromptSettings(**given, **({} if self.sample_steps is None else {"steps": self.sample_steps}))


def load_prompts(path: Path) -> list[WrittenPrompt]:
    """Returns the prompts of a file, by its ending .txt, .toml or .json, in order.

    Raises InputError for a file that cannot be read, ParameterError with one line for each problem in it.
    """
    text = read_text(path)
    readers: dict[str, Callable[[str, Path], _Tables]] = {".toml": _from_toml, ".json": _from_json}
    reader = readers.get(path.suffix.lower(), _from_lines)
    problems: list[str] = []
    prompts: list[WrittenPrompt] = []
    try:
        for where, table in reader(text, path):
            values = {key: value for key, value in table.items() if key not in _UNUSED}
            prompt, wrong = check_table(WrittenPrompt, values, explain=_why_no_option, strict=reader is not _from_lines)
            if reader is _from_lines and not values["prompt"]:
                wrong.setdefault("prompt", "there are options and no prompt: put them behind their prompt, on its line")
            problems += [f"{path}: {where}: {problem}" for problem in wrong.values()]
            for key in [key for key in table if key in _UNUSED]:
                log.warning("sample prompt, %s: %s = %r has no effect: %s", where, key, table[key], _UNUSED[key])
            if prompt is not None:
                prompts.append(_with_whole_steps(prompt, where))
    except DocumentError as error:
        raise ParameterError(str(error)) from error
    if problems:
        raise ParameterError("\n".join(problems))
    if not prompts:
        raise InputError(f"{path}: there is no prompt in it: write one a line")
    return prompts


def _with_whole_steps(prompt: WrittenPrompt, where: str) -> WrittenPrompt:
    """Returns the prompt with its sides rounded to what the model can draw."""
    sides = {name: side for name in ("width", "height") if (side := getattr(prompt, name)) is not None}
    whole = {name: max(1, round(side / SIDE_STEP_PX)) * SIDE_STEP_PX for name, side in sides.items()}
    for name, side in whole.items():
        if side != sides[name]:
            log.warning("sample prompt, %s: %s %d becomes %d, a multiple of 16", where, name, sides[name], side)
    return prompt.model_copy(update=whole)


def _from_lines(text: str, path: Path) -> _Tables:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            prompt, *options = re.split(_DASHES, line)
            values: dict[str, Any] = {"prompt": prompt.strip()} | dict.fromkeys(_MISSPELT.findall(line))
            for option in options:
                letter, _, value = option.strip().partition(" ")
                name = _LETTERS.get(letter.lower(), letter.lower())
                known = name in WrittenPrompt.model_fields.keys() - {"prompt"} or name in _UNUSED
                values[name if known else f"--{option.strip()}"] = value.strip()
            yield f"line {number}", values


def _why_no_option(key: str) -> str | None:
    """Returns what to say of a piece of a line that is no option, or None for the key of a table."""
    if not key.startswith(_ONE_DASH):
        return None
    return f"looks like an option and is none: an option is one of --{' --'.join(_LETTERS)}, a blank, and its value"


def _from_toml(text: str, path: Path) -> _Tables:
    content = parse_toml(text, str(path))
    shared = content.get("prompt")
    if not isinstance(shared, Mapping) or set(content) != {"prompt"}:
        raise ParameterError(f"{path}: must hold one table [prompt], with [[prompt.subset]] for each prompt")
    tables = shared.get("subset", [{}])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise ParameterError(f"{path}: prompt.subset must be an array of tables: [[prompt.subset]]")
    common = {key: value for key, value in shared.items() if key != "subset"}
    for number, table in enumerate(tables, start=1):
        yield f"[[prompt.subset]] {number}", {**common, **table}


def _from_json(text: str, path: Path) -> _Tables:
    content = parse_json(text, TypeAdapter(Any), str(path))
    if not isinstance(content, list) or not all(isinstance(table, dict) for table in content):
        raise ParameterError(f"{path}: must hold a list of tables, each with a prompt")
    for number, table in enumerate(content, start=1):
        yield f"prompt {number}", table
