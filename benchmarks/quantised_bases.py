"""What a quantised base does to a LoRA that is trained on it, against the same training on a bf16 base.

    python benchmarks/quantised_bases.py [--model FILE] [--steps 40] [--outliers 50] [--formats bf16 int8 ...]

On the CPU, with a small model: the given checkpoint, or random weights in SD3.5-medium's layout. The same LoRA is
trained to move the model's velocity towards that of a second, disturbed model, from the same start on the same inputs,
in float32 and bf16 and on bf16 with each packed format, and with products in eight bits (x8: --matmul-dtype; x8r: with
rotation). Printed per format: the relative error of the packed weights and of the velocity, the cosine of the adapter's
first gradient with the float32 one, the loss at the end, the cosine between the trained change B A and that of the bf16
run, and the bytes of a block. --outliers makes two channels in each normed stream so many times larger, and their
weights smaller, which leaves the exact model as it is: such channels are what large models are known for. The
float32 line shows how far bf16 alone moves these figures.
"""

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sd3pipe.adapters.network import AdapterNetwork, attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.memory.eight_bit import EightBitProducts
from sd3pipe.memory.quantise import packable_linears, quantise, quantise_as
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.models.mmdit import MMDiT

EIGHT_BITS = {
    f"{format}-x8{'r' * rotated}": (format, rotated) for format in ("int8", "fp8") for rotated in (False, True)
}
FORMATS = ("float32", "bf16", "fp8", "int8", "nf4", *EIGHT_BITS)
ARCHITECTURE = MMDiTArchitecture(
    depth=4, pos_embed_max=16, qk_norm=True, dual_attention_blocks=(0, 1), pooled_width=64, context_width=128
)
BATCH, SIDE, TOKENS, RANK = 2, 8, 16, 8
DISTURBANCE = 0.05  # of each weight of the model whose velocity is learnt


@dataclass(frozen=True, kw_only=True)
class Result:
    weight_error: float
    velocity_error: float
    gradient: Tensor
    loss: float
    change: Tensor
    block_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a small checkpoint; default: random weights")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--outliers", type=float, default=1.0, help="how much larger two channels of each stream are")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    arguments = parser.parse_args()
    base = load_mmdit(arguments.model) if arguments.model else random_model(ARCHITECTURE)
    if arguments.outliers != 1:
        make_outliers(base, arguments.outliers)
    targets = _velocities(_disturbed(base), arguments.steps)
    results = {}
    print(f"{'base':<9} {'weights':>8} {'velocity':>9} {'gradient':>9} {'loss':>10} {'trained':>8} {'block':>10}")
    for name in dict.fromkeys(("float32", "bf16", *arguments.formats)):
        result = results[name] = _trained(base, name, targets)
        trained, gradient = (
            nn.functional.cosine_similarity(getattr(result, part), getattr(results[other], part), dim=0)
            for part, other in (("change", "bf16" if "bf16" in results else name), ("gradient", "float32"))
        )
        print(
            f"{name:<9} {result.weight_error:8.2%} {result.velocity_error:9.2%} {gradient:9.4f} {result.loss:10.6f} "
            f"{trained:8.4f} {result.block_bytes / 1e6:7.2f} MB",
            flush=True,
        )


@torch.no_grad()
def make_outliers(model: MMDiT, factor: float, channels: tuple[int, ...] = (5, 77)) -> None:
    """Makes channels of each normed stream larger and the weights that read them smaller: the same function."""
    width = model.architecture.width
    for block in model.joint_blocks:
        for side in (block.context_block, block.x_block):
            readers = {0: side.attn.qkv, 3: side.mlp.fc1 if side.mlp else None}  # by the place of their shift
            readers[6] = side.attn2.qkv if side.attn2 else None
            for place, reader in readers.items():
                if reader is None:
                    continue
                modulation, columns = side.adaLN_modulation[1], torch.tensor(channels)
                for part, is_scale in ((place, False), (place + 1, True)):
                    rows = part * width + columns
                    modulation.weight[rows] *= factor
                    modulation.bias[rows] = factor * modulation.bias[rows] + (factor - 1) * is_scale  # 1 + scale
                reader.weight[:, columns] /= factor


def random_model(architecture: MMDiTArchitecture) -> MMDiT:
    """Returns a model whose weights are normal, scaled to keep the size of what passes through."""
    generator = torch.Generator().manual_seed(0)
    model = MMDiT(architecture)
    for name, tensor in model.state_dict().items():
        scale = 0.1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        noise = scale * torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + noise if ".ln_" in name else noise)
    return model


def _inputs(architecture: MMDiTArchitecture, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "latents_BChw": draw(BATCH, 16, SIDE, SIDE),
        "timesteps_B": 1000 * torch.rand(BATCH, generator=generator),
        "context_BLD": draw(BATCH, TOKENS, architecture.context_width),
        "pooled_BP": draw(BATCH, architecture.pooled_width),
    }


def _disturbed(base: MMDiT) -> MMDiT:
    generator = torch.Generator().manual_seed(1)
    other = copy.deepcopy(base)
    for layer in packable_linears(other):
        noise = torch.randn(layer.weight.shape, generator=generator)
        layer.weight.add_(DISTURBANCE * layer.weight.std() * noise)
    return other


@torch.no_grad()
def _velocities(model: MMDiT, steps: int) -> list[Tensor]:
    return [model(**_inputs(model.architecture, 100 + step)) for step in range(steps)]


def _trained(base: MMDiT, name: str, targets: list[Tensor]) -> Result:
    model = copy.deepcopy(base).to(torch.float32 if name == "float32" else torch.bfloat16)
    if name in ("fp8", "int8", "nf4"):
        quantise(model, name)
    if name in EIGHT_BITS:
        format, rotated = EIGHT_BITS[name]
        quantise_as(model, EightBitProducts(format, rotated=rotated, device=torch.device("cpu")))
    inputs = _inputs(base.architecture, 7)
    with torch.no_grad():
        exact = base(**inputs)
        velocity_error = ((model(**inputs) - exact).norm() / exact.norm()).item()
    network = attach(model, AdapterSpec(rank=RANK))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses: list[float] = []
    gradient = torch.empty(0)
    for step, target in enumerate(targets):
        loss = (model(**_inputs(base.architecture, 100 + step)).float() - target).square().mean()
        loss.backward()
        if not step:  # up is zero there, so its gradient is the one that is not
            ups = [parameter for name, parameter in network.named_parameters() if name.endswith(".up")]
            gradient = torch.cat([up.grad.double().flatten() for up in ups])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-10:]
    return Result(
        weight_error=_weight_error(base, model),
        velocity_error=velocity_error,
        gradient=gradient,
        loss=sum(last) / len(last),
        change=_change(network),
        block_bytes=sum(p.numel() * p.element_size() for p in model.joint_blocks[0].parameters()),
    )


def _weight_error(base: MMDiT, model: MMDiT) -> float:
    exact = {name: layer.dense_weight() for name, layer in base.linears() if name.startswith("joint_blocks")}
    found = {name: layer.dense_weight(torch.float32) for name, layer in model.linears() if name in exact}
    packed = [name for name in exact if ".adaLN_modulation." not in name]
    wrong = sum((found[name] - exact[name]).square().sum() for name in packed)
    return (wrong / sum(exact[name].square().sum() for name in packed)).sqrt().item()


def _change(network: AdapterNetwork) -> Tensor:
    """Returns the trained change of all weights in one row."""
    return torch.cat([(layer.up @ layer.down).detach().double().flatten() for layer in network.layers.values()])


if __name__ == "__main__":
    main()
