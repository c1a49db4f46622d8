"""What compact text rows do to the rows and to a LoRA: T5's states as int8, or padded to fewer tokens.

    python benchmarks/compact_text.py [--steps 100] [--folder DIR]
    python benchmarks/compact_text.py --formats

Encodes the demo's captions by each recipe, from bfloat16 as the default makes them, and trains the same LoRA on each:
the same pictures, order, noise and start. Printed per recipe: bytes of a row here and of one of the published encoders
(256 T5 tokens, or 77), the error of T5's states against the default's rows at positions that both have, the loss over
the last half of the steps, and the cosine between the trained change of the weights and that of the default. The
float32 line shows how far the rounding to bfloat16 alone moves these figures.

--formats compares ways of keeping states in eight bits: by rows of normal numbers as wide as T5-XXL's, as they are and
with two channels made 50 times larger; the last column is the error of the other channels then.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd3pipe.adapters.files import read_adapter
from sd3pipe.cache.reader import CacheReader
from sd3pipe.cache.tensors import row_to_torch
from sd3pipe.models.text_encoder_files import TextSizes

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "sd3pipe" / "demo" / "base"
MODEL = BASE / "demo-base.safetensors"
LONG, SHORT = 32, 10  # T5 tokens of the demo's rows: in the ratio of 256 to 77; its captions have fewer than ten
DEFAULT = "bfloat16"
RECIPES = {
    "float32": ["--text-dtype", "float32"],
    DEFAULT: [],
    "int8 rows": ["--t5xxl-row-dtype", "int8"],
    "padded to 77": ["--t5-pad-to", str(SHORT)],
    "int8 rows, padded to 77": ["--t5xxl-row-dtype", "int8", "--t5-pad-to", str(SHORT)],
}
SIZES = {
    "float32": TextSizes().row_bytes(256, "float32"),
    DEFAULT: TextSizes().row_bytes(256, "bfloat16"),
    "int8 rows": TextSizes().row_bytes(256, "bfloat16", packed="int8"),
    "padded to 77": TextSizes().row_bytes(77, "bfloat16"),
    "int8 rows, padded to 77": TextSizes().row_bytes(77, "bfloat16", packed="int8"),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    row_bytes: int
    states: dict[str, Tensor]  # T5's, by caption hash
    loss: float
    change: Tensor  # of all weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", action="store_true", help="compare ways of keeping states in eight bits")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="keeps caches and runs; default: a temporary folder")
    options = parser.parse_args()
    if options.formats:
        print(*formats(), sep="\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        for line in report(options.folder or Path(temporary), options.steps):
            print(line, flush=True)


def formats() -> Iterator[str]:
    """Yields a line for each way of keeping states in eight bits."""
    plain = torch.randn(200, 4096, generator=torch.Generator().manual_seed(1))
    large, others = plain.clone(), torch.ones(4096, dtype=torch.bool)
    large[:, [7, 1007]] *= 50
    others[[7, 1007]] = False
    ways: dict[str, Callable[[Tensor], Tensor]] = {"fp8, a scale for each token": as_fp8}
    for group in (4096, 256, 128, 64, 32):
        ways[f"int8, a scale for each {group}"] = functools.partial(as_int8, group=group)
    for name, way in ways.items():
        errors = distance(way(plain), plain), distance(way(large), large), distance(way(large), large, others)
        yield f"{name:<28}" + "".join(f"{error:9.2%}" for error in errors)


def as_fp8(states_LD: Tensor) -> Tensor:
    scales_L1 = states_LD.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    return (states_LD / scales_L1).to(torch.float8_e4m3fn).float() * scales_L1


def as_int8(states_LD: Tensor, *, group: int) -> Tensor:
    states_LSG = states_LD.unflatten(-1, (-1, group))
    scales_LS1 = states_LSG.abs().amax(-1, keepdim=True) / 127
    return ((states_LSG / scales_LS1).round() * scales_LS1).flatten(-2)


def distance(states_LD: Tensor, exact_LD: Tensor, channels_D: Tensor | None = None) -> float:
    """Returns the norm of the difference over the norm, of some channels."""
    channels_D = torch.ones(exact_LD.shape[-1], dtype=torch.bool) if channels_D is None else channels_D
    return float((states_LD - exact_LD)[:, channels_D].norm() / exact_LD[:, channels_D].norm())


def report(folder: Path, steps: int) -> Iterator[str]:
    sd3pipe("encode-latents", *_inputs(), "--out", folder / "latents")
    results = {name: result_of(name, folder, steps) for name in (DEFAULT, *RECIPES)}
    default = results[DEFAULT]
    yield f"{'rows':<24} {'here':>8} {'published':>10} {'error':>7} {'loss':>7} {'cosine':>7}"
    for name in RECIPES:
        result = results[name]
        cosine = torch.nn.functional.cosine_similarity(result.change, default.change, dim=0)
        yield (
            f"{name:<24} {result.row_bytes / 1e3:5.1f} KB {SIZES[name] / 1e6:7.2f} MB "
            f"{error(result, default):7.2%} {result.loss:7.4f} {float(cosine):7.4f}"
        )


def result_of(name: str, folder: Path, steps: int) -> Result:
    place = folder / name.replace(" ", "-").replace(",", "")
    length = ("--t5xxl-max-token-length", LONG)
    sd3pipe("encode-text", *_inputs(), "--tokenizers", BASE / "tokenizers", *length, *RECIPES[name], "--out", place)
    run = ("--out", f"{place}-run", "--resume", "never", "--max-train-steps", steps, "--network-dim", 8)
    inputs = ("--model", MODEL, "--text", place, "--latents", folder / "latents")
    sd3pipe("train", *inputs, *run, "--learning-rate", 1e-3, "--seed", 1)
    lines = Path(f"{place}-run/metrics.jsonl").read_text().splitlines()
    losses = [loss for line in lines if (loss := json.loads(line).get("loss")) is not None]
    reader = CacheReader(place)
    samples = reader.samples.to_columns(reader.keys)
    rows = dict(zip(samples["caption_hash"], samples["key"], strict=True))
    deltas = read_adapter(Path(f"{place}-run/final/adapter.safetensors")).model_part
    return Result(
        row_bytes=int(reader.index.arrays["row_bytes"].mean()),
        states={digest: row_to_torch(reader.row(key))["t5xxl"].float() for digest, key in rows.items()},
        loss=statistics.mean(losses[len(losses) // 2 :]),
        change=torch.cat([deltas[path].dense().flatten() for path in sorted(deltas)]).double(),
    )


def error(result: Result, default: Result) -> float:
    """Returns the norm of the difference over the norm, of the states at positions that both have."""
    pairs = [(result.states[digest], states) for digest, states in default.states.items()]
    cut = [(mine[: len(others)], others[: len(mine)]) for mine, others in pairs]
    return distance(*(torch.cat(parts) for parts in zip(*cut, strict=True)))


def _inputs() -> tuple[object, ...]:
    return ("--model", MODEL, "--dataset", ROOT / "examples" / "demo" / "dataset.toml")


def sd3pipe(*arguments: object) -> None:
    command = [sys.executable, "-m", "sd3pipe", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
