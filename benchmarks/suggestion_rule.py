"""How far below the best the checkpoint is that `judge` suggests, where the truth is made up.

    python benchmarks/suggestion_rule.py [--trials 50]

Nine checkpoints gain by a known curve; eight prompts and four seeds each are drawn around it with more or less noise.
Three rules choose: the one that suggests, the nearest by its mean, and the earliest that is not measurably further than
the nearest. What the chosen one lacks is a share of what the best has gained; `place` is which of the nine it is.
"""

import argparse

import numpy as np

from sd3pipe.judging.bootstrap import Resampled, differences, resample
from sd3pipe.judging.suggestion import Candidate, suggest

# K checkpoints, P prompts, S seeds

CHECKPOINTS, PROMPTS, SEEDS = 9, 8, 4
STEPS = np.arange(1, CHECKPOINTS + 1)
CURVES = {
    "saturates": 1 - np.exp(-STEPS / 2),
    "levels out": np.array([0.1, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1]),
    "peaks": np.array([0.2, 0.5, 0.8, 1, 0.95, 0.85, 0.75, 0.65, 0.55]),
    "rises": STEPS / CHECKPOINTS,
    "stays": np.ones(CHECKPOINTS),
}
NOISES = (0.03, 0.3, 1.0)  # of one picture, where the best has gained 1
BY_PROMPT = 0.3  # of the noise, what a checkpoint draws better or worse of one prompt whatever the seed


def main() -> None:
    """Prints one row for each curve, noise and rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trials", type=int, default=50)
    trials = parser.parse_args().trials
    print("| curve | standard error between equals | rule | lacks | lacks over a tenth | place |")
    print("|---|---|---|---|---|---|")
    for name, curve_K in CURVES.items():
        gained_K = curve_K / curve_K.max()
        for noise in NOISES:
            drawn = [resample(tables(gained_K, noise, seed)) for seed in range(trials)]
            error = noise * np.sqrt(2 * (1 / SEEDS + BY_PROMPT**2) / PROMPTS)
            for rule in (shown, nearest, not_further):
                chosen = np.array([rule(likeness) for likeness in drawn])
                lacks = 1 - gained_K[chosen]
                told = f"{lacks.mean():.1%} | {(lacks > 0.1).mean():.0%} | {chosen.mean() + 1:.1f}"
                print(f"| {name} | {error:.2f} | {rule.__name__.replace('_', ' ')} | {told} |", flush=True)


def tables(gained_K: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Returns likeness by checkpoint, prompt and seed; some prompts gain more than others."""
    generator = np.random.default_rng(seed)
    by_prompt_1P1 = 1 + 0.5 * generator.standard_normal((1, PROMPTS, 1))
    of_prompts_KP1 = BY_PROMPT * generator.standard_normal((CHECKPOINTS, PROMPTS, 1))
    of_pictures_KPS = generator.standard_normal((CHECKPOINTS, PROMPTS, SEEDS))
    return gained_K[:, None, None] * by_prompt_1P1 + noise * (of_prompts_KP1 + of_pictures_KPS)


def shown(likeness: Resampled) -> int:
    candidates = [Candidate(checkpoint=number, multiplier=1.0) for number in range(CHECKPOINTS)]
    return int(suggest(candidates, likeness, {}).checkpoint or 0)


def nearest(likeness: Resampled) -> int:
    return int(likeness.values_K.argmax())


def not_further(likeness: Resampled) -> int:
    best = nearest(likeness)
    family = likeness.combined(differences(CHECKPOINTS, [(best, other) for other in range(CHECKPOINTS)])).family()
    return next(number for number, score in enumerate(family) if number == best or (score.low or 0) <= 0)


if __name__ == "__main__":
    main()
