"""What a step of a few real blocks takes with each level of kept activations, on the CPU.

    python benchmarks/recompute_levels.py [--blocks 4] [--width 1536] [--pixels 256] [--rounds 3]

Forward and backward of joint blocks at SD3.5-medium's real width (--width 2432: large's) with random weights, float32,
a rank-16 LoRA on every layer, 154 text tokens. All recomputed, attention's output kept, half kept whole, all kept take
turns in each round, in one process, so that what else the machine does falls on all alike. Printed per level: the
median of the CPU seconds, which a busy machine does not stretch as it does the clock's, the peak of the process's
memory above what it held before the step, and the operations and kept bytes of the cost model. Linux only: the kernel
counts the peak anew for each step.
"""

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.memory.plan import Settings, Workload, predict
from sd3pipe.memory.sizes import image_tokens, model_size
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.joint_block import JointBlock
from sd3pipe.models.linear import Linear
from sd3pipe.variants import HEAD_WIDTH

TEXT_TOKENS, RANK = 154, 16


class Blocks(nn.Module):
    """The first blocks of a model, with what an adapter asks of one."""

    def __init__(self, architecture: MMDiTArchitecture, count: int) -> None:
        super().__init__()
        self.joint_blocks = nn.ModuleList(JointBlock(architecture, index, None, None) for index in range(count))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Linear))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    architecture = MMDiTArchitecture(depth=arguments.width // HEAD_WIDTH, pos_embed_max=16, qk_norm=True)
    count, tokens = arguments.blocks, image_tokens(arguments.pixels, arguments.pixels)
    blocks = Blocks(architecture, count)
    attach(blocks, AdapterSpec(rank=RANK))
    levels = {
        "recomputed": Settings(dtype_bytes=4),
        "attention kept": Settings(attention_kept_blocks=count, dtype_bytes=4),
        "half kept": Settings(all_kept_blocks=count // 2, dtype_bytes=4),
        "kept": Settings(all_kept_blocks=count, dtype_bytes=4),
    }
    measured: dict[str, list[tuple[float, int]]] = {name: [] for name in levels}
    for number in range(arguments.rounds + 1):
        for name, settings in levels.items():
            result = _step(blocks, settings, architecture.width, tokens)
            if number:  # the first round warms up
                measured[name].append(result)
    size = model_size(architecture.shapes())
    size = replace(size, blocks=size.blocks[:count])
    print(f"{'level':<16} {'CPU s':>8} {'peak':>9} {'predicted':>10} {'TFLOP':>7}")
    for name, settings in levels.items():
        seconds, peaks = zip(*measured[name], strict=True)
        prediction = predict(size, Workload(image_tokens=tokens, text_tokens=TEXT_TOKENS, adapter_rank=RANK), settings)
        kept = sum(
            prediction.device_parts[part] for part in ("block inputs", "kept activations", "one block computed again")
        )
        print(
            f"{name:<16} {statistics.median(seconds):8.2f} {statistics.median(peaks) / 1e6:6.0f} MB "
            f"{kept / 1e6:7.0f} MB {prediction.operations / 1e12:7.3f}"
        )


def _step(blocks: Blocks, settings: Settings, width: int, tokens: int) -> tuple[float, int]:
    """Returns the CPU seconds of one step, and the peak of memory above what the process held before."""
    kept = settings.kept(len(blocks.joint_blocks))
    context_BLD, x_BLD = torch.randn(1, TEXT_TOKENS, width), torch.randn(1, tokens, width)
    condition_BD = torch.randn(1, width)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what the step before has freed still counts as held
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before, start = _memory("VmRSS:"), time.process_time()
    for block, of_block in zip(blocks.joint_blocks, kept, strict=True):
        assert isinstance(block, JointBlock)
        block.kept = of_block
        context_BLD, x_BLD = block.run(context_BLD, x_BLD, *block.modulation(condition_BD))
    (context_BLD.square().mean() + x_BLD.square().mean()).backward()
    seconds, peak = time.process_time() - start, _memory("VmHWM:") - before
    for linear in (linear for _, linear in blocks.linears()):
        linear.adapter.zero_grad(set_to_none=True)
    return seconds, peak


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
