"""Loss on held-out pictures: fixed noise levels, noise keyed by picture, in eval mode, with confidence intervals."""

# P pictures, S noise levels (sigmas)

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from sd3pipe import stopping
from sd3pipe.console import count, progress
from sd3pipe.errors import Stopped
from sd3pipe.files import write_json
from sd3pipe.intervals import mean_and_half_width
from sd3pipe.metrics import BAND_NAMES, SIGMAS, ValidationRecord, read_records
from sd3pipe.training.batches import fixed_batches
from sd3pipe.training.checkpoints import CHECKPOINTS_FOLDER
from sd3pipe.training.feed import Feed
from sd3pipe.training.processes import Processes
from sd3pipe.training.progressed import Progressed
from sd3pipe.training.records import Records
from sd3pipe.training.run_folder import RunFolder
from sd3pipe.training.trained_model import TrainedModel

log = logging.getLogger(__name__)

_FEW_PICTURES = 30  # below this a difference in validation loss says little


class Validator:
    """Measures the held-out pictures of `feed` with the weights as they would be saved."""

    def __init__(
        self,
        *,
        feed: Feed,
        batch_size: int,
        max_batches: int | None,
        model: TrainedModel,
        processes: Processes,
        records: Records | None,
        run: RunFolder,
    ) -> None:
        self._feed, self._objective = feed, model.objective
        self._weights, self._optimizer = model.weights, model.optimizer
        self._processes, self._records, self._run = processes, records, run
        self._batches = fixed_batches(feed.items, batch_size=batch_size)[:max_batches]

    def __call__(self, progressed: Progressed) -> None:
        """Validates, records the result and marks the best step so far. Raises Stopped, on all processes alike."""
        losses_PS = self.losses().cpu()
        measured = ~losses_PS.isnan().any(dim=1)
        by_picture = losses_PS[measured].mean(dim=1).tolist()
        loss, half_width = mean_and_half_width(by_picture)
        if progressed.step and (progressed.best_loss is None or loss < progressed.best_loss):
            progressed.best_step, progressed.best_loss = progressed.step, loss
        if self._records is None:
            return
        bands = {name: mean_and_half_width(losses_PS[measured, i].tolist()) for i, name in enumerate(BAND_NAMES)}
        self._records.write(
            "validation",
            progressed.step,
            loss=loss,
            ci95=half_width,
            bands={name: band[0] for name, band in bands.items()},
            bands_ci95={name: band[1] for name, band in bands.items()},
            subset_loss=self._by_subset(losses_PS.mean(dim=1), measured),
            by_picture=by_picture,
        )
        if progressed.best_step == progressed.step:
            write_json(self._run.path / CHECKPOINTS_FOLDER / "best.json", {"step": progressed.step, "loss": loss})

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Returns the loss of each held-out picture (row) at each noise level (column); NaN where not measured.

        Raises Stopped when one of the processes was asked to stop on the way.
        """
        processes, network = self._processes, self._objective.network
        losses_PS = torch.full((len(self._feed.items), len(SIGMAS)), math.nan, dtype=torch.float64)
        shared = torch.zeros_like(losses_PS).to(processes.device)
        network.eval()
        network.set_dropout_keys(None)
        mine = self._batches[processes.rank :: processes.count]
        with self._weights.delivered(self._optimizer), progress("validation", len(mine), "batches") as bar:
            for plan in mine:
                if stopping.reason():
                    break
                batch = self._feed.batch(plan).to(processes.device)
                for column, sigma in enumerate(SIGMAS):
                    rows = torch.from_numpy(plan.pictures).to(processes.device)
                    shared[rows, column] = self._objective.losses_at(batch, sigma).double()
                bar.advance()
        network.train()
        if processes.any(bool(stopping.reason())):
            raise Stopped("stopped while validating")
        processes.sum(shared)
        for plan in self._batches:
            losses_PS[plan.pictures] = shared.cpu()[plan.pictures]
        return losses_PS

    def _by_subset(self, by_picture_P: Tensor, measured_P: Tensor) -> dict[str, float]:
        subsets_P = torch.from_numpy(self._feed.items.subsets)
        chosen = {rules.name: (subsets_P == i) & measured_P for i, rules in enumerate(self._feed.items.rules)}
        return {name: by_picture_P[rows].mean().item() for name, rows in chosen.items() if rows.any()}


def verdict(run: Path) -> str:
    """Returns one sentence on where over-fitting begins, as far as the run's validations show; "" without any."""
    records = [record for record in read_records(run) if record["kind"] == "validation"]
    if len(records) < 2:
        return ""
    best, last = min(records, key=lambda record: record["loss"]), records[-1]
    pictures = len(last.get("by_picture", ()))
    if best is last:
        return f"validation loss is lowest at the last step ({_shown(last)}): no over-fitting is seen{_weak(pictures)}"
    rise, half_width = _rise(best, last)
    certain = half_width is not None and rise > half_width
    word = "over-fitting begins there" if certain else "that may be chance"
    margin = "" if half_width is None else f" +- {half_width:.2g}"
    return (
        f"validation loss was lowest at step {best['step']} ({_shown(best)}) and has risen by {rise:.2g}{margin} "
        f"since: {word}{_weak(pictures)}"
    )


def _rise(best: ValidationRecord, last: ValidationRecord) -> tuple[float, float | None]:
    """Returns by how much the loss has risen, and half the width of its interval where both measured equally many.

    Pairs of one picture's losses are far less noisy than two means.
    """
    before, after = best.get("by_picture", []), last.get("by_picture", [])
    if not before or len(before) != len(after):
        return last["loss"] - best["loss"], None
    return mean_and_half_width([late - early for early, late in zip(before, after, strict=True)])


def _shown(record: ValidationRecord) -> str:
    return f"{record['loss']:.4g}" + ("" if record["ci95"] is None else f" +- {record['ci95']:.2g}")


def _weak(pictures: int) -> str:
    return f" ({count(pictures, 'held-out picture')}: weak evidence)" if pictures < _FEW_PICTURES else ""
