"""Frozen blocks that live on the host and visit the device: one way, ahead of time, nothing is ever copied back."""

# B batch, L tokens, D width, K modulation width, P pooled width

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from sd3pipe.errors import ParameterError
from sd3pipe.memory.activations import ActivationStore, OffloadedTensor
from sd3pipe.memory.ahead import AheadModulation, PendingModulation, modulation_linears
from sd3pipe.memory.copy_streams import CopyStream, copy_stream_to
from sd3pipe.memory.flat import FlatBlock, is_modulation
from sd3pipe.memory.from_file import FileBlock, Staging, WeightsFile
from sd3pipe.memory.host import HostMemory
from sd3pipe.memory.model import Block, Pair, StreamedModel, through_weight
from sd3pipe.memory.rings import Rings, StreamedBlock, Use
from sd3pipe.memory.schedule import spread_evenly
from sd3pipe.words import ModulationMode

Direction = Literal["forward", "turning", "backward"]  # turning: forward, and a backward pass follows


class BlockStreamer:
    """Runs the joint blocks of a model, some of them from weights that are streamed in.

        with BlockStreamer(mmdit, blocks_to_swap=24, device=device) as streamer:
            for batch in batches:
                loss(mmdit(**batch)).backward()         # the model is called as ever, in training and in sampling
            print(streamer.copied_bytes)

    The model must be frozen and lie in host memory; adapters may be attached before or after. Everything but the
    streamed blocks and the position table moves to `device` here. Each block keeps for its backward pass what it is
    set to keep, wherever its weights are. Each streamed block's weights lie in one flat host
    buffer, page-locked for CUDA, and take turns in a ring of device slots for each block shape. Without CUDA the same
    code copies in plain memory. `close` gives every parameter back to the host.

    modulation  stream    adaLN weights travel with the forward pass only; their output is kept for the backward pass
                resident  adaLN weights of all blocks stay on the device
                ahead     adaLN weights stay on the host, which computes their outputs: see `prepare`
    fill                  called with each block's number, in order, before that block's weights are moved: for a model
                          that begins on the meta device and is read block by block
    file                  says which of the streamed blocks stay in the checkpoint's file, from which they are read in
                          every step; evenly spread. Outside of their turn their weights are NaN, also after `close`
    offload_activations   inputs of recomputed blocks wait on the host for the backward pass
    stream                how bytes are copied; tests put one here that delays every copy as long as it may
    """

    def __init__(
        self,
        mmdit: nn.Module,
        *,
        blocks_to_swap: int,
        device: torch.device | str,
        modulation: ModulationMode = "stream",
        offload_activations: bool = False,
        fill: Callable[[int], None] | None = None,
        file: WeightsFile | None = None,
        stream: CopyStream | None = None,
    ) -> None:
        self._model = cast(StreamedModel, mmdit)
        self.device = torch.empty(0, device=device).device  # with its number, as tensors tell it
        self.modulation: ModulationMode = modulation
        self._blocks = self._model.joint_blocks
        self.streamed = streamed_numbers(blocks_to_swap, len(self._blocks))
        self.host = HostMemory(self.device)
        self.activations = ActivationStore(self.device) if offload_activations else None
        self.from_file: tuple[int, ...] = ()
        if file is not None and file.blocks:
            if modulation != "stream":
                raise ParameterError(
                    f"--modulation {modulation} keeps weights of every block: --host-memory needs stream"
                )
            self.from_file = tuple(self.streamed[i] for i in spread_evenly(file.blocks, len(self.streamed)))
        self._flat: dict[int, StreamedBlock] = dict(self._settled_blocks(fill, file))
        self._ahead = AheadModulation(mmdit, self.streamed, self.device) if modulation == "ahead" else None
        move_resident(mmdit, self._flat.keys(), self.device, modulation=modulation)
        stream = stream or copy_stream_to(self.device)
        in_file = {number: block for number, block in self._flat.items() if isinstance(block, FileBlock)}
        staging = Staging(in_file, file, self.host, stream) if file is not None and in_file else None
        self.rings = Rings(self._flat, device=self.device, stream=stream, staging=staging)
        self._backward_to_come: list[Use] = []
        self._model.block_runner = self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the model run its blocks itself again; streamed weights are back on the host."""
        self.rings.close()
        if self.rings.staging is not None:
            self.rings.staging.close()
        if self._ahead is not None:
            self._ahead.close()
        if self.activations is not None:
            self.activations.close()
        self.host.close()
        self._model.block_runner = None

    @property
    def copied_bytes(self) -> int:
        """All bytes copied to the device so far."""
        return self.rings.copied_bytes

    @property
    def host_bytes(self) -> int:
        """Host memory of the streamed blocks, but for the buffers into which a file is read."""
        return sum(block.layout.total_bytes for block in self._flat.values() if isinstance(block, FlatBlock))

    @property
    def prepares_modulation(self) -> bool:
        """Whether `prepare` saves anything."""
        return self._ahead is not None and bool(self.streamed)

    def prepare(self, timesteps_B: Tensor, pooled_BP: Tensor) -> PendingModulation:
        """Starts computing the modulation of a coming forward pass on the host (modulation = "ahead").

        Both tensors lie on the host. Use: `with streamer.prepare(...)` around the forward pass; or keep what it returns
        while the step before runs, and enter it then. Outside of it, the host begins with the forward pass and has to
        stay ahead of the device.
        """
        if self._ahead is None:
            raise ParameterError(f"modulation is {self.modulation}: nothing can be prepared; use modulation = ahead")
        return self._ahead.prepare(timesteps_B, pooled_BP)

    def use(self, pending: PendingModulation | None) -> None:
        """Lets the blocks take their modulation from there until further notice: for interleaved forward passes."""
        if self._ahead is not None:
            self._ahead.pending = pending

    def __call__(self, index: int, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> Pair:
        """Returns context and x after block `index`; this is what the model calls."""
        leaving = self.activations if self._blocks[index].kept != "all" else None
        with leaving.saving() if leaving is not None else contextlib.nullcontext():
            if index not in self._flat:
                return self._model.run_block(index, context_BLD, x_BLD, condition_BD)
            return self._run_streamed(index, context_BLD, x_BLD, condition_BD)

    @contextlib.contextmanager
    def block(self, use: Use, *, direction: Direction) -> Iterator[Block]:
        """Lends a block whose weights are on the device inside the `with`, and starts the copies that follow.

        For loops that drive the blocks themselves, such as memory.layer_major.
        """
        if use.block in self._flat:
            self.acquire(use, direction)
        with self._weights_found_again(use.block):
            yield self._blocks[use.block]
        if use.block in self._flat:
            self.rings.release()
            if direction == "turning":
                self._backward_to_come.append(use)

    def modulation_of(self, index: int, condition_BD: Tensor) -> Pair:
        """Returns the modulation vectors of a lent block, from wherever its adaLN weights are."""
        if self._ahead is not None and index in self._flat:
            return self._ahead.modulation(index, condition_BD)
        return self._blocks[index].modulation(condition_BD)

    def recomputes_modulation(self, index: int, condition_BD: Tensor) -> bool:
        """Returns whether a block's backward pass needs its adaLN weights again.

        That is so where the gradient goes on to the embedders, or to an adapter that turns the input of adaLN. Another
        adapter on adaLN does not ask for them.
        """
        if self.modulation != "stream" or index not in self._flat:
            return False
        linears = modulation_linears(cast(nn.Module, self._model), index)
        return condition_BD.requires_grad or any(through_weight(linear.adapter) for linear in linears)

    def keep(self, tensor: Tensor) -> Tensor | OffloadedTensor:
        """Puts a block's input away until `fetch`: on the host, where activations are offloaded."""
        return tensor if self.activations is None else self.activations.put_away(tensor)

    def expect(self, kept: Iterable[Tensor | OffloadedTensor]) -> None:
        """Starts the way back of block inputs that `fetch` will be asked for next."""
        for item in kept:
            if self.activations is not None and isinstance(item, OffloadedTensor):
                self.activations.start_back(item)

    def fetch(self, kept: Tensor | OffloadedTensor) -> Tensor:
        """Returns what `keep` took."""
        if self.activations is None or isinstance(kept, Tensor):
            assert isinstance(kept, Tensor)
            return kept
        return self.activations.load(kept)

    def _run_streamed(self, index: int, context_BLD: Tensor, x_BLD: Tensor, condition_BD: Tensor) -> Pair:
        block = self._blocks[index]
        self.acquire(Use(index, self.modulation == "stream"), "turning" if torch.is_grad_enabled() else "forward")
        if not torch.is_grad_enabled():
            result = block(context_BLD, x_BLD, *self.modulation_of(index, condition_BD))
        else:
            modulation_again = self.recomputes_modulation(index, condition_BD)
            with self._weights_found_again(index):
                if modulation_again:
                    result = block.run_with_modulation(context_BLD, x_BLD, condition_BD)
                else:
                    result = block.run(context_BLD, x_BLD, *self.modulation_of(index, condition_BD))
            if result[1].requires_grad:
                use = Use(index, modulation_again)
                self._backward_to_come.append(use)
                result = cast(Pair, _Turn.apply(self, use, *result))
        self.rings.release()
        return result

    def _weights_found_again(self, index: int) -> contextlib.AbstractContextManager[None]:
        """Returns what lets a streamed block that is not computed again be differentiated when its weights are back."""
        streamed = index in self._flat and torch.is_grad_enabled() and self._blocks[index].kept == "all"
        return self.rings.found_again() if streamed else contextlib.nullcontext()

    def acquire(self, use: Use, direction: Direction) -> None:
        """Brings a block's weights in, and starts the copies that follow; the block before it is done."""
        if direction == "backward":
            if use in self._backward_to_come:
                self._backward_to_come.remove(use)
        elif use.block == self.streamed[0]:
            self._backward_to_come.clear()  # what is left of a graph that was dropped without a backward pass
        self.rings.acquire(use)
        self.rings.prefetch(self._upcoming(use, direction))

    def _upcoming(self, use: Use, direction: Direction) -> Iterator[Use]:
        """Yields the uses that come next; a guess, which costs a copy where it is wrong and nothing else."""
        whole = self.modulation == "stream"
        later = [index for index in self.streamed if index > use.block]
        yield use
        if direction != "backward":
            yield from (Use(index, whole) for index in later)
        if direction == "turning":
            yield from (Use(index, False) for index in (*reversed(later), use.block))
        if direction != "forward":
            yield from reversed(self._backward_to_come)
        yield from (Use(index, whole) for index in self.streamed)

    def _settled_blocks(
        self, fill: Callable[[int], None] | None, file: WeightsFile | None
    ) -> Iterator[tuple[int, StreamedBlock]]:
        for index, block in enumerate(cast(Iterable[nn.Module], self._blocks)):
            if file is not None and index in self.from_file:
                yield index, FileBlock(block, file.dtype)
                continue
            if fill is not None:
                fill(index)
            if index in self.streamed:
                yield index, FlatBlock(block, self.host, with_modulation=self.modulation == "stream")
            else:
                block.to(self.device)


class _Turn(torch.autograd.Function):
    """The identity after a streamed block, whose backward brings the block's weights in before it is recomputed."""

    @staticmethod
    def forward(ctx: Any, streamer: BlockStreamer, use: Use, context_BLD: Tensor, x_BLD: Tensor) -> Pair:
        ctx.streamer, ctx.use = streamer, use
        ctx.set_materialize_grads(False)
        result = context_BLD.view_as(context_BLD), x_BLD.view_as(x_BLD)
        if not ctx.needs_input_grad[2]:
            ctx.mark_non_differentiable(result[0])
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, Tensor | None, Tensor | None]:
        ctx.streamer.acquire(ctx.use, "backward")
        context_grad_BLD, x_grad_BLD = grads
        return None, None, context_grad_BLD, x_grad_BLD


def streamed_numbers(blocks_to_swap: int, depth: int) -> tuple[int, ...]:
    """Returns which blocks are streamed. Raises ParameterError where the model has not that many."""
    if not 0 <= blocks_to_swap <= depth:
        raise ParameterError(f"--blocks-to-swap {blocks_to_swap}: the model has {depth} blocks: use 0 to {depth}")
    return spread_evenly(blocks_to_swap, depth)


def move_resident(
    mmdit: nn.Module, streamed: Collection[int], device: torch.device, *, modulation: ModulationMode
) -> None:
    """Moves parameters to the device, but those of streamed blocks; resident modulation moves, too.

    Buffers (the position table, of which a step needs a window) stay on the host.
    """
    prefixes = tuple(f"joint_blocks.{index}." for index in streamed)
    for name, parameter in mmdit.named_parameters():
        streams = name.startswith(prefixes)
        if not streams or (modulation == "resident" and is_modulation(name)):
            parameter.data = parameter.data.to(device)
        elif modulation == "ahead" and is_modulation(name):
            parameter.data = parameter.data.to("cpu")
