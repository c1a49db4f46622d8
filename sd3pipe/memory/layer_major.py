"""Gradient accumulation block by block: all micro-batches pass through a block before the next block is fetched.

With A micro-batches a step, the bytes that streaming copies fall A-fold. The numbers are those of the ordinary order:
every parameter receives its A gradients in the order of the micro-batches.
"""

# B batch, L tokens, D width, K modulation width, C latent channels, h w latent pixels

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from sd3pipe.memory.activations import OffloadedTensor
from sd3pipe.memory.model import Block, ModelInputs, Pair, StreamedModel
from sd3pipe.memory.rings import Use
from sd3pipe.memory.streaming import BlockStreamer

Kept = Tensor | OffloadedTensor


@dataclass(frozen=True, slots=True)
class _Graph:
    """One micro-batch's way through one block, ready to be differentiated: leaves and what came of them."""

    streams: list[Tensor]
    vectors: list[Tensor]
    outputs: Pair


@dataclass(slots=True)
class _Passage:
    """One micro-batch on its way: its streams, what they came from, and what its backward pass will need."""

    inputs: ModelInputs
    embedded: Pair  # context and x as embedded, with their graphs
    condition: Tensor  # with its graph
    condition_leaf: Tensor  # collects the gradient of all blocks
    streams: Pair
    streams_need_gradient: tuple[bool, bool]
    kept: dict[int, tuple[Kept, Kept]] = field(default_factory=dict)  # inputs of each block that is computed again
    graphs: dict[int, _Graph] = field(default_factory=dict)  # of each block that keeps more than those
    needs: dict[int, tuple[bool, bool]] = field(default_factory=dict)
    modulation: dict[int, Pair] = field(default_factory=dict)
    gradients: tuple[Tensor | None, Tensor | None] = (None, None)


def run_layer_major(
    mmdit: nn.Module,
    streamer: BlockStreamer,
    micro_batches: Sequence[ModelInputs],
    loss: Callable[[int, Tensor], Tensor],
    select: Callable[[int], None] = lambda number: None,
) -> list[Tensor]:
    """Runs forward and backward of all micro-batches and returns their losses, detached.

    `loss` takes a micro-batch's number and its velocity and returns the scalar to differentiate, already divided by A.
    `select` is called with its number whenever a micro-batch continues, for state such as dropout keys. Gradients are
    added to `.grad`. Autocast may be on; under DistributedDataParallel, call this in `no_sync()` and average the
    gradients afterwards.
    """
    model, kind = cast(StreamedModel, mmdit), streamer.device.type
    depth = len(model.joint_blocks)
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    # without autocast's cache: a cast made without gradient must not be found again with one
    with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
        passages = []
        for number, inputs in enumerate(micro_batches):
            select(number)
            passages.append(_embedded(model, inputs))
        for index in range(depth):
            _forward_through(streamer, index, passages, select)
        losses = []
        for number, passage in enumerate(passages):
            select(number)
            losses.append(_finished(model, passage, loss, number))
        for index in reversed(range(depth)):
            if any(index in passage.needs for passage in passages):
                _backward_through(streamer, index, passages, select)
        for passage in passages:
            of_streams = zip(passage.embedded, passage.gradients, strict=True)
            _backward([*of_streams, (passage.condition, passage.condition_leaf.grad)])
    return losses


def _embedded(model: StreamedModel, inputs: ModelInputs) -> _Passage:
    with torch.enable_grad():
        x_BLD = model.embed_latents(inputs["latents_BChw"], inputs.get("crop_offset"))
        context_BLD = model.embed_context(inputs["context_BLD"])
        condition_BD = model.condition(inputs["timesteps_B"], inputs["pooled_BP"])
    return _Passage(
        inputs=inputs,
        embedded=(context_BLD, x_BLD),
        condition=condition_BD,
        condition_leaf=_leaf(condition_BD, condition_BD.requires_grad),
        streams=(context_BLD.detach(), x_BLD.detach()),
        streams_need_gradient=(context_BLD.requires_grad, x_BLD.requires_grad),
    )


def _forward_through(
    streamer: BlockStreamer, index: int, passages: Sequence[_Passage], select: Callable[[int], None]
) -> None:
    with streamer.block(Use(index, with_modulation=True), direction="turning") as block:
        for number, passage in enumerate(passages):
            if index in passage.inputs.get("skip_blocks", ()):
                continue
            select(number)
            with torch.enable_grad():
                modulation = streamer.modulation_of(index, passage.condition_leaf)
            streams, needs = passage.streams, passage.streams_need_gradient
            graph = None
            if block.kept == "none":
                passage.streams, passage.streams_need_gradient = _outputs(block, streams, modulation, needs)
            else:
                graph = _graph(block.run, streams, needs, modulation)
                passage.streams, passage.streams_need_gradient = _without_graph(graph.outputs)
            if any(passage.streams_need_gradient):
                passage.needs[index] = needs
                if graph is None:
                    passage.kept[index] = (streamer.keep(streams[0]), streamer.keep(streams[1]))
                else:
                    passage.graphs[index] = graph
                if not streamer.recomputes_modulation(index, passage.condition_leaf):
                    passage.modulation[index] = modulation


def _outputs(block: Block, streams: Pair, modulation: Pair, needs: tuple[bool, bool]) -> tuple[Pair, tuple[bool, bool]]:
    """Returns a block's outputs without graph, and which of them depend on something trained."""
    if all(needs):
        with torch.no_grad():
            return block(*streams, *(vector_BK.detach() for vector_BK in modulation)), needs
    # where training begins is seen by building the graph once
    return _without_graph(_graph(block, streams, needs, modulation).outputs)


def _graph(run: Callable[..., Pair], streams: Sequence[Tensor], needs: tuple[bool, bool], modulation: Pair) -> _Graph:
    """Returns the way of one micro-batch from leaves through a block's `run`."""
    leaves = list(map(_leaf, streams, needs))
    vectors = [_leaf(vector_BK, vector_BK.requires_grad) for vector_BK in modulation]
    with torch.enable_grad():
        return _Graph(leaves, vectors, run(*leaves, *vectors))


def _without_graph(outputs: Pair) -> tuple[Pair, tuple[bool, bool]]:
    context_BLD, x_BLD = outputs
    return (context_BLD.detach(), x_BLD.detach()), (context_BLD.requires_grad, x_BLD.requires_grad)


def _finished(model: StreamedModel, passage: _Passage, loss: Callable[[int, Tensor], Tensor], number: int) -> Tensor:
    context_BLD, x_BLD = passage.streams
    x_leaf_BLD = _leaf(x_BLD, passage.streams_need_gradient[1])
    with torch.enable_grad():
        velocity_BChw = model.finish(x_leaf_BLD, passage.condition_leaf, passage.inputs["latents_BChw"])
        value = loss(number, velocity_BChw)
    _backward([(value, None)])
    passage.streams = (context_BLD, x_BLD[:0])  # the last output is not needed any more
    passage.gradients = (None, x_leaf_BLD.grad)
    return value.detach()


def _backward_through(
    streamer: BlockStreamer, index: int, passages: Sequence[_Passage], select: Callable[[int], None]
) -> None:
    modulation_again = not any(index in passage.modulation for passage in passages)
    with streamer.block(Use(index, with_modulation=modulation_again), direction="backward") as block:
        for number, passage in enumerate(passages):
            if index not in passage.needs:
                continue
            select(number)
            if modulation_again:
                with torch.enable_grad():
                    modulation = streamer.modulation_of(index, passage.condition_leaf)
            else:
                modulation = passage.modulation.pop(index)
            graph = passage.graphs.pop(index, None)
            if graph is None:
                inputs = [streamer.fetch(tensor) for tensor in passage.kept.pop(index)]
                # those of the micro-batches before have been taken
                coming = (p.kept[block] for block in (index, index - 1) for p in passages if block in p.kept)
                streamer.expect(next(coming, ()))
                graph = _graph(block, inputs, passage.needs[index], modulation)
            _backward(zip(graph.outputs, passage.gradients, strict=True))
            passage.gradients = (graph.streams[0].grad, graph.streams[1].grad)
            for vector_BK, leaf_BK in reversed(list(zip(modulation, graph.vectors, strict=True))):
                _backward([(vector_BK, leaf_BK.grad)])  # x before context, as autograd does by age


def _backward(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Differentiates the outputs that depend on something trained; a scalar without a gradient counts as a loss."""
    chosen = [(o, g) for o, g in pairs if o.requires_grad and (g is not None or o.ndim == 0)]
    if chosen:
        outputs, gradients = zip(*chosen, strict=True)
        with torch.autocast(outputs[0].device.type, enabled=False):
            torch.autograd.backward(outputs, gradients)


def _leaf(tensor: Tensor, needs_gradient: bool) -> Tensor:
    return tensor.detach().requires_grad_(needs_gradient)
