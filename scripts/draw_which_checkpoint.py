"""Draws docs/which-checkpoint.png: what the demo's checkpoints draw, which docs/which-checkpoint.md explains scores by.

    python scripts/draw_which_checkpoint.py DIR

DIR is the folder of a finished `sd3pipe demo`; the pictures are the small ones that its `judge` left.
"""

import argparse
from pathlib import Path

from sd3pipe.demo.project import RUN
from sd3pipe.diffusion.picture_grid import Grid, read_picture_file, save_grid
from sd3pipe.judgement import JUDGE_FOLDER, read_judgement

TARGET = Path(__file__).resolve().parent.parent / "docs" / "which-checkpoint.png"
EACH = 2  # prompts with the trigger, and as many without


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder / RUN / JUDGE_FOLDER
    found = read_judgement(folder)
    rows = [row for bears in (True, False) for row in [r for r in found.drawn if r.with_trigger is bears][:EACH]]
    pictures = [[read_picture_file(folder / "pictures" / name) for name in row.pictures] for row in rows]
    columns = ["base", *(f"step {scores.checkpoint}" for scores in found.scores)]
    title = f"One seed, {len(columns)} columns on equal noise: with the trigger ({found.trigger}), then without"
    save_grid(TARGET, Grid(title=title, columns=columns, rows=[row.prompt for row in rows], pictures=pictures))


if __name__ == "__main__":
    main()
