"""The checkpoint that `sd3pipe judge` suggests, for `export --checkpoints best`."""

import logging
from pathlib import Path

from sd3pipe.adapters.find import checkpoint_adapters
from sd3pipe.errors import InputError
from sd3pipe.judgement import JUDGE_FOLDER, read_judgement

log = logging.getLogger(__name__)


def suggested(run: Path) -> tuple[Path, float]:
    """Returns the adapter of a run that its judge.json suggests, and at which strength. Raises InputError for none."""
    run = run.parent if run.name == "final" and not (run / JUDGE_FOLDER).exists() else run
    folder = run / JUDGE_FOLDER
    suggestion = read_judgement(folder).suggestion
    found = checkpoint_adapters(run)
    if suggestion.checkpoint is None:
        raise InputError(f"{folder}: suggests no checkpoint: {suggestion.text}")
    if not isinstance(suggestion.checkpoint, int) or suggestion.checkpoint not in found:
        steps = ", ".join(map(str, found)) or "none"
        raise InputError(
            f"{folder}: suggests {suggestion.checkpoint}, and {run} has the steps {steps}: run `sd3pipe judge` again"
        )
    log.info("%s", suggestion.text)
    strength = 1.0 if suggestion.multiplier is None else suggestion.multiplier
    if strength != 1.0:
        log.info("strength %g is written into the file: load it at 1", strength)
    return found[suggestion.checkpoint], strength
