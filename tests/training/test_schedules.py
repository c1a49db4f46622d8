"""Learning rates against transformers' schedules, which sd-scripts uses."""

import pytest
import torch
from transformers import optimization

from sd3pipe.errors import ParameterError
from sd3pipe.params.train import TrainParams
from sd3pipe.rules.optimisation import ScheduleRules
from sd3pipe.training.schedules import EXTENDABLE, make_schedule, parse_pieces, resolve_steps

TOTAL, WARMUP = 40, 5


def theirs(name: str, warmup: int = WARMUP, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = {
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, TOTAL),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, TOTAL),
        "cosine_with_restarts": lambda: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(
            optimizer, warmup, TOTAL, num_cycles=3
        ),
        "cosine_with_min_lr": lambda: optimization.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, TOTAL, min_lr_rate=0.2
        ),
        "polynomial": lambda: optimization.get_polynomial_decay_schedule_with_warmup(
            optimizer, warmup, TOTAL, lr_end=0.0, power=2.0
        ),
        "inverse_sqrt": lambda: optimization.get_inverse_sqrt_schedule(optimizer, warmup, timescale=8),
        "warmup_stable_decay": lambda: optimization.get_wsd_schedule(
            optimizer, warmup, 10, num_stable_steps=TOTAL - warmup - 10, min_lr_ratio=0.1, decay_type="cosine"
        ),
        "constant_with_warmup": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
    }
    scheduler = make[name]()
    rates = []
    for _ in range(TOTAL):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


OPTIONS = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"lr_scheduler_num_cycles": 3},
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.2},
    "polynomial": {"lr_scheduler_power": 2.0},
    "inverse_sqrt": {"lr_scheduler_timescale": 8},
    "warmup_stable_decay": {"lr_decay_steps": 10, "lr_scheduler_min_lr_ratio": 0.1},
    "constant_with_warmup": {},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_rates_equal_transformers_after_the_warmup(name):
    rules = ScheduleRules(lr_scheduler=name, lr_warmup_steps=WARMUP, **OPTIONS[name])
    schedule = make_schedule(rules, TOTAL)
    ours = [schedule.factor(step) for step in range(TOTAL)]
    assert ours[WARMUP:] == pytest.approx(theirs(name)[WARMUP:], abs=1e-12)
    assert ours[:WARMUP] == pytest.approx([(step + 1) / (WARMUP + 1) for step in range(WARMUP)])


def test_pieces_follow_transformers_rules():
    rules = ScheduleRules(
        lr_scheduler="piecewise_constant", lr_warmup_steps=0, lr_scheduler_args=("step_rules=1:10,0.1:20,0.01",)
    )
    schedule = make_schedule(rules, TOTAL)
    assert [schedule.factor(step) for step in (0, 9, 10, 19, 20, 39)] == [1, 1, 0.1, 0.1, 0.01, 0.01]
    with pytest.raises(ParameterError, match="FACTOR:STEP"):
        parse_pieces("1:ten,0.1")


@pytest.mark.parametrize("name", EXTENDABLE)
def test_extendable_schedules_do_not_see_the_end(name):
    args = ("step_rules=1:10,0.5",) if name == "piecewise_constant" else ()
    rules = ScheduleRules(lr_scheduler=name, lr_warmup_steps=3, lr_scheduler_args=args)
    short, long = (make_schedule(rules, total) for total in (20, 2000))
    assert [short.factor(step) for step in range(20)] == [long.factor(step) for step in range(20)]


def test_steps_are_counts_or_ratios():
    assert resolve_steps(0.05, 2000) == 100
    assert resolve_steps(100, 2000) == 100
    paths = {"model": "m", "text": "t", "latents": "l", "out": "o"}
    assert TrainParams(**paths, lr_warmup_steps="10%").lr_warmup_steps == 0.1
    for share in ("100%", "250%"):  # 1.0 and 2.5 would be steps
        with pytest.raises(ValueError, match="must be less than 100%"):
            TrainParams(**paths, lr_warmup_steps=share)
    assert make_schedule(ScheduleRules(lr_scheduler="constant"), 100).warmup_steps == 0
    with pytest.raises(ValueError, match="has no warm-up"):
        TrainParams(**paths, lr_scheduler="constant", lr_warmup_steps=10)
