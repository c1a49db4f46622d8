"""What a quantised base does to a LoRA that is trained on it, against the same training on a bf16 base.

    python benchmarks/quantised_bases.py [--model FILE] [--steps 40]

On the CPU, with a small model: the given checkpoint, or random weights in SD3.5-medium's layout. The same LoRA is
trained to move the model's velocity towards that of a second, disturbed model, from the same start on the same inputs,
in float32 and bf16 and on bf16 with each packed format. Printed per format: the relative error of the packed weights
and of the velocity, the loss at the end, the cosine between the trained change B A and that of the bf16 run, and the
bytes of a block. The float32 line shows how far bf16 alone moves these figures.
"""

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sd3pipe.adapters.network import AdapterNetwork, attach
from sd3pipe.adapters.targets import AdapterSpec
from sd3pipe.memory.quantise import packable_linears, quantise
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.checkpoint import load_mmdit
from sd3pipe.models.mmdit import MMDiT

FORMATS = ("float32", "bf16", "fp8", "int8", "nf4")
ARCHITECTURE = MMDiTArchitecture(
    depth=4, pos_embed_max=16, qk_norm=True, dual_attention_blocks=(0, 1), pooled_width=64, context_width=128
)
BATCH, SIDE, TOKENS, RANK = 2, 8, 16, 8
DISTURBANCE = 0.05  # of each weight of the model whose velocity is learnt


@dataclass(frozen=True, kw_only=True)
class Result:
    weight_error: float
    velocity_error: float
    loss: float
    change: Tensor
    block_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="a small checkpoint; default: random weights")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    base = load_mmdit(arguments.model) if arguments.model else random_model(ARCHITECTURE)
    targets = _velocities(_disturbed(base), arguments.steps)
    results = {name: _trained(base, name, targets) for name in FORMATS}
    reference = results["bf16"].change
    print(f"{'base':<8} {'weights':>8} {'velocity':>9} {'loss':>10} {'cosine to bf16':>15} {'block':>10}")
    for name, result in results.items():
        cosine = nn.functional.cosine_similarity(result.change, reference, dim=0)
        print(
            f"{name:<8} {result.weight_error:8.2%} {result.velocity_error:9.2%} {result.loss:10.6f} "
            f"{cosine:15.4f} {result.block_bytes / 1e6:7.2f} MB"
        )


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
    inputs = _inputs(base.architecture, 7)
    with torch.no_grad():
        exact = base(**inputs)
        velocity_error = ((model(**inputs) - exact).norm() / exact.norm()).item()
    network = attach(model, AdapterSpec(rank=RANK))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for step, target in enumerate(targets):
        loss = (model(**_inputs(base.architecture, 100 + step)).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    last = losses[-10:]
    return Result(
        weight_error=_weight_error(base, model),
        velocity_error=velocity_error,
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
