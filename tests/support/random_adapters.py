"""Random adapters for tests: every factor non-zero, alpha unlike the rank, of any kind."""

import torch

from sd3pipe.adapters.dora import DoRADelta
from sd3pipe.adapters.full import FullDelta
from sd3pipe.adapters.kind import Delta
from sd3pipe.adapters.loha import LoHaDelta
from sd3pipe.adapters.lokr import LoKrDelta
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.adapters.oft import OFTDelta
from sd3pipe.adapters.oftv2 import OFTv2Delta
from sd3pipe.adapters.tlora import TLoRADelta
from sd3pipe.adapters.weights import block_width, lokr_shapes
from sd3pipe.models.architecture import MMDiTArchitecture

RANKS = (2, 3, 5)  # by turns, so that neighbours differ


def random_adapter(
    architecture: MMDiTArchitecture, kind: str = "lora", *, every: int = 1, seed: int = 0, embedders: bool = True
) -> dict[str, Delta]:
    """An adapter on every n-th linear layer."""
    sizes = architecture.linear_sizes()
    if not embedders:
        sizes = {path: size for path, size in sizes.items() if path.startswith("joint_blocks")}
    generator = torch.Generator().manual_seed(seed)
    chosen = list(sizes.items())[::every]
    return {
        path: random_delta(kind, size, rank=RANKS[number % 3], alpha=1.5, generator=generator)
        for number, (path, size) in enumerate(chosen)
    }


def random_delta(kind: str, size: tuple[int, int], *, rank: int, alpha: float, generator: torch.Generator) -> Delta:
    rows, columns = size

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    match kind:
        case "lora":
            return LoRADelta(down=draw(rank, columns), up=draw(rows, rank), alpha=alpha)
        case "dora":
            direction = LoRADelta(down=draw(rank, columns), up=draw(rows, rank), alpha=alpha)
            return DoRADelta(direction=direction, magnitude=1 + 0.1 * draw(rows))
        case "loha":
            return LoHaDelta(
                w1_a=draw(rows, rank), w1_b=draw(rank, columns), w2_a=draw(rows, rank), w2_b=draw(rank, columns),
                alpha=alpha,
            )  # fmt: skip
        case "dora over loha" | "dora over lokr":
            direction = random_delta(kind.removeprefix("dora over "), size, rank=rank, alpha=alpha, generator=generator)
            return DoRADelta(direction=direction, magnitude=1 + 0.1 * draw(rows))
        case "dora of columns":
            direction = LoRADelta(down=draw(rank, columns), up=draw(rows, rank), alpha=alpha)
            return DoRADelta(direction=direction, magnitude=1 + 0.1 * draw(1, columns))
        case "full":
            return FullDelta(diff=0.3 * draw(rows, columns), bias=draw(rows))
        case "oft":
            width = block_width(rows // 3 if rows % 3 == 0 else rows, 2 * rank)
            return OFTDelta(blocks=0.3 * draw(rows // width, width, width), alpha=alpha)
        case "oftv2" | "exact oftv2":
            width = block_width(columns, 2 * rank)
            upper = 0.3 * draw(columns // width, width * (width - 1) // 2)
            return OFTv2Delta(upper=upper, exact=kind.startswith("exact"))
        case "tlora":
            return TLoRADelta(down=draw(rank, columns), up=draw(rows, rank), alpha=alpha, min_rank=2)
        case "lokr":
            shapes = lokr_shapes(rows, columns, rank, 4)
            drawn = {name: draw(*shape) for name, shape in shapes.items()}
            w2 = tuple(drawn[name] for name in ("w2", "w2_a", "w2_b") if name in drawn)
            return LoKrDelta(w1=(drawn["w1"],), w2=w2, alpha=alpha)
    raise AssertionError(kind)
