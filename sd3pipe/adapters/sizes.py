"""What an adapter's shapes say about the model it belongs to. Free of torch."""

from collections.abc import Mapping

from sd3pipe.adapters.keymap import is_text_encoder, native_block
from sd3pipe.errors import InputError
from sd3pipe.variants import HEAD_WIDTH, PUBLIC_MODELS
from sd3pipe.words import MMDiTVariant

Sizes = Mapping[str, tuple[int, int]]  # module path -> (out, in features), 0 for the side that factors do not tell

_ROWS = {"attn.qkv": 3, "attn2.qkv": 3, "attn.proj": 1, "attn2.proj": 1, "mlp.fc1": 4, "mlp.fc2": 1}
_MOST_BLOCKS = 128  # no SD3 model comes near it, and factors of a few bytes may claim any size


def same_size(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether two sizes of a tensor agree where both tell it."""
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(one == other or not (one and other) for one, other in pairs)


def widths_of(path: str, size: tuple[int, int]) -> set[int] | None:
    """Returns the widths of the models that have a module of this path and size, None where all do."""
    rows, columns = size
    block = native_block(path)
    if block is None:
        own = columns if path.startswith("final_layer") else rows
        return {own} if own else None
    if columns:
        return {columns // 4 if block[1].endswith("mlp.fc2") else columns}
    side, layer = block[1].split(".", 1)
    return {rows // times for times in _rows_of(side, layer) if rows % times == 0}


def depth_of(sizes: Sizes) -> int:
    """Returns the number of blocks of the one model that all modules fit; 0 where only text encoders are adapted.

    Raises InputError where there is no such model.
    """
    of_model = {path: size for path, size in sizes.items() if not is_text_encoder(path)}
    told = [widths for path, size in of_model.items() if (widths := widths_of(path, size)) is not None]
    if not told:
        return 0
    possible = (width for width in set.intersection(*told) if width and width % HEAD_WIDTH == 0)
    depths = {model.depth for model in PUBLIC_MODELS.values()}
    common = sorted(possible, key=lambda width: (width // HEAD_WIDTH not in depths, width))
    if not common:
        raise InputError(
            f"its layers belong to models of different width ({', '.join(map(str, sorted(set.union(*told))))})"
        )
    misfits = {
        width: next((path for path, size in of_model.items() if not _fits(path, size, width)), None) for width in common
    }
    width = next((width for width, misfit in misfits.items() if misfit is None), common[0])
    depth, misfit = width // HEAD_WIDTH, misfits[width]
    if depth > _MOST_BLOCKS:
        raise InputError(f"its layers are {width} wide, and the widest that are read are {_MOST_BLOCKS * HEAD_WIDTH}")
    if misfit is not None:
        raise InputError(f"{misfit} has size {list(sizes[misfit])}, which no SD3 model of width {width} has")
    return depth


def fitting_variants(sizes: Sizes) -> tuple[MMDiTVariant, ...]:
    """Returns the public models that have all these modules: shapes alone may leave two medium ones."""
    depth = depth_of(sizes)
    return tuple(
        name
        for name, model in PUBLIC_MODELS.items()
        if model.depth == depth
        and all(_fits(path, size, depth * HEAD_WIDTH, model.dual_blocks) for path, size in sizes.items())
    )


def _rows_of(side: str, layer: str) -> tuple[int, ...]:
    """Returns how many times its width a block's module may have as rows; the last context has a third of the rest."""
    if not layer.startswith("adaLN"):
        return (_ROWS[layer],)
    return (6, 9) if side == "x_block" else (6, 2)


def _fits(path: str, size: tuple[int, int], width: int, dual_blocks: int | None = None) -> bool:
    """Whether a model of this width has such a module; the first `dual_blocks` blocks have attn2, None: any may."""
    block, depth = native_block(path), width // HEAD_WIDTH
    if block is None:
        return path != "final_layer.adaLN_modulation.1" or size[0] in (0, 2 * width)
    index, (side, layer) = block[0], block[1].split(".", 1)
    last_context = side == "context_block" and index == depth - 1
    if index >= depth or (last_context and layer not in ("attn.qkv", "adaLN_modulation.1")):
        return False
    if layer.startswith("attn2") and dual_blocks is not None and index >= dual_blocks:
        return False
    allowed = _rows_of(side, layer)
    if layer.startswith("adaLN") and side == "context_block":
        allowed = allowed[-1:] if last_context else allowed[:1]
    elif layer.startswith("adaLN") and dual_blocks is not None:
        allowed = allowed[-1:] if index < dual_blocks else allowed[:1]
    return size[0] in (0, *(rows * width for rows in allowed))
