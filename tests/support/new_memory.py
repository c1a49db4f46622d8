"""What memory torch allocates in a `with`."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NewMemory(TorchDispatchMode):
    """Knows which memory was allocated inside the `with` and is still there, beside the tensors at hand."""

    def __init__(self, at_hand):
        super().__init__()
        self._storages = {}
        self._at_hand = {tensor.untyped_storage()._cdata for tensor in at_hand}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._at_hand:
                    self._storages[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return result

    def bytes(self):
        return sum(nbytes for storage, nbytes in self._storages.values() if storage() is not None)
