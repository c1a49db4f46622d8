"""A copy stream that behaves as badly as a GPU's may: copies happen as late as allowed, and keep nothing alive."""

import gc
import weakref

import torch


class WeakTensor:
    """A tensor whose memory may be given away."""

    def __init__(self, tensor):
        self._storage = weakref.ref(tensor.untyped_storage())
        self._like = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def get(self):
        dtype, *place = self._like
        storage = self._storage()
        return None if storage is None else torch.empty(0, dtype=dtype).set_(storage, *place)


class Event:
    """One copy that has not happened yet. It knows its tensors by weak references alone, as a stream does."""

    def __init__(self, target, source, after, before):
        self._target, self._source = WeakTensor(target), WeakTensor(source)
        self._after, self._before = after, before
        self.happened = False
        target.fill_(0xFF if not target.is_floating_point() else float("nan"))

    def happen(self):
        """Copies, after all that the copy waits for. Fails if a tensor is gone: its memory may be another's by now."""
        if self.happened:
            return
        self.happened = True
        for event in (*self._after, self._before):
            if isinstance(event, Event):
                event.happen()
        target, source = self._target.get(), self._source.get()
        assert target is not None, "the target was dropped before its copy"
        assert source is not None, "the source was dropped before its copy"
        target.copy_(source)


class LateCopyStream:
    """Copies in order, each when the computation first waits for it."""

    def __init__(self):
        self._last = None
        self.copies = []

    def copy(self, target, source, *after):
        self._last = Event(target, source, after, self._last)
        self.copies.append(self._last)
        return self._last

    def wait(self, event):
        gc.collect(0)
        if event is not None:
            event.happen()

    def record_event(self):
        return None
