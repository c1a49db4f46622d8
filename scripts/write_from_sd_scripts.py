"""Writes the table in docs/from-sd-scripts.md, option by option, from the one that the code uses."""

from pathlib import Path
from typing import Any

from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.sd_scripts import OPTIONS, FileKey, SdScriptsOption

PAGE = Path(__file__).resolve().parent.parent / "docs" / "from-sd-scripts.md"
HEADING = "## Option by option\n"
TABLE_HEAD = """
"same" means: the same name, and the value means what it means there. "met" happens in any case; "no effect" changes
nothing in what is trained; "not done" acts there and not here. from-kohya translates by this table, and the stages
answer from it.

| sd-scripts | its default | here |
|---|---|---|
"""
_FATES = {"read": "", "met": "met: ", "idle": "no effect: ", "refused": "not done: "}


def page() -> str:
    """Returns the whole page: the text above the heading as it stands, and the table made anew."""
    lines = [f"| `{name}` | {_shown(row.default)} | {_here(name, row)} |" for name, row in sorted(OPTIONS.items())]
    above = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    return above + HEADING + TABLE_HEAD + "\n".join(lines) + "\n"


def _here(name: str, row: SdScriptsOption) -> str:
    return "; ".join(_in_a_file(name, place) for place in row.places) if row.places else _FATES[row.fate] + row.text


def _in_a_file(name: str, place: FileKey) -> str:
    if place.file not in load_stage_models():
        return "same, dataset.toml" if place.file == "dataset" and place.key == name else f"`{place}`"
    if place.value is not None:
        return f"`{place}`"
    default = _shown(load_stage_models()[place.file].model_fields[place.key].default)
    called = "same" if place.key == name else f"`{place.key}`"
    return f"{called}, {place.file.replace('_', '-')}" + (f", default {default}" if default else "")


def _shown(value: Any) -> str:
    if value in (None, "", ()):
        return ""
    return ("on" if value else "off") if isinstance(value, bool) else f"{value}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
