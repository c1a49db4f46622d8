"""What an adapter's layers keep for the backward pass beside a LoRA's, which is the kind that the cost model knows."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sd3pipe.adapters.network import attach
from sd3pipe.adapters.targets import AdapterSpec, BlockPart
from sd3pipe.errors import ParameterError
from sd3pipe.memory.plan import Workload
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.joint_block import JointBlock
from sd3pipe.models.mmdit import MMDiT

_LIKE_LORA = ("lora", "tlora")


def kept_beside_lora(architecture: MMDiTArchitecture, spec: AdapterSpec, work: Workload, dtype: torch.dtype) -> int:
    """Returns how many bytes more one block keeps with an adapter of this kind than with a LoRA of the work's rank.

    Both are counted in a forward pass of the first block, of tensors that have shapes and no data.
    """
    if spec.algorithm in _LIKE_LORA:
        return 0
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second that a LoRA does not wait

    rank = max(1, work.adapter_rank)  # of 0 there would be no layer
    left_out: dict[BlockPart, int] = {part: rank if given else 0 for part, given in spec.part_ranks.items()}
    lora = AdapterSpec(rank=rank, part_ranks=left_out, blocks="0")
    with FakeTensorMode():
        try:
            ours = _kept_bytes(architecture, replace(spec, blocks="0", embedder_ranks=()), work, dtype)
        except ParameterError:  # it has layers outside of the blocks alone
            return 0
        return max(0, ours - _kept_bytes(architecture, lora, work, dtype))


def _kept_bytes(architecture: MMDiTArchitecture, spec: AdapterSpec, work: Workload, dtype: torch.dtype) -> int:
    model = MMDiT(architecture, dtype=dtype)
    network = attach(model, spec).eval()
    block, width = cast(JointBlock, model.joint_blocks[0]), architecture.width
    lengths = (work.batch * work.text_tokens, work.batch * work.image_tokens)
    streams = [torch.empty(1, length, width, dtype=dtype).requires_grad_() for length in lengths]
    with torch.no_grad():
        vectors = block.modulation(torch.empty(1, width, dtype=dtype))
    inputs = (*streams, *(vector.requires_grad_() for vector in vectors))
    return _saved_bytes(block, network, inputs)


def _saved_bytes(block: nn.Module, network: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Returns the bytes that are kept of a forward pass, beside weights and inputs."""
    own = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *network.parameters(), *inputs)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(*inputs)
    return sum(nbytes for storage, nbytes in saved.items() if storage not in own)
