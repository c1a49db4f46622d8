"""One training step: forward and backward over its micro-batches, checks, and the update of the adapter."""

# B batch, C latent channels, h w latent pixels

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3pipe.device import sum_dtype
from sd3pipe.memory.layer_major import run_layer_major
from sd3pipe.training.feed import Batch
from sd3pipe.training.objective import ForwardPass
from sd3pipe.training.run import Run, TrainedModel
from sd3pipe.training.schedules import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step measured, over all processes."""

    loss: float
    grad_norm: float
    learning_rate: float
    subset_losses: dict[str, float]
    subset_samples: dict[str, int]
    samples: list[tuple[int, float, float]]  # number among the items, sigma, loss before any weighting
    stop_wanted: bool
    bad: str = ""  # why the step was not applied


class StepRunner:
    """Takes single training steps; with `layer_major`, block by block for all of its micro-batches."""

    def __init__(self, run: Run, model: TrainedModel, schedule: Schedule) -> None:
        self.params, self.processes, self.schedule = run.params, run.processes, schedule
        self.objective, self.network, self.weights = model.objective, model.objective.network, model.weights
        self.optimizer, self.scaler, self._streamer = model.optimizer, model.scaler, model.streamer
        in_groups = {tensor for group in model.optimizer.param_groups for tensor in group["params"]}
        self._optimized = [tensor for tensor in model.weights.optimized if tensor in in_groups]  # none of rate 0
        self._subset_names = [rules.name for rules in run.data.train.rules]
        self._rates = [group["lr"] for group in model.optimizer.param_groups]

    def step(self, number: int, batches: Sequence[Batch], *, loss_mean: float | None, stop: bool) -> StepResult:
        """Runs forward and backward over the micro-batches and, if all is well, updates the adapter."""
        if not self.network.training:
            self.network.train()
        sums, samples = self._accumulate(batches)
        sums[-1, 0] = stop
        self.processes.mean_gradients(self.weights.parameters)
        self.weights.begin_update()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([tensor.grad for tensor in self._optimized if tensor.grad is not None])
        shared = self.processes.sum(torch.cat([sums.flatten(), samples.flatten()]))
        numbers = torch.cat([shared, norm.to(sums.dtype).view(1)]).tolist()  # the only host sync
        result = self._result(number, numbers, loss_mean)
        if result.bad:
            if self.scaler is not None:
                self.scaler.update()  # else it refuses to unscale the next step's gradients
            self.weights.clear_gradients()
            return result
        most = self.params.max_grad_norm
        if most and result.grad_norm > most:
            torch.nn.utils.clip_grads_with_norm_(self._optimized, most, norm)
        self._update(number)
        return result

    def _accumulate(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Returns sums [subsets + 2, 2]: per subset loss and samples, then the weighted mean loss, then flags.

        Beside them stand the samples of all processes [places, 3]: picture, counted from 1, sigma and loss.
        """
        device, objective = self.processes.device, self.objective
        sums = torch.zeros(len(self._subset_names) + 2, 2, dtype=sum_dtype(device), device=device)
        samples: list[Tensor] = []
        forward_passes = (objective.prepare(batch.to(device)) for batch in batches)

        def weighed(forward_pass: ForwardPass, velocity_BChw: Tensor) -> Tensor:
            losses_B = objective.losses(forward_pass, velocity_BChw)
            loss = (losses_B * forward_pass.batch.weights).mean() / len(batches)
            sums[:, 0].index_add_(0, forward_pass.batch.subsets, losses_B.detach().to(sums.dtype))
            sums[:, 1].index_add_(0, forward_pass.batch.subsets, torch.ones_like(losses_B, dtype=sums.dtype))
            sums[-2, 0] += loss.detach().to(sums.dtype)
            numbers = (forward_pass.batch.pictures + 1, forward_pass.batch.sigmas, losses_B.detach())
            samples.append(torch.stack([number.to(sums.dtype) for number in numbers], dim=1))
            return loss if self.scaler is None else self.scaler.scale(loss)

        if self.params.memory.layer_major:
            self._take_layer_by_layer(list(forward_passes), weighed)
        else:
            for forward_pass in forward_passes:
                weighed(forward_pass, objective.predict(forward_pass)).backward()
        own, batch_rules = torch.cat(samples), self.params.batches
        places = batch_rules.train_batch_size * batch_rules.gradient_accumulation_steps  # that no other process uses
        before = self.processes.rank * places
        after = self.processes.count * places - before - len(own)
        return sums, torch.nn.functional.pad(own, (0, 0, before, after))

    def _take_layer_by_layer(
        self, forward_passes: list[ForwardPass], weighed: Callable[[ForwardPass, Tensor], Tensor]
    ) -> None:
        """Takes all micro-batches of the step through one block after the other."""

        def select(number: int) -> None:
            self.objective.select(forward_passes[number])
            self._streamer.use(forward_passes[number].batch.modulation)

        run_layer_major(
            self.objective.mmdit,
            self._streamer,
            [forward_pass.inputs for forward_pass in forward_passes],
            loss=lambda number, velocity_BChw: weighed(forward_passes[number], velocity_BChw),
            select=select,
        )
        self._streamer.use(None)

    def _result(self, number: int, numbers: list[float], loss_mean: float | None) -> StepResult:
        end = 2 * (len(self._subset_names) + 2)
        sums, samples, norm = numbers[:end], numbers[end:-1], numbers[-1]
        pairs = list(zip(sums[0::2], sums[1::2], strict=True))
        loss = pairs[-2][0] / self.processes.count
        per_subset = {name: pair for name, pair in zip(self._subset_names, pairs, strict=False) if pair[1]}
        return StepResult(
            loss=loss,
            grad_norm=norm,
            learning_rate=self._rates[0] * self.schedule.factor(number),
            subset_losses={name: total / count for name, (total, count) in per_subset.items()},
            subset_samples={name: round(count) for name, (_, count) in per_subset.items()},
            samples=[
                (round(picture) - 1, sigma, loss)
                for picture, sigma, loss in zip(samples[0::3], samples[1::3], samples[2::3], strict=True)
                if picture
            ],
            stop_wanted=pairs[-1][0] > 0,
            bad=self._complaint(loss, norm, loss_mean),
        )

    def _complaint(self, loss: float, norm: float, loss_mean: float | None) -> str:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self.scaler is None and not math.isfinite(norm):
            return f"the norm of the gradients is {norm}"
        factor = self.params.bad_loss.loss_spike_factor
        if factor is not None and loss_mean is not None and loss > factor * loss_mean:
            return f"the loss is {loss:.4g}, {loss / loss_mean:.3g} times its running mean"
        return ""

    def _update(self, number: int) -> None:
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.schedule.factor(number)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.weights.end_update(number)
        if self.params.scale_weight_norms is not None:
            self.network.limit_norms(self.params.scale_weight_norms)
        self.weights.move_average(number)
        self.weights.clear_gradients()
