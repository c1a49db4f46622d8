"""`sd3pipe demo`: the whole pipeline on the embedded demo, from drawings to a LoRA that visibly changes pictures."""

from collections.abc import Sequence
from pathlib import Path

from sd3pipe.child import run_child
from sd3pipe.console import StageReport, say
from sd3pipe.demo.base_files import JUDGE, MODEL
from sd3pipe.demo.project import PROMPTED, RUN, write_files
from sd3pipe.documents import holds
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.files import make_folder, write_bytes
from sd3pipe.judgement import JUDGE_FOLDER, read_judgement
from sd3pipe.params.demo import DemoParams

PICTURE = "before-and-after.png"
_SAMPLES = "samples"


def main(params: DemoParams) -> None:
    """Writes the project, runs its stages, draws before and after, and says what was learnt."""
    folder = params.folder
    with StageReport("demo", path=folder / "demo.report.json", inputs={"folder": str(folder)}) as report:
        if not MODEL.is_file():
            raise InputError(f"{MODEL}: the demo base is missing: `python scripts/make_demo_base.py` makes it")
        _write(folder, params.steps)
        report.begin()
        _run(folder, "run")
        seeds = range(1, params.seeds + 1)
        _run(
            folder, "sample", "--model", str(MODEL), "--prompts", "caches/prompts", "--adapter", RUN,
            "--out", _SAMPLES, "--seeds", ",".join(map(str, seeds)),
        )  # fmt: skip
        figures = _before_and_after(folder, seeds)
        report.update(**figures)
        say(
            f"the new shape is drawn in {figures['new_after']} of {figures['new_pictures']} pictures "
            f"({figures['new_before']} before), old prompts in {figures['old_after']} of {figures['old_pictures']} "
            f"({figures['old_before']} before): see {folder / PICTURE}"
        )
        _run(
            folder, "judge", "--model", str(MODEL), "--judge-model", str(JUDGE), "--adapter", RUN,
            "--out", f"{RUN}/{JUDGE_FOLDER}", "--seeds", ",".join(map(str, seeds)),
        )  # fmt: skip
        suggestion = read_judgement(folder / RUN / JUDGE_FOLDER).suggestion.text
        report.summary = suggestion.split(". ")[0].removesuffix(".")


def _write(folder: Path, steps: int) -> None:
    """Writes the project's files. Raises ParameterError where other files stand in their places."""
    files = write_files(folder, steps=steps)
    other = [path for path, content in files.items() if path.exists() and not holds(path, content)]
    if other:
        raise ParameterError(f"{other[0]} is not the demo's and is not overwritten: name another folder")
    for path, content in files.items():
        make_folder(path.parent)
        if not path.exists():
            write_bytes(path, content)


def _run(folder: Path, *arguments: str) -> None:
    """Runs one command in the project's folder, in a process of its own."""
    run_child(f"`sd3pipe {arguments[0]}` in {folder}", arguments, same_command="sd3pipe demo", folder=folder)


def _before_and_after(folder: Path, seeds: Sequence[int]) -> dict[str, int]:
    """Lays the pictures out side by side, and counts by the measure how many show what their prompt says."""
    from sd3pipe.demo.measure import read_picture
    from sd3pipe.diffusion.picture_grid import Grid, read_picture_file, save_grid
    from sd3pipe.diffusion.sheet import read_sheet

    sheet = read_sheet(folder / _SAMPLES)
    figures = {f"{kind}_{when}": 0 for kind in ("new", "old") for when in ("before", "after", "pictures")}
    lines = []
    for subject, prompt in zip(PROMPTED, sheet.prompts, strict=True):
        kind = "new" if subject.shape == PROMPTED[0].shape else "old"
        columns = [[_picture(folder, row[column]) for row in prompt.cells] for column in range(2)]
        for when, files in zip(("before", "after"), columns, strict=True):
            readings = [read_picture(read_picture_file(file)) for file in files]
            figures[f"{kind}_{when}"] += sum(reading.shape == subject.shape for reading in readings)
        figures[f"{kind}_pictures"] += len(seeds)
        lines.append([read_picture_file(file) for files in columns for file in files])
    grid = Grid(
        title="The same prompts and seeds, before training (left) and after (right)",
        columns=[f"{when}, seed {seed}" for when in ("before", "after") for seed in seeds],
        rows=[prompt.title for prompt in sheet.prompts],
        pictures=lines,
    )
    save_grid(folder / PICTURE, grid)
    return figures


def _picture(folder: Path, name: str) -> Path:
    """Returns the file of a cell; its name ends with the VAE that decoded it."""
    found = sorted((folder / _SAMPLES / "pictures").glob(f"{name}-vae*.png"))
    if not found:
        raise InputError(f"{name}: was not drawn: see {folder / _SAMPLES}.report.json")
    return found[-1]
