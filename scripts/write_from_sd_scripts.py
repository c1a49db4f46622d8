"""Writes the table in docs/from-sd-scripts.md, option by option, from the tables that the code uses."""

from pathlib import Path
from typing import Any

from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.fields import option_extra
from sd3pipe.params.refused import ALREADY_SO, REFUSED
from sd3pipe.project.kohya_options import DATASET_OPTIONS, PATH_OPTIONS, TRAIN_OPTIONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "from-sd-scripts.md"
HEADING = "## Option by option\n"
TABLE_HEAD = """
"same" means: the same name, and the value means what it means there.

| sd-scripts | its default | here |
|---|---|---|
"""


def page() -> str:
    """Returns the whole page: the text above the heading as it stands, and the table made anew."""
    rows = {name: (_shown(option.default), _in_a_stage(name)) for name, option in TRAIN_OPTIONS.items()}
    rows |= {
        name: ("", f"`[paths] {key}` in project.toml, or `--{key.replace('_', '-')}`")
        for name, key in PATH_OPTIONS.items()
    }
    rows |= {name: (_shown(option.default), "dataset file, same name") for name, option in DATASET_OPTIONS.items()}
    rows |= {name: ("", f"taken, nothing to choose: {wish.text}") for name, wish in ALREADY_SO.items()}
    rows |= {name: ("", f"refused: {reason}") for name, reason in REFUSED.items() if name not in DATASET_OPTIONS}
    lines = [f"| `{name}` | {default} | {here} |" for name, (default, here) in sorted(rows.items())]
    above = PAGE.read_text(encoding="utf-8").partition(HEADING)[0]
    return above + HEADING + TABLE_HEAD + "\n".join(lines) + "\n"


def _in_a_stage(name: str) -> str:
    for stage, model in load_stage_models().items():
        for field_name, field in model.model_fields.items():
            if name == field_name or name in option_extra(field)["aliases"]:
                called = "same" if name == field_name else f"`{field_name}`"
                ours = _shown(field.default) if not field.is_required() else ""
                return f"{called}, {stage.replace('_', '-')}" + (f", default {ours}" if ours else "")
    return "refused: " + REFUSED[name] if name in REFUSED else "no such option"


def _shown(value: Any) -> str:
    if value is None or value == ():
        return ""
    return ("on" if value else "off") if isinstance(value, bool) else f"{value}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
