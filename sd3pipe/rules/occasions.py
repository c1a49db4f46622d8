"""What a run does now and then: saving, drawing samples, validating; and what it does at a bad loss."""

from dataclasses import dataclass

from sd3pipe.rules.declaring import rule
from sd3pipe.words import AfterBadLoss, SavePrecision, ToldVariant

# fmt: off


@dataclass(frozen=True, slots=True, kw_only=True)
class Every:
    """Something that is due every so many steps, or every so many epochs."""

    steps: int | None = None
    epochs: int | None = None

    def __bool__(self) -> bool:
        return bool(self.steps or self.epochs)

    def due(self, step: int, epochs_before: int, epochs_done: int) -> bool:
        """Returns whether it is due after `step`, during which the number of complete epochs went up as given."""
        by_steps = bool(self.steps) and step % (self.steps or 1) == 0
        by_epochs = bool(self.epochs) and epochs_done // (self.epochs or 1) > epochs_before // (self.epochs or 1)
        return by_steps or by_epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingRules:
    """When checkpoints are written, and which older ones go: None keeps all, counted back from the newest."""

    save_every_n_steps: int | None = rule(250, "Steps between checkpoints; 0: none on the way.", ge=0)
    save_every_n_epochs: int | None = rule(None, "Epochs between checkpoints.", advanced=True, ge=1)
    save_last_n_steps: int | None = rule(None, "Delete checkpoints that are this many steps old.", advanced=True, ge=0)
    save_last_n_steps_state: int | None = rule(
        None, "Delete optimizer states that are this many steps old; default: keep the newest two.",
        advanced=True, ge=0,
    )
    save_last_n_epochs: int | None = rule(
        None, "Delete checkpoints that are this many epochs old.", advanced=True, ge=1
    )
    save_last_n_epochs_state: int | None = rule(
        None, "Delete optimizer states that are this many epochs old.", advanced=True, ge=1
    )
    save_precision: SavePrecision | None = rule(
        None, "Number format of saved adapters; default: as trained.", advanced=True
    )

    @property
    def every(self) -> Every:
        return Every(steps=self.save_every_n_steps, epochs=self.save_every_n_epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadLossRules:
    """Which losses are bad, and what is done about one."""

    on_bad_loss: AfterBadLoss = rule(
        "stop", "At a loss that is no number or spikes: stop, or leave that step out and go back a checkpoint.",
        advanced=True,
    )
    loss_spike_factor: float | None = rule(
        None, "A loss this many times the running mean counts as a spike; default: none does.", advanced=True, gt=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRules:
    """When sample pictures are drawn, and as which variant."""

    sample_every_n_steps: int | None = rule(250, "Steps between sample pictures; 0: none on the way.", ge=0)
    sample_every_n_epochs: int | None = rule(None, "Epochs between sample pictures.", advanced=True, ge=1)
    sample_at_first: bool = rule(True, "Draw samples before the first step, too.", advanced=True)
    max_sample_prompts: int | None = rule(
        None, "Draw only the first so many prompts while training; `judge` draws all. Default: all.",
        advanced=True, ge=1,
    )
    variant: ToldVariant | None = rule(
        None, "Sample with the turbo model's steps and scale; nothing else tells it from large.", advanced=True
    )

    @property
    def every(self) -> Every:
        return Every(steps=self.sample_every_n_steps, epochs=self.sample_every_n_epochs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRules:
    """When held-out pictures are measured, how many of them, and with which noise."""

    validate_every_n_steps: int | None = rule(
        250, "Steps between validations on held-out pictures; 0: none but before the first step and at the end.",
        advanced=True, ge=0,
    )
    validate_every_n_epochs: int | None = rule(None, "Epochs between validations.", advanced=True, ge=1)
    max_validation_steps: int | None = rule(None, "Batches per validation; default: all.", advanced=True, ge=1)
    validation_seed: int | None = rule(None, "Seed of the validation noise; default: --seed.", advanced=True, ge=0)

    @property
    def every(self) -> Every:
        return Every(steps=self.validate_every_n_steps, epochs=self.validate_every_n_epochs)
