"""What an MMDiT looks like, told from its tensors' shapes alone. Free of torch: a header is enough to plan.

Keys are the native checkpoint keys without their prefix. Layout: Stability AI's sd3.5 reference, mmditx.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt

from sd3pipe.errors import InputError
from sd3pipe.models.shapes import Shapes, compare_shapes, linear_shapes, linear_sizes
from sd3pipe.models.sources import ComponentSource
from sd3pipe.variants import HEAD_WIDTH
from sd3pipe.words import MMDiTVariant, SideName

TIMESTEP_FREQUENCIES = 256  # width of the sinusoid: 128 cosines, 128 sines
MLP_RATIO = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MMDiTArchitecture:
    """The numbers that fix every tensor of an MMDiT. One head per block: width = 64 x depth."""

    depth: int
    patch_size: int = 2
    in_channels: int = 16
    pos_embed_max: int  # side of the square position table, in patches
    pooled_width: int = 2048
    context_width: int = 4096
    qk_norm: bool
    dual_attention_blocks: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        return HEAD_WIDTH * self.depth

    @property
    def heads(self) -> int:
        return self.depth

    @property
    def variant(self) -> MMDiTVariant:
        """The family this belongs to; large and large-turbo have equal shapes and cannot be told apart."""
        if not self.qk_norm:
            return "sd3-medium"
        return "sd35-medium" if self.dual_attention_blocks else "sd35-large"

    def shapes(self) -> Shapes:
        """Returns every native key with its shape, in the order of the modules."""
        width, patch = self.width, self.patch_size
        shapes: Shapes = {"pos_embed": (1, self.pos_embed_max**2, width)}
        shapes["x_embedder.proj.weight"] = (width, self.in_channels, patch, patch)
        shapes["x_embedder.proj.bias"] = (width,)
        for name, width_in in (("t_embedder", TIMESTEP_FREQUENCIES), ("y_embedder", self.pooled_width)):
            shapes |= linear_shapes(f"{name}.mlp.0", width, width_in) | linear_shapes(f"{name}.mlp.2", width, width)
        shapes |= linear_shapes("context_embedder", width, self.context_width)
        for index in range(self.depth):
            shapes |= self.block_shapes(index)
        shapes |= linear_shapes("final_layer.adaLN_modulation.1", 2 * width, width)
        shapes |= linear_shapes("final_layer.linear", patch * patch * self.in_channels, width)
        return shapes

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Returns (out features, in features) of every linear layer by its path."""
        return linear_sizes(self.shapes())

    def block_shapes(self, index: int) -> Shapes:
        """Returns the keys and shapes of one joint block."""
        return self._side_shapes(index, "context_block") | self._side_shapes(index, "x_block")

    def modulation_chunks(self, index: int, side: SideName) -> int:
        """Returns how many vectors the adaLN of one side of a block puts out: 2, 6 or 9."""
        if side == "context_block":
            return 2 if index == self.depth - 1 else 6
        return 9 if index in self.dual_attention_blocks else 6

    def _side_shapes(self, index: int, side: SideName) -> Shapes:
        width, name = self.width, f"joint_blocks.{index}.{side}"
        only_keys_and_values = side == "context_block" and index == self.depth - 1
        shapes = linear_shapes(f"{name}.adaLN_modulation.1", self.modulation_chunks(index, side) * width, width)
        shapes |= self._attention_shapes(f"{name}.attn", with_projection=not only_keys_and_values)
        if side == "x_block" and index in self.dual_attention_blocks:
            shapes |= self._attention_shapes(f"{name}.attn2", with_projection=True)
        if not only_keys_and_values:
            shapes |= linear_shapes(f"{name}.mlp.fc1", MLP_RATIO * width, width)
            shapes |= linear_shapes(f"{name}.mlp.fc2", width, MLP_RATIO * width)
        return shapes

    def _attention_shapes(self, name: str, *, with_projection: bool) -> Shapes:
        shapes = linear_shapes(f"{name}.qkv", 3 * self.width, self.width)
        if self.qk_norm:
            shapes |= {f"{name}.ln_q.weight": (HEAD_WIDTH,), f"{name}.ln_k.weight": (HEAD_WIDTH,)}
        if with_projection:
            shapes |= linear_shapes(f"{name}.proj", self.width, self.width)
        return shapes


def mmdit_architecture(source: ComponentSource) -> MMDiTArchitecture:
    """Returns the architecture of a found MMDiT from the headers alone. Raises InputError that names the place."""
    try:
        return detect_mmdit(source.shapes())
    except InputError as error:
        raise InputError(f"{source.where}: {error}") from error


def detect_mmdit(shapes: Mapping[str, tuple[int, ...]]) -> MMDiTArchitecture:
    """Returns the architecture that has exactly these native keys and shapes.

    Raises InputError where keys are missing, in excess, or of another shape than the rest implies.
    """
    patches = _shape(shapes, "x_embedder.proj.weight", axes=4)
    split = (key.split(".") for key in shapes if key.startswith("joint_blocks."))
    blocks = {int(parts[1]) for parts in split if len(parts) > 2 and parts[1].isdecimal()}
    width, depth = patches[0], len(blocks)
    if blocks != set(range(depth)) or width != HEAD_WIDTH * depth or not depth:
        raise InputError(
            f"the MMDiT is {width} wide and has {depth} joint blocks, but SD3 models have one block per "
            f"{HEAD_WIDTH} of width, numbered from 0: the file is incomplete or of another kind"
        )
    architecture = MMDiTArchitecture(
        depth=depth,
        patch_size=patches[2],
        in_channels=patches[1],
        pos_embed_max=isqrt(_shape(shapes, "pos_embed", axes=3)[1]),
        pooled_width=_shape(shapes, "y_embedder.mlp.0.weight", axes=2)[1],
        context_width=_shape(shapes, "context_embedder.weight", axes=2)[1],
        qk_norm="joint_blocks.0.context_block.attn.ln_k.weight" in shapes,
        dual_attention_blocks=tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
    )
    compare_shapes("the MMDiT", architecture.shapes(), shapes)
    return architecture


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, *, axes: int) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None:
        raise InputError(f"no SD3 MMDiT here: {key} is missing")
    if len(shape) != axes:
        raise InputError(f"no SD3 MMDiT here: {key} has shape {list(shape)}, not {axes} axes")
    return tuple(shape)
