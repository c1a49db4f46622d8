"""The training loop: steps, and what happens between them."""

import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sd3pipe import stopping
from sd3pipe.console import Progress, progress, readable_bytes
from sd3pipe.device_memory import peak_device_bytes, peak_rss_bytes
from sd3pipe.errors import InputError, Stopped
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.params.train import duration_seconds
from sd3pipe.training.batches import Position
from sd3pipe.training.feed import Step
from sd3pipe.training.records import Records
from sd3pipe.training.run import Run
from sd3pipe.training.saving import Saver
from sd3pipe.training.spilling import SpillWatch
from sd3pipe.training.state_file import Progressed
from sd3pipe.training.step_runner import StepResult, StepRunner
from sd3pipe.training.step_samples import Sampler
from sd3pipe.training.validation import Validator

log = logging.getLogger(__name__)

_MAX_ROLLBACKS = 3


@dataclass(slots=True, kw_only=True)
class Loop:
    """A run under way. `steps_from` yields the tensors of each step from a position on."""

    run: Run
    runner: StepRunner
    progressed: Progressed
    steps_from: Callable[[Position], Iterator[Step]]
    saver: Saver
    records: Records | None
    picture_ids: Sequence[str]
    validate: Validator | None
    sample: Sampler | None
    streamer: BlockStreamer
    spilling: SpillWatch
    seconds_per_step: list[float] = field(default_factory=list)
    seconds_by_phase: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    copied_per_step: list[int] = field(default_factory=list)  # bytes of streamed blocks

    def train(self) -> None:
        """Trains to the last step and saves. Raises Stopped, after saving, when asked to stop on the way."""
        total, limit = self.run.inputs.total_steps, self.run.params.time_limit
        ends = time.monotonic() + duration_seconds(limit) if limit else math.inf
        with progress("train", total, "steps", done=self.progressed.step) as bar:
            self._before_the_first_step()
            steps = self.steps_from(self.progressed.position)
            while (state := self.progressed).step < total:
                start, copied = time.monotonic(), self.streamer.copied_bytes
                step = next(steps)
                if state.step in state.skipped_steps:
                    state.passed(step.plan, None)
                    continue
                reason = stopping.reason() or ("time limit" if start >= ends else "")
                result = self.runner.step(state.step, step.batches, loss_mean=state.loss_mean, stop=bool(reason))
                if result.bad:
                    steps = self._after_bad_loss(result, step)
                    continue
                self.copied_per_step.append(self.streamer.copied_bytes - copied)
                self._after_step(step, result, bar, time.monotonic() - start)
                if result.stop_wanted and state.step < total:
                    self._stop(reason)
        with self._phase("saving"):
            self.saver.save(self.progressed)

    def close(self) -> None:
        """Writes the summaries of what was recorded, and gives streamed weights back."""
        self.streamer.close()
        if self.records:
            self.records.close()

    def _before_the_first_step(self) -> None:
        """Does what an earlier run owes, or, before anything is learnt, what shows the base as it is."""
        if self.progressed.step == 0:
            self.progressed.owed = _due(validate=True, sample=self.run.params.samples.sample_at_first)
        owed = self.progressed.owed
        self._work_off()
        if owed:
            self.saver.note(self.progressed)
            self._share_samples()

    def _after_step(self, step: Step, result: StepResult, bar: Progress, seconds: float) -> None:
        state, epochs_before = self.progressed, self.progressed.epochs_done
        state.passed(step.plan, result.loss)
        self.seconds_per_step.append(seconds)
        self.spilling.see(seconds)
        self.seconds_by_phase["steps"] += seconds
        if self.records:
            samples = [
                [self.picture_ids[n], round(sigma, 4), float(f"{loss:.5g}")] for n, sigma, loss in result.samples
            ]
            self.records.write(
                "step",
                state.step,
                epoch=state.position.epoch,
                loss=result.loss,
                loss_mean=state.loss_mean,
                grad_norm=result.grad_norm,
                learning_rate=result.learning_rate,
                subset_loss=result.subset_losses,
                subset_samples=result.subset_samples,
                samples=samples,
                seconds=round(seconds, 4),
            )
        used = readable_bytes(peak_device_bytes(self.run.processes.device) or peak_rss_bytes())
        bar.advance(1, loss=f"{state.loss_mean:.4f}", lr=f"{result.learning_rate:.3g}", memory=used)
        params, now = self.run.params, (state.step, epochs_before, state.epochs_done)
        last = state.step == self.run.inputs.total_steps
        state.owed = _due(
            validate=params.validation.every.due(*now) or last, sample=params.samples.every.due(*now) or last
        )
        self._work_off()
        if params.saving.every.due(*now) or last or state.best_step == state.step:
            with self._phase("saving"):
                self.saver.save(state)
            self._share_samples()

    def _share_samples(self) -> None:
        """Shares what was drawn at the step of the newest checkpoint, which has just been saved or gone on from."""
        adapter = self.saver.newest_adapter
        if self.sample is not None and adapter is not None:
            self.sample.saved(self.progressed.step, adapter)

    def _work_off(self) -> None:
        """Validates and draws what is owed; asked to stop, it leaves the rest to the run that goes on from here."""
        state, callbacks = self.progressed, {"validation": self.validate, "samples": self.sample}
        while state.owed:
            callback = callbacks[state.owed[0]]
            with self._phase(state.owed[0]), contextlib.suppress(Stopped):
                if callback and not stopping.reason():
                    callback(state)
            if self.run.processes.any(bool(stopping.reason())):
                self._stop(stopping.reason())
            state.owed = state.owed[1:]

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Counts the seconds of its body to a phase of the run."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds_by_phase[name] += time.monotonic() - start

    def _stop(self, reason: str) -> None:
        """Saves and raises Stopped, on all processes alike."""
        state = self.progressed
        if state.step:
            self.saver.save(state)
        self.run.processes.wait()  # a launcher ends all once one has left, and the main process may still be writing
        raise Stopped(
            f"stopped by {reason or 'another process'} at step {state.step} of {self.run.inputs.total_steps}, "
            "everything is saved: the same command goes on"
        )

    def _after_bad_loss(self, result: StepResult, step: Step) -> Iterator[Step]:
        """Goes back to the last checkpoint, and from there on without the step at fault; or ends the run."""
        number, names = self.progressed.step, self.run.data.train.names
        mine = [names[int(picture)] for batch in step.batches for picture in batch.plan.pictures]
        pictures = [name for of_process in self.run.processes.all(mine) for name in of_process]
        message = f"step {number + 1}: {result.bad}; its pictures: {', '.join(pictures)}"
        skipped = [*self.progressed.skipped_steps, number]
        wanted = self.run.params.bad_loss.on_bad_loss == "rollback"
        goes_back = wanted and len(skipped) <= _MAX_ROLLBACKS and self.saver.can_roll_back
        if goes_back:
            self.progressed = self.saver.roll_back()
            self.progressed.skipped_steps = skipped
        if self.records:
            event = {"bad_step": number + 1, "bad_loss": result.bad, "pictures": pictures}
            self.records.write("event", self.progressed.step, **event)
        if not goes_back:
            raise InputError(
                f"{message}. Nothing was learnt from it. Look at these pictures, lower learning_rate or max_grad_norm, "
                "or let the run go on without such steps: --on-bad-loss rollback"
            )
        log.warning("%s. Going on from step %d without it", message, self.progressed.step)
        return self.steps_from(self.progressed.position)


def _due(*, validate: bool, sample: bool) -> list[str]:
    return [name for name, due in (("validation", validate), ("samples", sample)) if due]
