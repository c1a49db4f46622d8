"""What an adapter's shapes say about the model it belongs to. Free of torch."""

from collections.abc import Mapping

from sd3pipe.adapters.keymap import is_text_encoder, native_block
from sd3pipe.errors import InputError

HEAD_WIDTH = 64  # an SD3 model has one block per 64 of width

Sizes = Mapping[str, tuple[int, int]]  # module path -> (out features, in features)

_ROWS = {"attn.qkv": 3, "attn2.qkv": 3, "attn.proj": 1, "attn2.proj": 1, "mlp.fc1": 4, "mlp.fc2": 1}
_DEPTHS = {"sd3-medium": 24, "sd35-medium": 24, "sd35-large": 38}
_MOST_BLOCKS = 128  # no SD3 model comes near it, and factors of a few bytes may claim any size
_DUAL_BLOCKS = 13  # SD3.5-medium's first 13 blocks have a second attention, and 9 vectors of modulation


def width_of(path: str, size: tuple[int, int]) -> int:
    """Returns the width of the model that has a module of this path and size."""
    block = native_block(path)
    if block is not None:
        return size[1] // 4 if block[1].endswith("mlp.fc2") else size[1]
    return size[1] if path.startswith("final_layer") else size[0]


def depth_of(sizes: Sizes) -> int:
    """Returns the number of blocks of the one model that all modules fit; 0 where only text encoders are adapted.

    Raises InputError where there is no such model.
    """
    of_model = {path: size for path, size in sizes.items() if not is_text_encoder(path)}
    widths = {width_of(path, size) for path, size in of_model.items()}
    if not widths:
        return 0
    width = min(widths)
    if len(widths) > 1 or width % HEAD_WIDTH or not width:
        raise InputError(f"its layers belong to models of different width ({', '.join(map(str, sorted(widths)))})")
    depth = width // HEAD_WIDTH
    if depth > _MOST_BLOCKS:
        raise InputError(f"its layers are {width} wide, and the widest that are read are {_MOST_BLOCKS * HEAD_WIDTH}")
    for path, size in of_model.items():
        if not _fits(path, size, width, depth):
            raise InputError(f"{path} has size {list(size)}, which no SD3 model of width {width} has")
    return depth


def fitting_variants(sizes: Sizes) -> tuple[str, ...]:
    """Returns the public models that have all these modules: shapes alone may leave two medium ones."""
    depth = depth_of(sizes)
    return tuple(name for name, blocks in _DEPTHS.items() if blocks == depth and _fits_variant(name, sizes, depth))


def _fits_variant(variant: str, sizes: Sizes, depth: int) -> bool:
    for path, size in sizes.items():
        block = native_block(path)
        if block is None:
            continue
        dual = variant == "sd35-medium" and block[0] < _DUAL_BLOCKS
        if ".attn2." in path and not dual:
            return False
        if block[1] == "x_block.adaLN_modulation.1" and size[0] != (9 if dual else 6) * depth * HEAD_WIDTH:
            return False
    return True


def _fits(path: str, size: tuple[int, int], width: int, depth: int) -> bool:
    block = native_block(path)
    if block is None:
        return path != "final_layer.adaLN_modulation.1" or size[0] == 2 * width
    index, module = block
    if index >= depth:
        return False
    side, layer = module.split(".", 1)
    last_context = side == "context_block" and index == depth - 1
    if layer.startswith("adaLN"):
        allowed = (2,) if last_context else (6,) if side == "context_block" else (6, 9)
    elif last_context and layer != "attn.qkv":
        return False
    else:
        allowed = (_ROWS[layer],)
    return size[0] in [rows * width for rows in allowed]
