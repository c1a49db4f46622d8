"""What a text encoder looks like, told from its tensors' shapes alone. Free of torch.

Keys are those of transformers (CLIPTextModelWithProjection, T5EncoderModel), as SD3's checkpoints have them behind
`text_encoders.{clip_l,clip_g,t5xxl}.transformer.`. Layout: model-spec section 1.4.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from sd3pipe.errors import InputError
from sd3pipe.models.shapes import Shapes, compare_shapes, count_numbered, linear_shapes, vector_shapes
from sd3pipe.variants import HEAD_WIDTH
from sd3pipe.words import ClipName, EncoderName

ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)
CLIP_ACTIVATIONS: dict[ClipName, str] = {"clip_l": "quick_gelu", "clip_g": "gelu"}  # the tensors do not tell


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipArchitecture:
    """The numbers that fix every tensor of a CLIP text model."""

    width: int
    depth: int
    mlp_width: int
    vocabulary: int
    positions: int
    projected_width: int | None  # None: the checkpoint has no text_projection, which means the identity

    @property
    def heads(self) -> int:
        return self.width // HEAD_WIDTH

    @property
    def pooled_width(self) -> int:
        return self.projected_width or self.width

    def shapes(self) -> Shapes:
        """Returns every key with its shape, in the order of the modules."""
        width = self.width
        shapes: Shapes = {
            "text_model.embeddings.token_embedding.weight": (self.vocabulary, width),
            "text_model.embeddings.position_embedding.weight": (self.positions, width),
        }
        for index in range(self.depth):
            layer = f"text_model.encoder.layers.{index}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear_shapes(f"{layer}.self_attn.{name}", width, width)
            shapes |= vector_shapes(f"{layer}.layer_norm1", width) | vector_shapes(f"{layer}.layer_norm2", width)
            shapes |= linear_shapes(f"{layer}.mlp.fc1", self.mlp_width, width)
            shapes |= linear_shapes(f"{layer}.mlp.fc2", width, self.mlp_width)
        shapes |= vector_shapes("text_model.final_layer_norm", width)
        if self.projected_width is not None:
            shapes["text_projection.weight"] = (self.projected_width, width)
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class T5Architecture:
    """The numbers that fix every tensor of a T5 v1.1 encoder."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    vocabulary: int
    distance_buckets: int

    def shapes(self) -> Shapes:
        """Returns every key with its shape, in the order of the modules, without the duplicate embedding."""
        shapes: Shapes = {"shared.weight": (self.vocabulary, self.width)}
        for index in range(self.depth):
            shapes |= self.block_shapes(index)
        shapes["encoder.final_layer_norm.weight"] = (self.width,)
        return shapes

    def block_shapes(self, index: int) -> Shapes:
        """Returns the keys and shapes of one block; block 0 carries the position bias of all."""
        block, inner = f"encoder.block.{index}", self.heads * HEAD_WIDTH
        shapes: Shapes = {f"{block}.layer.0.SelfAttention.{name}.weight": (inner, self.width) for name in "qkv"}
        shapes[f"{block}.layer.0.SelfAttention.o.weight"] = (self.width, inner)
        if index == 0:
            bias = f"{block}.layer.0.SelfAttention.relative_attention_bias.weight"
            shapes[bias] = (self.distance_buckets, self.heads)
        shapes[f"{block}.layer.0.layer_norm.weight"] = (self.width,)
        for name in ("wi_0", "wi_1"):
            shapes[f"{block}.layer.1.DenseReluDense.{name}.weight"] = (self.mlp_width, self.width)
        shapes[f"{block}.layer.1.DenseReluDense.wo.weight"] = (self.width, self.mlp_width)
        shapes[f"{block}.layer.1.layer_norm.weight"] = (self.width,)
        return shapes


def detect_clip(shapes: Mapping[str, tuple[int, ...]], where: str) -> ClipArchitecture:
    """Returns the architecture that has exactly these keys and shapes. Raises InputError."""
    vocabulary, width = _matrix(shapes, "text_model.embeddings.token_embedding.weight", "a CLIP text encoder", where)
    projection = "text_projection.weight"
    architecture = ClipArchitecture(
        width=width,
        depth=count_numbered(shapes, "text_model.encoder.layers."),
        mlp_width=_matrix(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", "a CLIP text encoder", where)[0],
        vocabulary=vocabulary,
        positions=_matrix(shapes, "text_model.embeddings.position_embedding.weight", "a CLIP text encoder", where)[0],
        projected_width=_matrix(shapes, projection, "a CLIP text encoder", where)[0] if projection in shapes else None,
    )
    if width % HEAD_WIDTH:
        raise InputError(f"{where}: the CLIP text encoder is {width} wide, which is no multiple of {HEAD_WIDTH}")
    compare_shapes(f"{where}: the CLIP text encoder", architecture.shapes(), shapes)
    return architecture


def detect_t5(shapes: Mapping[str, tuple[int, ...]], where: str) -> T5Architecture:
    """Returns the architecture that has exactly these keys and shapes. Raises InputError."""
    vocabulary, width = _matrix(shapes, "shared.weight", "a T5 encoder", where)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = _matrix(shapes, bias, "a T5 encoder", where)
    gate = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    architecture = T5Architecture(
        width=width,
        depth=count_numbered(shapes, "encoder.block."),
        heads=heads,
        mlp_width=_matrix(shapes, gate, "a T5 v1.1 encoder", where)[0],
        vocabulary=vocabulary,
        distance_buckets=buckets,
    )
    compare_shapes(f"{where}: the T5 encoder", architecture.shapes(), shapes)
    return architecture


def _matrix(shapes: Mapping[str, tuple[int, ...]], key: str, kind: str, where: str) -> tuple[int, int]:
    shape = shapes.get(key)
    if shape is None or len(shape) != 2:
        found = "is missing" if shape is None else f"has shape {list(shape)}, not two axes"
        raise InputError(f"{where}: not {kind} as SD3 uses it: {key} {found}")
    return shape[0], shape[1]
