"""What streaming the base costs on a GPU, beside a resident base.

    python benchmarks/gpu_streaming.py                      both models, within ten minutes on a data-centre card
    python benchmarks/gpu_streaming.py --models sd35-medium --pixels 512 --formats dense
    python benchmarks/gpu_streaming.py --device cpu --tiny  a minute without a card: only shows that the script runs

SD3.5-medium and SD3.5-large at their real sizes with random weights; a rank-16 LoRA on every layer of the blocks; T =
333 text tokens; forward and backward. For none, half and all of the blocks, as bf16, fp8 and nf4: seconds per step,
peak device memory, bytes copied, the share of copy time that is hidden, TFLOP/s reached, and the ratio to the computed
floor: max(compute, copy) of both passes, computing at the rate of the step whose blocks are all resident; and the
roofline: the same at the rate of one large matrix product. --kept says what blocks keep for the backward pass, --matmul
in which 8-bit format products are taken. --peer CHECKOUT measures, beside ours, a peer's own offloading classes with
the same blocks, unchanged, from a checkout of sd-scripts or musubi-tuner (its exchange, and its one-way form); peers
are not compiled, since they hook each block. --case measures the one case that it describes, for benchmarks/card.py.
Configurations that do not fit, lack a library or come after --minutes are listed as such. Prints each line as it is
measured, and writes all as JSON to benchmarks/results/. Needs torch, and bitsandbytes for nf4.
"""

import argparse
import functools
import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from peers import PeerError, PeerRunner, offloading_classes
from torch import nn

from sd3pipe.adapters.dropout import BatchState
from sd3pipe.adapters.kind import LayerSetup
from sd3pipe.adapters.lora import LoRA
from sd3pipe.adapters.targets import DropoutRates
from sd3pipe.device_memory import peak_device_bytes
from sd3pipe.errors import ParameterError
from sd3pipe.memory.eight_bit import block_packing
from sd3pipe.memory.plan import Rates, Settings, Workload, predict
from sd3pipe.memory.quantise import quantise_as
from sd3pipe.memory.sizes import ModelSize, image_tokens, model_size
from sd3pipe.memory.streaming import BlockStreamer
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.training.compiling import compile_blocks
from sd3pipe.training.rates import COPY_BYTES, copy_seconds, measure_rates
from sd3pipe.words import BaseFormat, KeptActivations, MatmulFormat

ARCHITECTURES = {
    "sd35-medium": MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=tuple(range(13))),
    "sd35-large": MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True),
}
TINY = {
    "sd35-medium": MMDiTArchitecture(depth=5, pos_embed_max=8, qk_norm=True, dual_attention_blocks=(0, 1, 2)),
    "sd35-large": MMDiTArchitecture(depth=5, pos_embed_max=8, qk_norm=True),
}
TEXT_TOKENS, TINY_TEXT_TOKENS = 333, 8
DTYPE = torch.bfloat16
WARM_UPS, STEPS = 2, 3  # one step where they are slow
SLOW_SECONDS = 4.0
ADAPTER_BYTES = 8  # of a weight: itself and its gradient


@dataclass(frozen=True, kw_only=True)
class Case:
    model: str
    base_format: BaseFormat
    blocks_to_swap: int
    compiled: bool = False
    kept: KeptActivations = "none"
    matmul_dtype: MatmulFormat | None = None
    peer: str | None = None  # checkout:class
    pixels: int = 0
    batch: int = 0
    text_tokens: int = TEXT_TOKENS


class Clock:
    """The time that is left for measuring."""

    def __init__(self, minutes: float) -> None:
        self._deadline = time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._deadline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=["sd35-large", "sd35-medium"])
    parser.add_argument(
        "--formats", nargs="+", choices=("dense", "fp8", "int8", "nf4"), default=["dense", "fp8", "nf4"]
    )
    parser.add_argument("--pixels", nargs="+", type=int, default=[1024, 512])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--compile", action="store_true", help="let torch compile the blocks")
    parser.add_argument("--kept", choices=get_args(KeptActivations), default="none")
    parser.add_argument("--matmul", choices=get_args(MatmulFormat), help="take the products of dense bases in 8 bits")
    parser.add_argument("--peer", type=Path, help="a checkout of sd-scripts or musubi-tuner")
    parser.add_argument("--case", type=json.loads, help="the fields of one case, as JSON")
    parser.add_argument("--minutes", type=float, default=9.0, help="measure nothing more after this time")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="models of five blocks, pictures of 64 pixels, 8 text tokens"
    )
    arguments = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("gpu_streaming.py needs a CUDA device, and there is none")
    device, clock = torch.device(arguments.device), Clock(arguments.minutes)
    if arguments.tiny:
        ARCHITECTURES.update(TINY)
        arguments.pixels = [64]
    if arguments.case is not None:
        case = Case(**arguments.case)
        (line,) = _measure(case, [case.pixels], [case.batch], device, clock, {})
        print(json.dumps(line))
        return
    lines: list[dict] = []
    for name in arguments.models:
        rates: dict[Case, Rates] = {}
        for build in _builds(name, arguments.formats, arguments.peer):
            if build.peer is None:
                build = replace(build, compiled=arguments.compile, kept=arguments.kept)
                build = replace(build, matmul_dtype=arguments.matmul if build.base_format == "dense" else None)
            build = replace(build, text_tokens=TINY_TEXT_TOKENS) if arguments.tiny else build
            lines += _measure(build, arguments.pixels, arguments.batches, device, clock, rates)
    _write(arguments.results, lines, device, compiled=arguments.compile)


def _builds(name: str, formats: list[BaseFormat], peer: Path | None) -> list[Case]:
    """Returns what to build: of each format the resident model first, which gives the rate of computing; then peers."""
    depth = ARCHITECTURES[name].depth
    ours = [
        Case(model=name, base_format=base_format, blocks_to_swap=count)
        for base_format in formats
        for count in (0, depth, depth // 2)
    ]
    classes = [] if peer is None else offloading_classes(peer)
    theirs = [
        Case(model=name, base_format="dense", blocks_to_swap=count, peer=f"{peer}:{class_name}")
        for class_name in classes
        for count in (depth // 2, depth - 2)  # an exchange needs two blocks that stay
    ]
    return ours + theirs


def _measure(
    build: Case,
    pixels: list[int],
    batches: list[int],
    device: torch.device,
    clock: Clock,
    rates: dict[Case, Rates],
) -> list[dict]:
    cases = [replace(build, pixels=side, batch=batch) for side in pixels for batch in batches]
    if clock.is_over:
        return [_told(case, {"left_out": "no time was left"}) for case in cases]
    try:
        mmdit, runner = _built(build, device)
    except torch.OutOfMemoryError:
        return [_told(case, {"left_out": "does not fit"}) for case in cases]
    except (ParameterError, PeerError) as error:  # bitsandbytes is missing; the peer is another version
        return [_told(case, {"left_out": str(error)}) for case in cases]
    adapters = _attached(mmdit, device)
    lines = []
    for case in cases:
        out = "no time was left" if clock.is_over else ""
        lines.append(_told(case, {"left_out": out} if out else _measured(case, mmdit, runner, adapters, device, rates)))
    runner.close()
    del mmdit, runner, adapters
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return lines


def _told(case: Case, figures: dict) -> dict:
    line = asdict(case) | figures
    print(_as_text(line), flush=True)
    return line


def _attached(mmdit: MMDiT, device: torch.device) -> nn.ModuleList:
    """Returns a rank-16 LoRA on every linear layer of the blocks."""
    layers = nn.ModuleList()
    generator = torch.Generator().manual_seed(1)
    for path, linear in mmdit.linears():
        if not path.startswith("joint_blocks."):
            continue
        setup = LayerSetup(
            in_features=linear.in_features,
            out_features=linear.out_features,
            rank=16,
            alpha=16.0,
            dropout=DropoutRates(),
            batch=BatchState(),
            stream=len(layers),
            device=device,
        )
        linear.adapter = layer = LoRA(setup)
        layer.reset(generator)
        layers.append(layer)
    return layers


def _built(case: Case, device: torch.device) -> tuple[MMDiT, "BlockStreamer | PeerRunner"]:
    """Returns a model with random weights, built block by block, and what runs its blocks."""
    architecture = ARCHITECTURES[case.model]
    mmdit = MMDiT(architecture, device="meta", dtype=DTYPE).eval()
    mmdit.keep_activations([case.kept] * architecture.depth)
    packing = block_packing(_settings(case), device)
    for name, child in mmdit.named_children():
        if name != "joint_blocks":
            _randomise(child, device)
    mmdit.pos_embed = torch.zeros(mmdit.pos_embed.shape, dtype=DTYPE)

    def fill(index: int) -> None:
        block = mmdit.joint_blocks[index]
        _randomise(block, device)
        if packing is not None:
            quantise_as(block, packing)

    if case.compiled:
        compile_blocks(mmdit)
    if case.peer is not None:
        for index in range(architecture.depth):
            fill(index)
        checkout, _, class_name = case.peer.rpartition(":")
        return mmdit, PeerRunner(mmdit, Path(checkout), class_name, blocks_to_swap=case.blocks_to_swap, device=device)
    return mmdit, BlockStreamer(mmdit, blocks_to_swap=case.blocks_to_swap, device=device, fill=fill)


def _randomise(module: nn.Module, device: torch.device) -> None:
    module.to_empty(device=device)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def _measured(
    case: Case,
    mmdit: MMDiT,
    runner: "BlockStreamer | PeerRunner",
    adapters: nn.Module,
    device: torch.device,
    rates: dict[Case, Rates],
) -> dict:
    tokens = image_tokens(case.pixels, case.pixels)
    inputs = {
        "latents_BChw": torch.randn(case.batch, 16, case.pixels // 8, case.pixels // 8, device=device),
        "timesteps_B": torch.full((case.batch,), 500.0, device=device),
        "context_BLD": torch.randn(case.batch, case.text_tokens, 4096, device=device),
        "pooled_BP": torch.randn(case.batch, 2048, device=device),
    }

    def step() -> None:
        mmdit(**inputs).float().square().mean().backward()  # without autocast, as train does it
        adapters.zero_grad(set_to_none=True)

    work = Workload(
        image_tokens=tokens,
        text_tokens=case.text_tokens,
        batch=case.batch,
        adapter_weights=sum(parameter.numel() for parameter in adapters.parameters()),
        adapter_bytes_per_weight=ADAPTER_BYTES,
    )
    try:
        warmed = min(_timed(step, 1, device) for _ in range(WARM_UPS))
        steps = 1 if warmed > SLOW_SECONDS else STEPS
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = runner.copied_bytes
        seconds = _timed(step, steps, device) / steps
    except torch.OutOfMemoryError:
        adapters.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return {"left_out": "does not fit"}
    copied = (runner.copied_bytes - before) // steps
    peak = peak_device_bytes(device)
    size = model_size(ARCHITECTURES[case.model].shapes())
    tokens = (work.batch, work.image_tokens, work.text_tokens)
    operations = size.forward_flop(*tokens) + size.backward_flop(*tokens, kept=[case.kept] * size.depth)
    kind = replace(case, blocks_to_swap=0)
    if case == kind:
        rates[kind] = Rates(flop_per_second=operations / seconds, copy_bytes_per_second=_copy_rate(device))
    if kind not in rates:  # the resident model does not fit: one block's forward pass tells the rate
        rates[kind] = measure_rates(ARCHITECTURES[case.model], work, device=device, dtype=DTYPE)
    return _figures(
        case,
        size,
        work,
        rates[kind],
        operations=operations,
        seconds=seconds,
        copied=copied,
        peak=peak,
        matmul_rate=_matmul_rate(device),
    )


def synchronize(device: torch.device) -> None:
    """Waits for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _timed(step: Callable[[], None], count: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return time.perf_counter() - start


def _figures(
    case: Case,
    size: ModelSize,
    work: Workload,
    rates: Rates,
    *,
    operations: float,
    seconds: float,
    copied: int,
    peak: int,
    matmul_rate: float,
) -> dict:
    prediction = predict(size, work, _settings(case), rates)
    roofline = predict(size, work, _settings(case), replace(rates, flop_per_second=matmul_rate)).seconds or 0.0
    compute, floor = prediction.compute_seconds or 0.0, prediction.seconds or 0.0
    copy_seconds = copied / rates.copy_bytes_per_second
    return {
        "seconds_per_step": seconds,
        "peak_device_bytes": peak,
        "predicted_device_bytes": prediction.tensor_bytes,
        "copied_bytes": copied,
        "copy_gb_per_second": rates.copy_bytes_per_second / 1e9,
        "resident_tflop_per_second": rates.flop_per_second / 1e12,
        "matmul_tflop_per_second": matmul_rate / 1e12,
        "reached_tflop_per_second": operations / seconds / 1e12,
        "copy_seconds": copy_seconds,
        "hidden_share": None if not copied else min(1.0, max(0.0, 1 - (seconds - compute) / copy_seconds)),
        "floor_seconds": floor,
        "over_floor": seconds / floor,
        "roofline_seconds": roofline,
        "over_roofline": seconds / roofline,
    }


@functools.cache
def _copy_rate(device: torch.device) -> float:
    """Returns the bytes per second from page-locked memory."""
    return COPY_BYTES / copy_seconds(device)


@functools.cache
def _matmul_rate(device: torch.device) -> float:
    """Returns the operations per second of one large matrix product."""
    side = 8192 if device.type == "cuda" else 512
    a = torch.randn(side, side, device=device, dtype=DTYPE)

    def product() -> None:
        torch.mm(a, a)

    product()
    return 2 * side**3 * STEPS / _timed(product, STEPS, device)


def _settings(case: Case) -> Settings:
    depth = ARCHITECTURES[case.model].depth
    return Settings(
        blocks_to_swap=case.blocks_to_swap,
        base_format=case.matmul_dtype or case.base_format,
        matmul_dtype=case.matmul_dtype,
        all_kept_blocks=depth if case.kept == "all" else 0,
        attention_kept_blocks=depth if case.kept == "attention" else 0,
    )


def _as_text(line: dict) -> str:
    way = line["peer"].rpartition(":")[2] if line["peer"] else "compiled" if line["compiled"] else "eager"
    base = f"{line['matmul_dtype']} products" if line["matmul_dtype"] else line["base_format"]
    name = f"{line['model']} {base:<5} {way:<8} kept={line['kept']:<9} N={line['blocks_to_swap']:<2} "
    name += f"{line['pixels']:>4} px B={line['batch']}"
    if "left_out" in line:
        return f"{name}  {line['left_out']}"
    hidden = "-" if line["hidden_share"] is None else f"{line['hidden_share']:.0%}"
    return (
        f"{name}  {line['seconds_per_step']:7.3f} s  {line['peak_device_bytes'] / 1e9:6.2f} GB  "
        f"copied {line['copied_bytes'] / 1e9:6.2f} GB  hidden {hidden:>4}  "
        f"at {line['copy_gb_per_second']:5.1f} GB/s  {line['reached_tflop_per_second']:6.1f} of "
        f"{line['matmul_tflop_per_second']:.0f} TFLOP/s  {line['over_floor']:5.2f} x floor"
    )


def _write(folder: Path, lines: list[dict], device: torch.device, *, compiled: bool) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "lines": lines,
    }
    words = ["gpu-streaming", name.replace(" ", "-").lower(), *(["compiled"] if compiled else [])]
    file = folder / f"{result['date']}-{'-'.join(words)}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
