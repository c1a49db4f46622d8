"""A short training run with simple adapters, streamed or not, and a stream that shows every mistake in ordering."""

import contextlib
import functools
import threading

import torch
from torch import nn

from sd3pipe.memory.schedule import Copy
from sd3pipe.memory.streaming import BlockStreamer
from support.tiny_mmdit import random_inputs, tiny_mmdit


class SmallTerm(nn.Module):
    """base(x) + x A B with small random factors of rank 2."""

    def __init__(self, linear, seed=0, scale=0.01):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(scale * torch.randn(2, linear.in_features, generator=generator))
        self.up = nn.Parameter(scale * torch.randn(linear.out_features, 2, generator=generator))

    def forward(self, x, linear):
        low = nn.functional.linear(x, self.down.to(x.dtype))
        return linear.base(x) + nn.functional.linear(low, self.up.to(x.dtype))


class PoisoningCopyStream:
    """Fills a copy's target with NaN at once and copies as late as it may: when the computation waits for it."""

    def __init__(self):
        self.copies = 0
        self._pending = []
        self._lock = threading.Lock()

    def copy(self, target, source, *after):
        target.fill_(0xFF)  # NaN in every float format
        self.copies += 1
        self._pending.append((self.copies, target, source))
        return self.copies

    def wait(self, event):
        with self._lock:
            while self._pending and event is not None and self._pending[0][0] <= event:
                _, target, source = self._pending.pop(0)
                target.copy_(source)

    def finish(self, event):
        self.wait(event)

    def record_event(self):
        return None


def log_copies(rings):
    """Returns a list to which every copy of a block to the device is added from now on."""
    log, copy = [], rings._copy

    def logging_copy(ring, slot, block, part):
        copy(ring, slot, block, part)
        log.append(Copy(block, part))

    rings._copy = logging_copy
    return log


def log_reads(staging):
    """Returns a list to which every read of a block from the file is added from now on."""
    log, start = [], staging._start

    def logging_start(copy):
        start(copy)
        log.append(copy)

    staging._start = logging_start
    return log


def add_adapters(model, names, scale=0.01):
    """Attaches adapters to all linears whose path ends in one of `names`."""
    layers = {}
    for seed, (path, linear) in enumerate(model.linears()):
        if path.endswith(tuple(names)):
            linear.adapter = layers[path] = SmallTerm(linear, seed, scale)
    return layers


def parameters(layers):
    """All adapter parameters by name, in order."""
    return [(f"{path}.{name}", p) for path, layer in layers.items() for name, p in layer.named_parameters()]


def train(
    model,
    *,
    adapters=("attn.qkv", "adaLN_modulation.1"),
    blocks_to_swap=None,
    steps=2,
    autocast=False,
    kept=None,
    offload_activations=False,
    **streaming,
):
    """Returns losses, gradients and weights of two steps with two micro-batches each; None trains without streamer.

    `kept` says what each block keeps for its backward pass; by default all are computed again.
    """
    layers = add_adapters(model, adapters)
    optimizer = torch.optim.AdamW([p for _, p in parameters(layers)], lr=1e-3)
    model.keep_activations(kept or ["none"] * model.architecture.depth)
    streamer = contextlib.nullcontext()
    if blocks_to_swap is not None:
        streamer = BlockStreamer(
            model,
            blocks_to_swap=blocks_to_swap,
            device="cpu",
            offload_activations=offload_activations,
            **streaming,
        )
    results = {}
    with streamer:
        for step in range(steps):
            optimizer.zero_grad()
            for micro_batch in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    velocity = model(**random_inputs(seed=10 * step + micro_batch, batch=2, height=4, width=6))
                loss = velocity.float().square().mean()
                loss.backward()
                results[f"loss {step} {micro_batch}"] = loss.detach()
            results |= {f"gradient {step} {name}": p.grad.clone() for name, p in parameters(layers)}
            optimizer.step()
    return results | {f"weight {name}": p.detach() for name, p in parameters(layers)}


@functools.cache
def resident(variant, **options):
    """Returns what training a model of four blocks that lies in memory as a whole gives, for others to be compared."""
    return train(tiny_mmdit(variant, depth=4), **options)
