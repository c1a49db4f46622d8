"""Whether `judge` is right on the demo, whose truth a hand-written measure knows.

    python benchmarks/judging.py [--folder DIR] [--draws 400] [--only order null]

order   A run of nine checkpoints. Each draws the new shape --draws times and old shapes a quarter as often, and the
        measure counts what is right. Then sixteen other prompts, two seeds each, are judged: of the pairs whose
        measured intervals are disjoint, likeness should order 95 % right; the suggested checkpoint should not be
        measurably worse than the best one (one-sided, paired); drift should order what was lost of old shapes.
null    One adapter that poses as nine, each with seeds of its own from one pool: among 200 trials a difference is
        claimed in at most 20.

What was drawn and counted is kept in --folder, so that a second call goes on; DIR/demo may be a finished demo.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
from sd3pipe.judgement import Suggestion
from sd3pipe.judging.bootstrap import Resampled, differences, resample
from sd3pipe.judging.judge_model import JudgeModel
from sd3pipe.judging.references import mean_latents, read_references
from sd3pipe.judging.scores import Embedded, Measured, alikeness, losses, measure
from sd3pipe.judging.suggestion import Candidate, suggest
from sd3pipe.judging.trigger import without
from sd3pipe.models.checkpoint import load_vae

# C columns, P prompts, S seeds, D embedding width, N draws

POSERS, TRIALS, SEEDS_EACH = 9, 200, 4
SEEDS, TOLERANCE = 2, 0.5
PROMPTS = 8  # with the new shape, and as many of old ones
STEPS, EVERY = 450, 50  # half of the demo's: the new shape is learnt on the way
Booleans = NDArray[np.bool_]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--draws", type=int, default=400)
    parser.add_argument("--run", type=Path, help="a run on the demo's pictures instead of one of nine checkpoints")
    parser.add_argument("--only", nargs="+", choices=("order", "null"), default=("order", "null"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="judging-"))).resolve()
    adapters = list((checkpoint_adapters(options.run) if options.run else nine_checkpoints(folder)).items())
    if "order" in options.only:
        order(folder, adapters, options.draws)
    if "null" in options.only:
        null(folder, adapters[-1][1])


def nine_checkpoints(folder: Path) -> dict[int, Path]:
    """Returns the adapters of a run on the demo's pictures, by step."""
    demo = folder / "demo"
    if not (demo / "caches/latents").exists():
        _run("demo", demo)
    caches, run = demo / "caches", folder / "nine"
    _run(
        "train", "--model", MODEL, "--text", caches / "text", "--latents", caches / "latents", "--out", run,
        "--config", demo / "stages/train.toml", "--max-train-steps", STEPS, "--save-every-n-steps", EVERY,
        "--validate-every-n-steps", 0,
    )  # fmt: skip
    return {step: path for step, path in checkpoint_adapters(run).items() if step % EVERY == 0}


def order(folder: Path, adapters: Sequence[tuple[int, Path]], draws: int) -> None:
    """Compares what judge says of the checkpoints with what the measure counts."""
    counted = {step: counts(folder, path, draws) for step, path in adapters}
    _, old_base = counts(folder, None, draws)
    found, suggestion = judged(folder, adapters)
    assert found.likeness is not None and found.drift is not None
    likeness, drift = found.likeness, found.drift
    print("| step | new shape right | old shapes right | likeness | drift |\n|---|---|---|---|---|")
    print(f"| base | | {share(old_base)} | | |")
    for number, (step, (new, old)) in enumerate(counted.items()):
        shown = [
            f"{part.value:.3f} ({part.low:.3f} to {part.high:.3f})"
            for part in (likeness.score(number), drift.score(number))
        ]
        print(f"| {step} | {share(new)} | {share(old)} | {' | '.join(shown)} |", flush=True)
    news, olds = ([pair[which] for pair in counted.values()] for which in range(2))
    print(f"likeness orders {ordered(news, likeness.values_K)} pairs with disjoint measured intervals right")
    print(f"drift orders {ordered(olds, -drift.values_K)} such pairs of old shapes right")
    print(suggestion.text)
    if suggestion.checkpoint is not None:
        chosen = counted[int(suggestion.checkpoint)][0]
        best = max(news, key=lambda right: right.mean())
        worse = best.astype(float) - chosen.astype(float)
        error = worse.std(ddof=1) / np.sqrt(len(worse))
        verdict = "measurably worse" if worse.mean() > 1.645 * error else "not measurably worse"  # one-sided 95 %
        print(f"suggested {chosen.mean():.1%}, best {best.mean():.1%}: {verdict} ({worse.mean():+.1%} +- {error:.1%})")


def counts(folder: Path, adapter: Path | None, draws: int) -> tuple[Booleans, Booleans]:
    """Returns of which draws the measure reads the right shape: of the new shape, and of old ones."""
    name = hash_json([adapter.read_bytes().hex() if adapter else "", draws])[:16]
    file = folder / "counted" / f"{name}.npz"
    if not file.is_file():
        old = held_out_subjects()
        parts = {
            "new": _right(_repeated(unseen(), draws), adapter) if adapter else np.zeros(0, bool),
            "old": _right(_repeated(old, draws // 4), adapter),
        }
        file.parent.mkdir(exist_ok=True)
        np.savez(file, **parts)
    kept = np.load(file)
    return kept["new"], kept["old"]


def unseen() -> list[Subject]:
    """Returns what could be prompted of the new shape, and no picture or prompt of the demo shows."""
    return [subject for subject in all_subjects((NEW_WORD,)) if subject not in {*LEARNT, *HELD_OUT, *PROMPTED}]


def _right(subjects: Sequence[Subject], adapter: Path | None) -> Booleans:
    with tempfile.TemporaryDirectory() as place:
        prompts = encode_subjects(Path(place) / "a", subjects, 10_000)
    readings = read_latents(draw_latents(prompts, adapter))
    return np.array([reading.shape == subject.shape for reading, subject in zip(readings, subjects, strict=True)])


def judged(folder: Path, adapters: Sequence[tuple[int, Path]]) -> tuple[Measured, Suggestion]:
    """Returns judge's scores of the checkpoints, and the suggestion."""
    new = [subject for subject in PROMPTED if subject.shape == NEW_WORD]
    new += [subject for subject in all_subjects((NEW_WORD,)) if subject not in {*LEARNT, *HELD_OUT, *PROMPTED}][
        :: len(LEARNT)
    ]
    subjects = [*new[:PROMPTS], *held_out_subjects()[-PROMPTS:]]
    model = JudgeModel(JUDGE, torch.device("cpu"))
    columns = [embeddings(folder, model, subjects, SEEDS, path) for path in (None, *(path for _, path in adapters))]
    trained, held_out = reference_embeddings(folder, model)
    embedded = Embedded(
        drawn_CPSD=np.stack(columns),
        trained_ND=trained,
        held_out_MD=held_out,
        texts_PD=np.stack([model.text(without(subject.caption(), NEW_WORD)) for subject in subjects]).astype(
            np.float64
        ),
        with_trigger_P=np.array([subject.shape == NEW_WORD for subject in subjects]),
    )
    found = measure(embedded)
    candidates = [Candidate(checkpoint=step, multiplier=1.0) for step, _ in adapters]
    assert found.likeness is not None
    return found, suggest(candidates, found.likeness, losses(found, TOLERANCE))


def embeddings(
    folder: Path, model: JudgeModel, subjects: Sequence[Subject], seeds: int, adapter: Path | None
) -> NDArray[np.float64]:
    """Returns what the judge model sees of drawn pictures [P, S, D]; all columns are drawn on equal noise."""
    repeated = [subject for subject in subjects for _ in range(seeds)]
    name = hash_json([adapter.read_bytes().hex() if adapter else "", [subject.caption() for subject in repeated]])[:16]
    file = folder / "seen" / f"{name}.npy"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as place:
            prompts = encode_subjects(Path(place) / "a", repeated, 1)
        vae = load_vae(MODEL)
        pictures = [
            picture for part in draw_latents(prompts, adapter).split(16) for picture in decode_pictures(vae, part)
        ]
        seen = np.stack([model.picture(picture.numpy()) for picture in pictures])
        file.parent.mkdir(exist_ok=True)
        np.save(file, seen.reshape(len(subjects), seeds, -1))
    return np.load(file).astype(np.float64)


def reference_embeddings(folder: Path, model: JudgeModel) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns what it sees of the training pictures and of the held-out ones."""
    latents, vae = CacheReader(folder / "demo/caches/latents"), load_vae(MODEL)
    seen: dict[bool, list[NDArray[np.float32]]] = {False: [], True: []}
    for reference in read_references(latents):
        picture = decode_pictures(vae, mean_latents(latents, reference.row)[None])[0].numpy()
        seen[reference.held_out].append(model.picture(picture))
    trained, held_out = (np.array(seen[which], np.float64) for which in (False, True))
    return trained, held_out


def null(folder: Path, adapter: Path) -> None:
    """Claims a difference between posers that are one adapter, as seldom as it should."""
    model = JudgeModel(JUDGE, torch.device("cpu"))
    pool_PSD = embeddings(folder, model, unseen()[:: len(LEARNT)][:PROMPTS], POSERS * SEEDS_EACH, adapter)
    likeness_PS = alikeness(pool_PSD[None], reference_embeddings(folder, model)[0])[0]
    claims = 0
    for trial in range(TRIALS):
        seeds = np.random.default_rng(trial).permutation(POSERS * SEEDS_EACH).reshape(POSERS, SEEDS_EACH)
        posers: Resampled = resample(np.stack([likeness_PS[:, mine] for mine in seeds]))
        family = posers.combined(differences(POSERS, list(combinations(range(POSERS), 2)))).family()
        claims += any(
            not score.low <= 0 <= score.high for score in family if score.low is not None and score.high is not None
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


def ordered(right: Sequence[Booleans], scores_K: NDArray[np.float64]) -> str:
    """Returns how many of the pairs with disjoint intervals the scores order as the shares do."""
    intervals = [wilson(item) for item in right]
    pairs = [
        (i, j) if right[i].mean() < right[j].mean() else (j, i)
        for i, j in combinations(range(len(right)), 2)
        if intervals[i][1] < intervals[j][0] or intervals[j][1] < intervals[i][0]
    ]
    return f"{sum(scores_K[low] < scores_K[high] for low, high in pairs)} of {len(pairs)}"


def _repeated(subjects: Sequence[Subject], draws: int) -> list[Subject]:
    return [subjects[number % len(subjects)] for number in range(draws)]


def _run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "sd3pipe", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
