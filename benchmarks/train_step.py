"""What a training step costs beside its bare forward and backward pass, and beside the same step in diffusers + peft.

    python benchmarks/train_step.py [--depth 8] [--steps 12] [--threads 1] [--recompute]

Makes a random SD3.5-medium of the given depth (width 64 x depth) and caches of random rows in a temporary folder. One
process measures, in turns whose order rotates so that a busy machine hurts all alike, the median seconds of
  bare     forward and backward of our model with the adapter attached, on a batch that lies in memory; no optimizer
  step     what train does per step: rows read, noise drawn, forward, backward, clipping, AdamW, records
  peft     forward, backward, clipping and AdamW on diffusers' transformer with peft's LoRA on the same layers
and the share of each part of `step` that `bare` has not, measured by itself: it is small, and the difference of two
large numbers is not a good way to see it. With --recompute, all three compute each block anew in the backward pass.
Then a fresh process trains one step from cached inputs: seconds from its start to the first step's end, and peak RSS.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from peft import LoraConfig, get_peft_model
from support import tiny_mmdit, tiny_training
from support.diffusers_mmdit import diffusers_mmdit, their_names

from sd3pipe.device import choose_device
from sd3pipe.models.architecture import mmdit_architecture
from sd3pipe.models.sources import find_component
from sd3pipe.training.loop import Loop
from sd3pipe.training.memory_plan import run_memory
from sd3pipe.training.processes import join_processes
from sd3pipe.training.run import Run, resolve_inputs, run_identity
from sd3pipe.training.run_folder import RunFolder, Start
from sd3pipe.training.setup import build_loop
from sd3pipe.training.training_data import open_data

RANK = 16
TOKENS = 77
START = "import sys; from sd3pipe.commands.train import main; from sd3pipe.params.train import TrainParams; "
START += "main(TrainParams.model_validate_json(sys.argv[1]))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--side", type=int, default=32, help="latent pixels")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing in every block")
    options = parser.parse_args()
    choose_device("cpu", options.threads)
    with tempfile.TemporaryDirectory() as folder:
        tiny_mmdit.tiny_architecture.__defaults__ = (options.depth, options.side // 2)
        inputs = make_inputs(Path(folder), options)
        print(
            f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {options.threads} thread(s), torch {torch.__version__}"
        )
        print(f"SD3.5-medium of depth {options.depth}, {options.side} x {options.side} latents, rank {RANK}, fp32")
        compare(inputs, options)
        start_up(inputs)


def make_inputs(folder: Path, options: argparse.Namespace) -> tiny_training.Inputs:
    size = (options.side, options.side)
    dataset = tiny_training.pictures(8, size=size, tokens=TOKENS)
    return tiny_training.make_inputs(
        folder, dataset, depth=options.depth, network_dim=RANK, threads=options.threads,
        gradient_checkpointing=options.recompute,
        save_every_n_steps=None, max_train_steps=10_000, learning_rate=1e-4,
    )  # fmt: skip


def open_loop(inputs: tiny_training.Inputs) -> Loop:
    """Returns the loop that `train` would run."""
    params = inputs.params("benchmark")
    processes = join_processes("cpu", params.threads)
    data, source = open_data(params), find_component("mmdit", model=params.model)
    resolved = resolve_inputs(params, data, base=source.fingerprint(), precision="no", num_processes=1)
    memory = run_memory(
        params,
        mmdit_architecture(source),
        resolutions_px=data.resolutions,
        text_tokens=2 * TOKENS,
        device=processes.device,
        dtype=torch.float32,
    )
    run = Run(
        params=params,
        processes=processes,
        data=data,
        source=source,
        inputs=resolved,
        identity=run_identity(params, data, resolved),
        start=Start(checkpoint=None, changes={}),
        folder=RunFolder(params.out),
    )
    return build_loop(run, memory)


def compare(inputs: tiny_training.Inputs, options: argparse.Namespace) -> None:
    loop = open_loop(inputs)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    parts: dict[str, list[float]] = {}
    ways = {
        "bare": bare_step(loop),
        "step": whole_step(loop, parts, clock),
        "peft": peft_step(loop, recompute=options.recompute),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(options.steps + 2):
        for name in names[turn % 3 :] + names[: turn % 3]:
            start = clock()
            ways[name]()
            seconds[name].append(clock() - start)
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}  # the first turns warm up
    word = "CPU" if options.threads == 1 else "wall"
    for name, median in medians.items():
        ratio = statistics.median(own / bare for own, bare in zip(seconds[name][2:], seconds["bare"][2:], strict=True))
        print(f"{name:<5} {1000 * median:8.1f} ms {word}   {ratio:.3f} of bare (median over turns)")
    shares = {name: statistics.median(values[2:]) for name, values in parts.items()}
    for name, share in {**shares, "all of these": sum(shares.values())}.items():
        print(f"  {name:<15} {1000 * share:8.2f} ms {word}   {100 * share / medians['bare']:.2f} % of bare")


def bare_step(loop: Loop) -> Callable[[], None]:
    """Forward and backward of one batch that lies in memory."""
    objective = loop.runner.objective
    batch = next(loop.steps_from(loop.progressed.position)).batches[0]

    def step() -> None:
        forward_pass = objective.prepare(batch)
        velocity = objective.predict(forward_pass)
        objective.losses(forward_pass, velocity).mean().backward()
        for parameter in loop.runner.weights.parameters:
            parameter.grad = None

    return step


def whole_step(loop: Loop, parts: dict[str, list[float]], clock: Callable[[], float]) -> Callable[[], None]:
    """Everything between two turns of the loop; `parts` takes the seconds of what a bare step has not."""
    steps = loop.steps_from(loop.progressed.position)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **options: Any) -> Any:
            start = clock()
            result = function(*args, **options)
            parts.setdefault(name, []).append(clock() - start)
            return result

        return measured

    load, finish = timed("rows and noise", lambda: next(steps)), timed("records", loop._after_step)
    loop.runner.optimizer.step = timed("AdamW", loop.runner.optimizer.step)
    torch.nn.utils.get_total_norm = timed("gradient norm", torch.nn.utils.get_total_norm)
    torch.nn.utils.clip_grads_with_norm_ = timed("clipping", torch.nn.utils.clip_grads_with_norm_)

    class Silent:
        def advance(self, number: int = 1, **fields: object) -> None:
            pass

    def step() -> None:
        loaded = load()
        result = loop.runner.step(loop.progressed.step, loaded.batches, loss_mean=None, stop=False)
        finish(loaded, result, Silent(), 0.0)

    return step


def peft_step(loop: Loop, *, recompute: bool) -> Callable[[], None]:
    """The same step as one would write it with diffusers and peft."""
    paths = list(loop.runner.network.layers)
    targets = [name for path in paths for name in their_names(path)]
    oracle = diffusers_mmdit("sd35-medium", torch.float32)
    if recompute:
        oracle.enable_gradient_checkpointing()
        oracle.train()
    model = get_peft_model(oracle, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    batch = next(loop.steps_from(loop.progressed.position)).batches[0]

    def step() -> None:
        noise = torch.randn_like(batch.latents)
        sigmas = torch.sigmoid(torch.randn(len(batch)))[:, None, None, None]
        velocity = model(
            hidden_states=(1 - sigmas) * batch.latents + sigmas * noise,
            timestep=1000 * sigmas.flatten(),
            encoder_hidden_states=batch.context,
            pooled_projections=batch.pooled,
            return_dict=False,
        )[0]
        (velocity - (noise - batch.latents)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def start_up(inputs: tiny_training.Inputs) -> None:
    """Times a fresh process from its start to the end of its first step, with everything cached."""
    params = inputs.params("start", max_train_steps=1)
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(params.threads)}
    subprocess.run(
        [sys.executable, "-c", START, params.model_dump_json()], check=True, env=environment, capture_output=True
    )
    whole = time.perf_counter() - start
    report = json.loads((params.out / "report.json").read_text())
    weights = Path(params.model).stat().st_size
    torch_alone = peak_of("import torch")
    step = report["seconds_per_step"]
    print(f"process start to the end of a run of one step: {whole:.1f} s wall, of which the step {step:.2f} s")
    print(
        f"peak RSS {report['peak_rss_bytes'] / 1e6:.0f} MB; torch imported alone {torch_alone / 1e6:.0f} MB; "
        f"weights {weights / 1e6:.0f} MB"
    )


def peak_of(statement: str) -> int:
    code = f"{statement}; from sd3pipe.device_memory import peak_rss_bytes; print(peak_rss_bytes())"
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
