"""CLIP-L, CLIP-G and T5 through transformers, each filled from a checkpoint's tensors alone.

Which states are taken: model-spec section 4. A batch has a fixed shape and no neighbour reaches a row, so a row's bits
depend on its text, the batch size and the machine, not on what else is encoded.
"""

# B batch, L tokens, D width, H heads, P pooled width

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

from sd3pipe.models.sources import ComponentSource
from sd3pipe.models.text_architecture import CLIP_ACTIVATIONS, detect_clip, detect_t5
from sd3pipe.models.tokenizers import TokenBatch
from sd3pipe.tensors.reader import read_tensors
from sd3pipe.variants import HEAD_WIDTH
from sd3pipe.words import ClipName

_CLIP_EOS_RULE = 2  # transformers' sign for: pool at the largest id, which is the end token's in SD3's vocabularies

_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}  # torch's fused kernel, which takes the position bias


class ClipEncoder:
    """CLIP-L or CLIP-G with its projection; a checkpoint without one (CLIP-L's) has the identity."""

    def __init__(self, source: ComponentSource, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        assert source.component in CLIP_ACTIVATIONS
        name = cast(ClipName, source.component)
        self.architecture = architecture = detect_clip(source.shapes(), source.where)
        self.device = torch.device(device)
        config = CLIPTextConfig(
            vocab_size=architecture.vocabulary,
            hidden_size=architecture.width,
            intermediate_size=architecture.mlp_width,
            projection_dim=architecture.pooled_width,
            num_hidden_layers=architecture.depth,
            num_attention_heads=architecture.heads,
            max_position_embeddings=architecture.positions,
            hidden_act=CLIP_ACTIVATIONS[name],
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=_CLIP_EOS_RULE,
            **_ATTENTION,
        )
        tensors = read_tensors(source.tensors, dtype=dtype, device=device)
        if architecture.projected_width is None:
            tensors["text_projection.weight"] = torch.eye(architecture.width, dtype=dtype, device=device)
        self._model = _filled(lambda: CLIPTextModelWithProjection(config), tensors)
        positions = torch.arange(architecture.positions, device=device).expand(1, -1)
        for module in self._model.modules():
            if hasattr(module, "position_ids"):
                module.position_ids = positions

    @torch.no_grad()
    def encode(self, batch: TokenBatch, *, masked: bool) -> tuple[Tensor, Tensor]:
        """Returns the states before the last layer, unnormed, [B, L, D], and the pooled vectors [B, P]."""
        ids_BL = torch.from_numpy(batch.ids).to(self.device)
        mask = None
        if masked:
            # spelled out even where nothing is padded: a batch without padding would otherwise take another kernel,
            # and a row's bits would depend on its neighbours
            length = batch.mask.shape[1]
            future_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
            mask = _added_to_scores(future_LL | _padding(batch), next(self._model.parameters()).dtype).to(self.device)
        output = self._model(input_ids=ids_BL, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[-2], output.text_embeds


class T5Encoder:
    """A T5 v1.1 encoder that runs all batches through one block before it goes on to the next.

    `streamed` reads each block when it is due and drops it afterwards, so that the device holds two blocks at a time
    (0.4 GB each at bfloat16 for T5-XXL) instead of all (9.5 GB). The numbers are the same. `pack` changes a block's
    linear layers in place, once the block is on the device.
    """

    def __init__(
        self,
        source: ComponentSource,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        streamed: bool = False,
        pack: Callable[[nn.Module], None] | None = None,
    ) -> None:
        self.architecture = architecture = detect_t5(source.shapes(), source.where)
        self.device, self._dtype, self._source, self._pack = torch.device(device), dtype, source, pack
        self._config = T5Config(
            vocab_size=architecture.vocabulary,
            d_model=architecture.width,
            d_kv=HEAD_WIDTH,
            d_ff=architecture.mlp_width,
            num_layers=architecture.depth,
            num_heads=architecture.heads,
            relative_attention_num_buckets=architecture.distance_buckets,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_decoder=False,
            use_cache=False,
            **_ATTENTION,
        )
        outside = read_tensors(source.tensors, dtype=dtype, keys=["shared.weight", "encoder.final_layer_norm.weight"])
        self._embedding = outside["shared.weight"]  # stays on the CPU: only the rows of the texts' tokens move
        norm = {"weight": outside["encoder.final_layer_norm.weight"].to(self.device)}
        self._final_norm = _filled(lambda: T5LayerNorm(architecture.width, eps=1e-6), norm)
        self._resident = [] if streamed else [self._place(self._read(i)) for i in range(architecture.depth)]

    @torch.no_grad()
    def encode(
        self, batches: Sequence[TokenBatch], *, masked: bool, advance: Callable[[int], None] = lambda rows: None
    ) -> list[Tensor]:
        """Returns the final states [B, L, D] of each batch; batches may differ in length.

        `advance` is told the number of rows after each block that a batch has passed.
        """
        ids = (torch.from_numpy(batch.ids) for batch in batches)
        hidden = [functional.embedding(ids_BL, self._embedding).to(self.device) for ids_BL in ids]
        bias: dict[int, Tensor] = {}
        with ThreadPoolExecutor(1) as reader:
            ahead = self._start_reading(reader, 0)
            for index in range(self.architecture.depth):
                block = self._place(ahead.result()) if ahead is not None else self._resident[index]
                ahead = self._start_reading(reader, index + 1)
                if index == 0:  # its bias [1, H, L, L] tells all blocks the distance of two tokens
                    attention = cast(Any, block).layer[0].SelfAttention
                    bias = {length: attention.compute_bias(length, length) for length in {x.shape[1] for x in hidden}}
                for number, batch in enumerate(batches):
                    bias_BHLL = bias[hidden[number].shape[1]]
                    if masked:
                        bias_BHLL = bias_BHLL + _added_to_scores(_padding(batch), self._dtype).to(self.device)
                    hidden[number] = block(hidden[number], position_bias=bias_BHLL)[0]
                    advance(len(batch.ids))
        return [self._final_norm(x_BLD) for x_BLD in hidden]

    def _start_reading(self, reader: ThreadPoolExecutor, index: int) -> Future[dict[str, Tensor]] | None:
        if self._resident or index == self.architecture.depth:
            return None
        return reader.submit(self._read, index)

    def _read(self, index: int) -> dict[str, Tensor]:
        """Reads one block's tensors under the block's own names."""
        prefix = f"encoder.block.{index}."
        tensors = read_tensors(
            self._source.tensors, dtype=self._dtype, keys=list(self.architecture.block_shapes(index))
        )
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}

    def _place(self, tensors: dict[str, Tensor]) -> nn.Module:
        has_bias = any("relative_attention_bias" in key for key in tensors)
        on_device = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        block = _filled(lambda: T5Block(self._config, has_relative_attention_bias=has_bias, layer_idx=0), on_device)
        if self._pack is not None:
            self._pack(block)
        return block


def _filled(build: Callable[[], nn.Module], tensors: dict[str, Tensor]) -> Any:
    """Returns a module that is built without memory and takes the tensors themselves as its weights."""
    with torch.device("meta"):
        module = build()
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _padding(batch: TokenBatch) -> Tensor:
    """Returns where a batch is padded, [B, 1, 1, L]."""
    return torch.from_numpy(batch.mask == 0)[:, None, None, :]


def _added_to_scores(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to attention scores: the type's minimum where they are blocked, else 0."""
    return torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)
