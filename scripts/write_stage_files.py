"""Writes stages/*.toml and dvc.yaml of this repository from the option sets and the demo: run it after a change."""

import tomllib
from pathlib import Path

from sd3pipe.config import read_project
from sd3pipe.demo.project import project_texts
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.stage_file import render_stage_file
from sd3pipe.project.pipeline import dvc_yaml

ROOT = Path(__file__).resolve().parent.parent
DEMO_STEPS = 300


def texts() -> dict[str, str]:
    """Returns the files by name."""
    demo = project_texts(steps=DEMO_STEPS)
    files = {}
    for stage, model in load_stage_models().items():
        name = f"stages/{stage}.toml"
        files[name] = render_stage_file(model, stage.replace("_", "-"), tomllib.loads(demo.get(name, "")))
    files["dvc.yaml"] = dvc_yaml(read_project(ROOT).paths, ["examples/demo/pictures"])
    return files


if __name__ == "__main__":
    for name, text in texts().items():
        (ROOT / name).write_text(text, encoding="utf-8")
        print(name)
