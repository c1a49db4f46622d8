"""A few slots on the device that blocks of one shape share, and the decision what to copy into them next."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd3pipe.memory.copy_streams import CopyStream
from sd3pipe.memory.flat import FlatBlock, FlatLayout
from sd3pipe.memory.from_file import FileBlock, Staging
from sd3pipe.memory.schedule import RING_SLOTS, Copy, Part


@dataclass(slots=True, eq=False)
class Slot:
    """Device memory for one block at a time."""

    buffer: Tensor
    views: list[Tensor]
    block: int | None = None
    has_modulation: bool = False
    ready: object = None  # event of the last copy into it
    done: object = None  # event of the last computation that read it


@dataclass(frozen=True, slots=True)
class Use:
    """A block that will be needed, and whether with its modulation."""

    block: int
    with_modulation: bool


StreamedBlock = FlatBlock | FileBlock


class _InSlot:
    """Where in a slot a tensor lies."""

    def __init__(self, tensor: Tensor) -> None:
        self._dtype, self._offset = tensor.dtype, tensor.storage_offset()
        self._shape, self._stride = tensor.shape, tensor.stride()

    def within(self, buffer: Tensor) -> Tensor:
        """Returns the same part of another slot's buffer."""
        return buffer.view(self._dtype).as_strided(self._shape, self._stride, self._offset)


class Ring:
    """The slots for all streamed blocks of one layout."""

    def __init__(self, blocks: dict[int, StreamedBlock], device: torch.device) -> None:
        self.blocks = blocks
        self.layout: FlatLayout = next(iter(blocks.values())).layout
        self.slots: list[Slot] = []
        for _ in range(min(RING_SLOTS, len(blocks))):
            buffer = torch.empty(self.layout.total_bytes, dtype=torch.uint8, device=device)
            self.slots.append(Slot(buffer=buffer, views=self.layout.views(buffer)))

    def find(self, block: int) -> Slot | None:
        """Returns the slot that holds `block`, or whose copy is on its way."""
        return next((slot for slot in self.slots if slot.block == block), None)


class Rings:
    """All rings of a model: brings blocks in ahead of their use, and binds them while they are used.

    One block at a time is bound.
    """

    def __init__(
        self,
        blocks: dict[int, StreamedBlock],
        *,
        device: torch.device,
        stream: CopyStream,
        staging: Staging | None = None,
    ) -> None:
        by_layout: dict[tuple[object, ...], dict[int, StreamedBlock]] = {}
        for index, block in sorted(blocks.items()):
            key = tuple((t.name, t.shape, t.dtype) for t in block.layout.tensors)
            by_layout.setdefault(key, {})[index] = block
        self.rings = [Ring(members, device) for members in by_layout.values()]
        self._all_slots = [slot for ring in self.rings for slot in ring.slots]
        for slot in self._all_slots:
            slot.done = stream.record_event()  # what used this memory before
        self.copied_bytes = 0
        self._stream, self.staging = stream, staging
        self._of_block = {index: ring for ring in self.rings for index in ring.blocks}
        self._bound: int | None = None

    def bytes(self) -> int:
        """Returns the device memory of all slots."""
        return sum(slot.buffer.numel() for slot in self._all_slots)

    def acquire(self, use: Use) -> None:
        """Binds a block's parameters to the device, after the copies that this needs."""
        if self._bound != use.block:
            self.release()
        ring = self._of_block[use.block]
        slot = ring.find(use.block)
        if slot is None or (use.with_modulation and not slot.has_modulation):
            self._bring(ring, use, {use.block})
            slot = self._holder(use.block)
        self._stream.wait(slot.ready)  # copies happen in order, so this is the last one
        ring.blocks[use.block].bind(slot.views)
        self._bound = use.block

    def release(self) -> None:
        """Gives the bound block's parameters back to the host; its slot may be filled once the work so far is done."""
        if self._bound is None:
            return
        self._holder(self._bound).done = self._stream.record_event()
        self._of_block[self._bound].blocks[self._bound].unbind()
        self._bound = None

    @contextlib.contextmanager
    def found_again(self) -> Iterator[None]:
        """Lets what autograd saves of the bound block's weights be found in whichever slot has the block by then.

        A transposed weight, for one, is a view of the slot, which others use in the meantime. Parameters are found as
        they are: `bind` exchanges the memory behind them.
        """
        block = self._bound
        assert block is not None
        place = self._holder(block).buffer.untyped_storage().data_ptr()

        def pack(tensor: Tensor) -> "Tensor | _InSlot":
            inside = tensor.untyped_storage().data_ptr() == place and not isinstance(tensor, nn.Parameter)
            return _InSlot(tensor) if inside else tensor

        def unpack(saved: "Tensor | _InSlot") -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            assert self._bound == block, f"block {block} is differentiated while {self._bound} is on the device"
            return saved.within(self._holder(block).buffer)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def close(self) -> None:
        """Gives all parameters back; what uses the slots' memory next comes after the copies that are under way."""
        self.release()
        for slot in self._all_slots:
            self._stream.wait(slot.ready)

    def prefetch(self, upcoming: Iterable[Use]) -> None:
        """Starts the copies for the nearest uses: as many blocks as a ring has slots, the bound one included."""
        uses: list[Use] = []
        wanted: set[int] = set()
        later = iter(upcoming)
        for use in later:
            if use.block not in wanted and len(wanted) == RING_SLOTS:
                later = itertools.chain([use], later)
                break
            wanted.add(use.block)
            uses.append(use)
        for use in uses:
            self._bring(self._of_block[use.block], use, wanted)
        if self.staging is not None:
            self.staging.expect(self._reads(later, self.staging))

    def _holder(self, block: int) -> Slot:
        """Returns the slot of a block that is on the device."""
        slot = self._of_block[block].find(block)
        assert slot is not None
        return slot

    def _reads(self, uses: Iterable[Use], staging: Staging) -> Iterator[Copy]:
        """Yields what coming uses need from the file, up to the first one whose block may still be in a slot then."""
        read: set[int] = set()
        for use in uses:
            if use.block in read or self._of_block[use.block].find(use.block) is not None:
                return
            read.add(use.block)
            if use.block in staging.blocks:
                yield Copy(use.block, "whole" if use.with_modulation else "body")

    def _bring(self, ring: Ring, use: Use, wanted: set[int]) -> None:
        """Copies what is missing of a block into its slot, or into one whose block is not `wanted`, if there is one."""
        slot = ring.find(use.block)
        if slot is not None:
            if use.with_modulation and not slot.has_modulation:
                self._copy(ring, slot, use.block, "modulation")
            return
        needed = {*wanted, self._bound}
        slot = next((s for s in ring.slots if s.block is None or s.block not in needed), None)
        if slot is not None:
            slot.block, slot.has_modulation = use.block, False
            self._copy(ring, slot, use.block, "whole" if use.with_modulation else "body")

    def _copy(self, ring: Ring, slot: Slot, block: int, part: Part) -> None:
        start = ring.layout.body_bytes if part == "modulation" else 0
        end = ring.layout.body_bytes if part == "body" else ring.layout.total_bytes
        source = ring.blocks[block]
        if isinstance(source, FileBlock):
            assert self.staging is not None
            buffer = self.staging.take(Copy(block, part))
            slot.ready = self._stream.copy(slot.buffer[start:end], buffer[start:end], slot.done)
            self.staging.give_back(buffer, slot.ready)
        else:
            slot.ready = self._stream.copy(slot.buffer[start:end], source.host[start:end], slot.done)
        slot.has_modulation = part != "body"
        self.copied_bytes += end - start
