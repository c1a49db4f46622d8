"""Loss on held-out pictures: fixed noise levels, noise keyed by picture, in eval mode, with confidence intervals."""

# P pictures, S noise levels (sigmas)

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sd3pipe import stopping
from sd3pipe.console import count, listed, progress
from sd3pipe.errors import Stopped
from sd3pipe.intervals import mean_and_half_width
from sd3pipe.metrics import BAND_NAMES, SIGMAS, ValidationRecord, read_records
from sd3pipe.rules.feeding import EncoderDropout
from sd3pipe.training.batches import fixed_batches
from sd3pipe.training.checkpoints import mark_best
from sd3pipe.training.feed import Feed, FeedRules
from sd3pipe.training.records import Records
from sd3pipe.training.run import Run, TrainedModel
from sd3pipe.training.state_file import Progressed

log = logging.getLogger(__name__)

_FEW_PICTURES = 30  # below this a difference in validation loss says little


class Validator:
    """Measures the held-out pictures with the weights as they would be saved.

    Nothing of them is dropped, and the noise belongs to the picture.
    """

    def __init__(self, run: Run, model: TrainedModel, records: Records | None) -> None:
        params, items = run.params, run.data.validation
        rules = FeedRules.of(params, model.objective.mmdit.context_embedder.compute_dtype)
        if params.validation.validation_seed is not None:
            rules = replace(rules, seed=params.validation.validation_seed)
        rules = replace(rules, encoder_dropout=EncoderDropout())
        self._feed = Feed(items, run.data.latents, run.data.text, rules)
        self._model, self._processes, self._records, self._folder = model, run.processes, records, run.folder
        batches = fixed_batches(items, batch_size=params.batches.train_batch_size)
        self._batches = batches[: params.validation.max_validation_steps]
        self._pictures_P = np.sort(np.concatenate([plan.pictures for plan in self._batches]))

    def __call__(self, progressed: Progressed) -> None:
        """Validates, records the result and marks the best step so far. Raises Stopped, on all processes alike."""
        losses_PS = self.losses()
        by_picture_P = losses_PS.mean(dim=1)
        loss, half_width = mean_and_half_width(by_picture_P.tolist())
        is_number = math.isfinite(loss)
        if is_number and progressed.step and (progressed.best_loss is None or loss < progressed.best_loss):
            progressed.best_step, progressed.best_loss = progressed.step, loss
        if self._records is None:
            return
        items, pictures_P = self._feed.items, self._pictures_P
        if not is_number:
            names = [items.names[int(number)] for number in pictures_P[~by_picture_P.isfinite().numpy()]]
            log.warning(
                "validation after step %d: the loss of %s of %d is no number, and never the best: %s",
                progressed.step, count(len(names), "picture"), len(pictures_P), listed(names),
            )  # fmt: skip
        subsets_P = torch.from_numpy(items.subsets[pictures_P])
        chosen = {rules.name: subsets_P == i for i, rules in enumerate(items.rules)}
        bands = {name: mean_and_half_width(losses_PS[:, i].tolist()) for i, name in enumerate(BAND_NAMES)}
        self._records.write(
            "validation",
            progressed.step,
            loss=loss,
            ci95=half_width,
            bands={name: band[0] for name, band in bands.items()},
            bands_ci95={name: band[1] for name, band in bands.items()},
            subset_loss={name: by_picture_P[rows].mean().item() for name, rows in chosen.items() if rows.any()},
            by_picture=by_picture_P.tolist(),
        )
        if progressed.best_step == progressed.step:
            mark_best(self._folder.path, progressed.step, loss)

    @torch.no_grad()
    def losses(self) -> Tensor:
        """Returns the loss of each picture that is measured (row) at each noise level (column), on the CPU.

        Raises Stopped when one of the processes was asked to stop on the way.
        """
        processes, objective, network = self._processes, self._model.objective, self._model.objective.network
        shared = torch.zeros(len(self._feed.items), len(SIGMAS), dtype=torch.float64).to(processes.device)
        network.eval()
        network.set_dropout_keys(None)
        mine = self._batches[processes.rank :: processes.count]
        delivered = self._model.weights.delivered(self._model.optimizer)
        with delivered, progress("validation", len(mine), "batches") as bar:
            for plan in mine:
                if stopping.reason():
                    break
                batch = self._feed.batch(plan).to(processes.device)
                for column, sigma in enumerate(SIGMAS):
                    rows = torch.from_numpy(plan.pictures).to(processes.device)
                    shared[rows, column] = objective.losses_at(batch, sigma).double()
                bar.advance()
        network.train()
        if processes.any(bool(stopping.reason())):
            raise Stopped("stopped while validating")
        processes.sum(shared)
        return shared.cpu()[self._pictures_P]


def verdict(run: Path) -> str:
    """Returns one sentence on where over-fitting begins, as far as the run's validations show; "" without any."""
    records = [record for record in read_records(run) if record["kind"] == "validation"]
    if records and not math.isfinite(records[-1]["loss"]):
        return f"validation loss is no number at the last step ({records[-1]['step']}): take an earlier checkpoint"
    if len(records) < 2:
        return ""
    numbers, last = [record for record in records if math.isfinite(record["loss"])], records[-1]
    best = min(numbers, key=lambda record: record["loss"])
    pictures = len(last.get("by_picture", ()))
    weak = f" ({count(pictures, 'held-out picture')}: weak evidence)" if pictures < _FEW_PICTURES else ""
    if best is last:
        return f"validation loss is lowest at the last step ({_shown(last)}): no over-fitting is seen{weak}"
    rise, half_width = last["loss"] - best["loss"], None
    before, after = best.get("by_picture", []), last.get("by_picture", [])
    if before and len(before) == len(after):  # pairs of one picture's losses are far less noisy than two means
        rise, half_width = mean_and_half_width([late - early for early, late in zip(before, after, strict=True)])
    certain = half_width is not None and rise > half_width
    word = "over-fitting begins there" if certain else "that may be chance"
    margin = "" if half_width is None else f" +- {half_width:.2g}"
    return (
        f"validation loss was lowest at step {best['step']} ({_shown(best)}) and has risen by {rise:.2g}{margin} "
        f"since: {word}{weak}"
    )


def _shown(record: ValidationRecord) -> str:
    return f"{record['loss']:.4g}" + ("" if record["ci95"] is None else f" +- {record['ci95']:.2g}")
