"""Writes stages/*.toml, dvc.yaml and examples/demo from the option sets and the demo: run it after a change."""

import tomllib
from pathlib import Path

from sd3pipe.config import read_project
from sd3pipe.demo.project import picture_files, project_texts
from sd3pipe.params.command_line import load_stage_models
from sd3pipe.params.demo import DemoParams
from sd3pipe.params.stage_file import render_stage_file
from sd3pipe.project.pipeline import dvc_yaml

ROOT = Path(__file__).resolve().parent.parent


def texts() -> dict[str, str]:
    """Returns the files by name."""
    demo = project_texts(steps=DemoParams.model_fields["steps"].default)
    files = {}
    for stage, model in load_stage_models().items():
        name = f"stages/{stage}.toml"
        files[name] = render_stage_file(model, stage.replace("_", "-"), tomllib.loads(demo.get(name, "")))
    folders = sorted({f"examples/demo/{Path(name).parent}" for name in picture_files()})
    files["dvc.yaml"] = dvc_yaml(read_project(ROOT).paths, folders, folder=ROOT)
    return files


def example_texts() -> dict[str, bytes]:
    """Returns the demo's dataset file and prompts, which stand beside its pictures."""
    demo = project_texts(steps=1)
    return {name: demo[name].encode() for name in ("dataset.toml", "sample_prompts.txt")}


if __name__ == "__main__":
    for name, text in texts().items():
        (ROOT / name).write_text(text, encoding="utf-8")
    for name, content in {**picture_files(), **example_texts()}.items():
        path = ROOT / "examples" / "demo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
