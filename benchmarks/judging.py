"""Whether `judge` is right on the demo, whose truth a hand-written measure knows.

    python benchmarks/judging.py [--folder DIR] [--draws 400] [--only order spoilt null]

order   A run of nine checkpoints. Each draws the new shape --draws times and old shapes a quarter as often, and the
        measure counts what is right. Then they are judged six times, each time by eight other prompts with the new
        shape, eight without and four seeds, and three times by sixteen: of the pairs whose measured intervals are
        disjoint, likeness should order 95 % right; the suggested checkpoint should not be measurably worse than the
        best one (one-sided, paired).
spoilt  A run at five times the rate that keeps no old shapes: drift should order what is lost of them.
null    One adapter that poses as nine, each with seeds of its own from one pool: among 200 trials a difference is
        claimed in at most 20.

What was drawn and counted is kept in --folder, so that a second call goes on; DIR/demo may be a finished demo.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

from support.demo_pictures import draw_latents, encode_subjects, held_out_subjects, read_latents

from sd3pipe.adapters.find import checkpoint_adapters
from sd3pipe.cache.reader import CacheReader
from sd3pipe.demo.base_files import JUDGE, MODEL
from sd3pipe.demo.drawings import NEW_WORD, Subject, all_subjects
from sd3pipe.demo.project import HELD_OUT, LEARNT, PROMPTED
from sd3pipe.diffusion.sampler import decode_pictures
from sd3pipe.fingerprint import hash_json
from sd3pipe.judging.bootstrap import Resampled, differences, resample
from sd3pipe.judging.concept import towards
from sd3pipe.judging.judge_model import JudgeModel
from sd3pipe.judging.references import mean_latents, read_references
from sd3pipe.judging.scores import Embedded, losses, measure
from sd3pipe.judging.suggestion import Candidate, suggest
from sd3pipe.judging.trigger import without
from sd3pipe.models.checkpoint import load_vae

# C columns, P prompts, S seeds, D embedding width, N draws

POSERS, TRIALS, SEEDS_EACH = 9, 200, 4
SEEDS, TOLERANCE = (1, 2, 3, 4), 0.5  # what `judge` takes by default
PROMPTS, MOST_PROMPTS = 8, 48  # of a judgement, with the new shape and as many of old ones; of all judgements
STEPS, EVERY = 900, 10  # the demo's
NINE = (10, 20, 30, 40, 60, 100, 200, 450, 900)  # the new shape is learnt mostly in the first hundred steps
SPOILT_STEPS, SPOILT_EVERY, SPOILT_RATE = 120, 20, 1.5e-2
Booleans = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--only", nargs="+", choices=("order", "spoilt", "null"), default=("order", "spoilt", "null"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="judging-"))).resolve()
    if not (folder / "demo/caches/latents").exists():
        _run("demo", folder / "demo")
    nine = [(step, path) for step, path in trained(folder, "nine", STEPS, EVERY) if step in NINE]
    if "order" in options.only:
        order(folder, nine, options.draws)
    if "spoilt" in options.only:
        spoilt(folder, options.draws)
    if "null" in options.only:
        null(folder, nine[-1][1])


def trained(folder: Path, name: str, steps: int, every: int, **changed: str) -> list[tuple[int, Path]]:
    """Returns the adapters of a run on the demo's pictures, by step; `changed` has other values of its stage file."""
    caches, run = folder / "demo/caches", folder / name
    config = folder / f"{name}.toml"
    lines = (folder / "demo/stages/train.toml").read_text(encoding="utf-8").splitlines()
    words = [line.split(" = ") for line in lines]
    config.write_text("\n".join(" = ".join([key, changed.get(key, *value)]) if value else key for key, *value in words))
    _run(
        "train", "--model", MODEL, "--text", caches / "text", "--latents", caches / "latents", "--out", run,
        "--config", config, "--max-train-steps", steps, "--save-every-n-steps", every, "--validate-every-n-steps", 0,
    )  # fmt: skip
    return [(step, path) for step, path in checkpoint_adapters(run).items() if step % every == 0]


def order(folder: Path, adapters: Sequence[tuple[int, Path]], draws: int) -> None:
    """Compares what judge says of the checkpoints with what the measure counts of the new shape."""
    new = {step: right(folder, path, unseen(), draws) for step, path in adapters}
    old = {step: right(folder, path, held_out_subjects(), draws // 4) for step, path in adapters}
    best = max(new.values(), key=lambda right_N: right_N.mean())
    for prompts, number in [(n, number) for n in (PROMPTS, 2 * PROMPTS) for number in range(MOST_PROMPTS // n)]:
        found = measure(scene(folder, adapters, pools(), prompts, number))
        assert found.likeness is not None
        if (prompts, number) == (PROMPTS, 0):
            show({"new shape": new, "old shapes": old}, {"likeness": found.likeness, "drift": found.drift})
        candidates = [Candidate(checkpoint=step, multiplier=1.0) for step, _ in adapters]
        suggestion = suggest(candidates, found.likeness, losses(found, TOLERANCE))
        print(f"{prompts} prompts, {number + 1}: likeness orders {ordered(new, found.likeness.values_K)}")
        print(f"  {suggestion.text}")
        if suggestion.checkpoint is not None:
            print(f"  {compared(new[int(suggestion.checkpoint)], best)}")


def spoilt(folder: Path, draws: int) -> None:
    """Compares drift with what the measure counts of old shapes, of checkpoints that lose them."""
    adapters = trained(
        folder, "spoilt", SPOILT_STEPS, SPOILT_EVERY, learning_rate=str(SPOILT_RATE), diff_output_preservation="false"
    )
    old = {step: right(folder, path, held_out_subjects(), draws // 4) for step, path in adapters}
    for number in range(len(pools()[1]) // PROMPTS):
        drift = measure(scene(folder, adapters, pools()[1:], PROMPTS, number)).drift
        assert drift is not None
        if number == 0:
            show({"old shapes": old}, {"drift": drift})
        print(f"{PROMPTS} prompts, {number + 1}: drift orders {ordered(old, -drift.values_K)} by old shapes")


def compared(chosen_N: Booleans, best_N: Booleans) -> str:
    """Returns whether a checkpoint is measurably worse than the best one, on equal draws."""
    worse_N = best_N.astype(float) - chosen_N.astype(float)
    error = worse_N.std(ddof=1) / np.sqrt(len(worse_N))
    verdict = "measurably worse" if worse_N.mean() > 1.645 * error else "not measurably worse"  # one-sided 95 %
    return f"{chosen_N.mean():.1%}, best {best_N.mean():.1%}: {verdict} ({worse_N.mean():+.1%} +- {error:.1%})"


def show(counted: dict[str, dict[int, Booleans]], scores: dict[str, Resampled | None]) -> None:
    """Prints what was counted of each checkpoint, and what one judgement says of it."""
    heads = ["step", *(f"{name} right" for name in counted), *scores]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for number, step in enumerate(next(iter(counted.values()))):
        found = [part.score(number) for part in scores.values() if part is not None]
        shown = [f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})" for score in found]
        print(f"| {' | '.join([str(step), *(share(right[step]) for right in counted.values()), *shown])} |", flush=True)


def right(folder: Path, adapter: Path, subjects: Sequence[Subject], draws: int) -> Booleans:
    """Returns of which draws of the subjects, each with noise of its own, the measure reads the right shape."""
    repeated = [subjects[number % len(subjects)] for number in range(draws)]
    file = folder / "counted" / f"{_name(adapter, repeated, [])}.npy"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as place:
            prompts = encode_subjects(Path(place) / "a", repeated, 10_000)
        readings = read_latents(draw_latents(prompts, adapter))
        file.parent.mkdir(exist_ok=True)
        np.save(file, [reading.shape == item.shape for reading, item in zip(readings, repeated, strict=True)])
    return np.load(file)


def unseen() -> list[Subject]:
    """Returns what could be prompted of the new shape, and no picture or prompt of the demo shows."""
    return [subject for subject in all_subjects((NEW_WORD,)) if subject not in {*LEARNT, *HELD_OUT, *PROMPTED}]


def scene(
    folder: Path, adapters: Sequence[tuple[int, Path]], pools: Sequence[Sequence[Subject]], prompts: int, number: int
) -> Embedded:
    """Returns what one judgement is made from: so many prompts of each pool, which begins again where it ends."""
    places = [[(number * prompts + i) % len(pool) for i in range(prompts)] for pool in pools]
    subjects = [pool[place] for pool, mine in zip(pools, places, strict=True) for place in mine]
    paths = [None, *(path for _, path in adapters)]
    columns = [np.stack([embeddings(folder, pool, SEEDS, path) for path in paths]) for pool in pools]
    trained, held_out = reference_embeddings(folder)
    texts = [judge_model().text(without(subject.caption(), NEW_WORD)) for subject in subjects]
    return Embedded(
        drawn_CPSD=np.concatenate([part[:, mine] for part, mine in zip(columns, places, strict=True)], axis=1),
        trained_ND=trained,
        held_out_MD=held_out,
        texts_PD=np.array(texts, np.float64),
        with_trigger_P=np.array([subject.shape == NEW_WORD for subject in subjects]),
    )


def pools() -> tuple[list[Subject], list[Subject]]:
    """Returns the prompts of all judgements: with the new shape, and with old ones."""
    generator = np.random.default_rng(1)
    new, old = (
        [subjects[i] for i in generator.permutation(len(subjects))] for subjects in (unseen(), held_out_subjects())
    )
    return new[:MOST_PROMPTS], old[: MOST_PROMPTS // 2]


def embeddings(
    folder: Path, subjects: Sequence[Subject], seeds: Sequence[int], adapter: Path | None
) -> NDArray[np.float64]:
    """Returns what the judge model sees of drawn pictures [P, S, D]; all columns are drawn on equal noise."""
    return seen(drawn(folder, subjects, seeds, adapter)).reshape(len(subjects), len(seeds), -1)


@cache
def seen(file: Path) -> NDArray[np.float64]:
    """Returns what the judge model sees of the pictures of a file [N, D]."""
    return np.array([judge_model().picture(picture) for picture in np.load(file)], np.float64)


@cache
def judge_model() -> JudgeModel:
    return JudgeModel(JUDGE, torch.device("cpu"))


def drawn(folder: Path, subjects: Sequence[Subject], seeds: Sequence[int], adapter: Path | None) -> Path:
    """Returns the file of the pictures that are drawn for each subject with each seed [P x S, H, W, 3]."""
    file = folder / "drawn" / f"{_name(adapter, subjects, seeds)}.npy"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as place:
            prompts = encode_subjects(Path(place) / "a", subjects, 1)
        latents = draw_latents([replace(prompt, seed=seed) for prompt in prompts for seed in seeds], adapter)
        vae = load_vae(MODEL)
        file.parent.mkdir(exist_ok=True)
        np.save(file, torch.cat([decode_pictures(vae, part) for part in latents.split(16)]).numpy())
    return file


def reference_embeddings(folder: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns what it sees of the training pictures and of the held-out ones."""
    latents, vae = CacheReader(folder / "demo/caches/latents"), load_vae(MODEL)
    found: dict[bool, list[NDArray[np.float32]]] = {False: [], True: []}
    for reference in read_references(latents):
        picture = decode_pictures(vae, mean_latents(latents, reference.row)[None])[0].numpy()
        found[reference.held_out].append(judge_model().picture(picture))
    trained, held_out = (np.array(found[which], np.float64) for which in (False, True))
    return trained, held_out


def null(folder: Path, adapter: Path) -> None:
    """Claims a difference between posers that are one adapter, as seldom as it should."""
    subjects = pools()[0]
    base_PSD = embeddings(folder, subjects, SEEDS, None)[:PROMPTS]
    pool_PSD = embeddings(folder, subjects[:PROMPTS], range(1, POSERS * SEEDS_EACH + 1), adapter)
    trained = reference_embeddings(folder)[0]
    claims = 0
    for trial in range(TRIALS):
        seeds = np.random.default_rng(trial).permutation(POSERS * SEEDS_EACH).reshape(POSERS, SEEDS_EACH)
        likeness_KPS = towards(np.stack([base_PSD, *(pool_PSD[:, mine] for mine in seeds)]), trained)
        assert likeness_KPS is not None
        pairs = differences(POSERS, list(combinations(range(POSERS), 2)))
        claims += any(
            not score.low <= 0 <= score.high
            for score in resample(likeness_KPS).combined(pairs).family()
            if score.low is not None and score.high is not None
        )
    print(f"one adapter that poses as nine is told apart in {claims} of {TRIALS} trials")


def share(right_N: Booleans) -> str:
    low, high = wilson(right_N)
    return f"{right_N.mean():.1%} ({low:.1%} to {high:.1%})"


def wilson(right_N: Booleans) -> tuple[float, float]:
    """Returns the 95 % interval of a share (Wilson's)."""
    number, z = len(right_N), 1.96
    middle = (right_N.mean() + z * z / (2 * number)) / (1 + z * z / number)
    half = z / (1 + z * z / number) * np.sqrt(right_N.var() / number + z * z / (4 * number * number))
    return float(middle - half), float(middle + half)


def ordered(right: dict[int, Booleans], scores_K: NDArray[np.float64]) -> str:
    """Returns how many of the pairs with disjoint intervals the scores order as the shares do."""
    shares = [right_N.mean() for right_N in right.values()]
    intervals = [wilson(right_N) for right_N in right.values()]
    pairs = [
        (i, j) if shares[i] < shares[j] else (j, i)
        for i, j in combinations(range(len(right)), 2)
        if intervals[i][1] < intervals[j][0] or intervals[j][1] < intervals[i][0]
    ]
    return f"{sum(scores_K[low] < scores_K[high] for low, high in pairs)} of {len(pairs)}"


def _name(adapter: Path | None, subjects: Sequence[Subject], seeds: Sequence[int]) -> str:
    """Returns the name of what is kept, by all that it is made from."""
    content = adapter.read_bytes().hex() if adapter else ""
    return hash_json([content, [subject.caption() for subject in subjects], list(seeds)])[:16]


def _run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "sd3pipe", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
