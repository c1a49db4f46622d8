"""One self-contained HTML page about a run, or two side by side: nothing is fetched when it is opened."""

from collections.abc import Sequence

from sd3pipe.pages.render import render as render_page
from sd3pipe.reporting.collect import RunRecord
from sd3pipe.reporting.facts import facts, learning_rates, losses

_SUMMARY = ("steps", "loss_first", "loss_last", "loss_mean", "best_step", "seconds_per_step", "exit_code", "version")


def render(runs: Sequence[RunRecord]) -> str:
    """Returns the page for one run, or for two that are compared."""
    options = [run.report.get("options") or {} for run in runs]
    rows = [[name, *(values.get(name) for values in options)] for name in sorted(set().union(*options))]
    differing = [row for row in rows if any(cell != row[1] for cell in row[2:])]
    summary = [[key.replace("_", " "), *(run.report.get(key) for run in runs)] for key in _SUMMARY]
    return render_page(
        "reporting/page.html",
        title=" and ".join(run.name for run in runs),
        runs=[facts(run) for run in runs],
        summary=[row for row in summary if any(value is not None for value in row[1:])],
        losses=losses(runs),
        learning_rates=learning_rates(runs),
        differing_options=differing,
        equal_options=[row for row in rows if row not in differing],
    )
