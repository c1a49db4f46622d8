"""What streaming the base costs on a GPU, beside a resident base and beside swapping in both directions.

    python benchmarks/gpu_streaming.py                      both models, about ten minutes on a data-centre card
    python benchmarks/gpu_streaming.py --models sd35-medium --pixels 512 --formats dense

SD3.5-medium and SD3.5-large at their real sizes with random weights; a rank-16 LoRA on every layer of the blocks; T =
333 text tokens; forward and backward. For none, half and all of the blocks, as bf16, fp8 and nf4: seconds per step,
peak device memory, bytes copied, the share of copy time that is hidden, TFLOP/s reached, and the ratio to the computed
floor max(compute, copy) of both passes. The peer swaps as sd-scripts does: in both directions through pageable memory,
synchronously. Configurations that do not fit are listed as such. Writes JSON to benchmarks/results/.
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.memory.plan import Rates, Settings, Workload, predict
from sd3pipe.memory.quantise import quantise
from sd3pipe.memory.sizes import ModelSize, image_tokens, model_size
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.training.memory_plan import measure_rates

ARCHITECTURES = {
    "sd35-medium": MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=tuple(range(13))),
    "sd35-large": MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True),
}
TEXT_TOKENS = 333
DTYPE = torch.bfloat16
STEPS = 3  # timed, after two that are not


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    base_format: str
    blocks_to_swap: int
    way: str  # one-way, two-way
    pixels: int = 0
    batch: int = 0


class TwoWaySwap:
    """Swaps blocks as sd-scripts does: before a block runs, a finished one goes to the host, and it comes, in series.

    As many blocks as fit stay; with N swapped, the first `depth - N` are there at the start of a forward pass and the
    last ones at its end. Only linear weights move, through pageable memory, with a sync on either side.
    """

    def __init__(self, mmdit: MMDiT, blocks_to_swap: int, device: torch.device) -> None:
        self.mmdit, self.device = mmdit, device
        self.room = len(mmdit.joint_blocks) - blocks_to_swap
        self.present = list(range(self.room))
        self.copied_bytes = 0
        for name, parameter in mmdit.named_parameters():
            block = int(name.split(".")[1]) if name.startswith("joint_blocks.") else -1
            if block < self.room or not name.endswith(".weight") or parameter.ndim < 2:
                parameter.data = parameter.data.to(device)
        mmdit.block_runner = self

    def __call__(self, index: int, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> tuple[Tensor, Tensor]:
        self._bring(index)
        result = self.mmdit.run_block(index, context_BLD, x_BLD, condition_BD)
        if result[1].requires_grad:
            result[1].register_hook(lambda gradient: self._bring(index, gradient))
        return result

    def _bring(self, index: int, gradient: Tensor | None = None) -> Tensor | None:
        if index not in self.present:
            victim = max(self.present, key=lambda other: abs(other - index))
            self._move(victim, torch.device("cpu"))
            self._move(index, self.device)
            self.present[self.present.index(victim)] = index
        return gradient

    def _move(self, index: int, device: torch.device) -> None:
        torch.cuda.synchronize()
        for parameter in self.mmdit.joint_blocks[index].parameters():
            if parameter.ndim == 2:
                parameter.data = parameter.data.to(device)
                self.copied_bytes += parameter.numel() * parameter.element_size()
        torch.cuda.synchronize()

    def close(self) -> None:
        self.mmdit.block_runner = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument(
        "--formats", nargs="+", choices=("dense", "fp8", "int8", "nf4"), default=["dense", "fp8", "nf4"]
    )
    parser.add_argument("--pixels", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--minutes", type=float, default=9.0, help="start no further model after this time")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_streaming.py needs a CUDA device, and there is none")
    deadline = time.monotonic() + 60 * arguments.minutes
    lines: list[dict] = []
    for name in arguments.models:
        for case in _builds(name, arguments.formats):
            if time.monotonic() > deadline:
                lines.append(asdict(case) | {"left_out": "no time was left"})
                continue
            lines += _measure(case, arguments.pixels, arguments.batches)
    _write(arguments.results, lines)


def _builds(name: str, formats: list[str]) -> list[Case]:
    depth = ARCHITECTURES[name].depth
    cases = [
        Case(model=name, base_format=base_format, blocks_to_swap=count, way="one-way")
        for base_format in formats
        for count in (0, depth // 2, depth)
    ]
    peers = [Case(model=name, base_format="dense", blocks_to_swap=n, way="two-way") for n in (depth // 2, depth - 2)]
    return cases + (peers if "dense" in formats else [])


def _measure(build: Case, pixels: list[int], batches: list[int]) -> list[dict]:
    device = torch.device("cuda")
    size = model_size(ARCHITECTURES[build.model].shapes())
    lines = []
    try:
        mmdit, runner = _built(build, device)
    except torch.OutOfMemoryError:
        return [asdict(build) | {"left_out": "does not fit"}]
    network = attach(mmdit, AdapterSpec(rank=16), device=device)
    for side in pixels:
        for batch in batches:
            case = replace(build, pixels=side, batch=batch)
            lines.append(asdict(case) | _measured(case, mmdit, runner, network, size, device))
            print(_as_text(lines[-1]), flush=True)
    runner.close()
    del mmdit, runner, network
    gc.collect()
    torch.cuda.empty_cache()
    return lines


def _built(case: Case, device: torch.device) -> tuple[MMDiT, BlockStreamer | TwoWaySwap]:
    """Returns a model with random weights, built block by block, and what runs its blocks."""
    architecture = ARCHITECTURES[case.model]
    mmdit = MMDiT(architecture, device="meta", dtype=DTYPE).eval()
    mmdit.gradient_checkpointing = True
    for name, child in mmdit.named_children():
        if name != "joint_blocks":
            _randomise(child, device)
    mmdit.pos_embed = torch.zeros(mmdit.pos_embed.shape, dtype=DTYPE)

    def fill(index: int) -> None:
        block = mmdit.joint_blocks[index]
        _randomise(block, device)
        if case.base_format != "dense":
            quantise(block, case.base_format)  # pyright: ignore[reportArgumentType]

    if case.way == "one-way":
        return mmdit, BlockStreamer(mmdit, blocks_to_swap=case.blocks_to_swap, device=device, fill=fill)
    for index in range(architecture.depth):
        fill(index)
        mmdit.joint_blocks[index].to("cpu")
    return mmdit, TwoWaySwap(mmdit, case.blocks_to_swap, device)


def _randomise(module: nn.Module, device: torch.device) -> None:
    module.to_empty(device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def _measured(
    case: Case,
    mmdit: MMDiT,
    runner: BlockStreamer | TwoWaySwap,
    network: nn.Module,
    size: ModelSize,
    device: torch.device,
) -> dict:
    tokens = image_tokens(case.pixels, case.pixels)
    inputs = {
        "latents_BChw": torch.randn(case.batch, 16, case.pixels // 8, case.pixels // 8, device=device),
        "timesteps_B": torch.full((case.batch,), 500.0, device=device),
        "context_BLD": torch.randn(case.batch, TEXT_TOKENS, 4096, device=device),
        "pooled_BP": torch.randn(case.batch, 2048, device=device),
    }

    def step() -> None:
        with torch.autocast("cuda", dtype=DTYPE):
            loss = mmdit(**inputs).float().square().mean()
        loss.backward()
        network.zero_grad(set_to_none=True)

    try:
        for _ in range(2):
            step()
        torch.cuda.reset_peak_memory_stats()
        before = runner.copied_bytes
        seconds = _timed(step) / STEPS
    except torch.OutOfMemoryError:
        network.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {"left_out": "does not fit"}
    copied = (runner.copied_bytes - before) // STEPS
    peak = torch.cuda.max_memory_allocated()
    work = Workload(image_tokens=tokens, text_tokens=TEXT_TOKENS, batch=case.batch)
    rates = measure_rates(ARCHITECTURES[case.model], work, device=device, dtype=DTYPE)
    return _figures(case, size, work, rates, seconds=seconds, copied=copied, peak=peak)


def _timed(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _figures(
    case: Case, size: ModelSize, work: Workload, rates: Rates, *, seconds: float, copied: int, peak: int
) -> dict:
    settings = Settings(blocks_to_swap=case.blocks_to_swap, base_format=case.base_format)  # pyright: ignore[reportArgumentType]
    prediction = predict(size, work, settings, rates)
    compute, floor = prediction.compute_seconds or 0.0, prediction.seconds or 0.0
    copy_seconds = copied / rates.copy_bytes_per_second
    tokens = (work.batch, work.image_tokens, work.text_tokens)
    operations = size.forward_flop(*tokens) + size.backward_flop(*tokens, recompute=True)
    return {
        "seconds_per_step": seconds,
        "peak_device_bytes": peak,
        "predicted_device_bytes": prediction.device_bytes,
        "copied_bytes": copied,
        "copy_gb_per_second": rates.copy_bytes_per_second / 1e9,
        "block_tflop_per_second": rates.flop_per_second / 1e12,
        "matmul_tflop_per_second": _matmul_rate() / 1e12,
        "reached_tflop_per_second": operations / seconds / 1e12,
        "copy_seconds": copy_seconds,
        "hidden_share": None if not copied else min(1.0, max(0.0, 1 - (seconds - compute) / copy_seconds)),
        "floor_seconds": floor,
        "over_floor": seconds / floor,
    }


def _matmul_rate(side: int = 8192) -> float:
    """Returns the operations per second of one large matrix product."""
    a = torch.randn(side, side, device="cuda", dtype=DTYPE)

    def product() -> None:
        a @ a

    product()
    return 2 * side**3 * STEPS / _timed(product)


def _as_text(line: dict) -> str:
    name = f"{line['model']} {line['base_format']:<5} {line['way']} N={line['blocks_to_swap']:<2} "
    name += f"{line['pixels']:>4} px B={line['batch']}"
    if "left_out" in line:
        return f"{name}  {line['left_out']}"
    hidden = "-" if line["hidden_share"] is None else f"{line['hidden_share']:.0%}"
    return (
        f"{name}  {line['seconds_per_step']:7.3f} s  {line['peak_device_bytes'] / 1e9:6.2f} GB  "
        f"copied {line['copied_bytes'] / 1e9:6.2f} GB  hidden {hidden:>4}  "
        f"{line['reached_tflop_per_second']:6.1f} TFLOP/s  {line['over_floor']:5.2f} x floor"
    )


def _write(folder: Path, lines: list[dict]) -> None:
    device = torch.cuda.get_device_name()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "lines": lines,
    }
    file = folder / f"{result['date']}-gpu-streaming-{device.replace(' ', '-').lower()}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
