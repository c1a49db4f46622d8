"""What an addition touches: each is made in a copy of the package, as its author would, and used there.

The number of product files is what CONTRIBUTING promises; tests and documentation come on top.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sd3pipe"


@dataclass(frozen=True, kw_only=True)
class Addition:
    """`edits` has (file, text that stands there once, its replacement), a new file no such text.

    `use` fails where the addition is unknown.
    """

    edits: tuple[tuple[str, str, str], ...]
    most_files: int
    use: str


_LORA_FA = """
from dataclasses import dataclass
from typing import ClassVar

from sd3pipe.adapters.kind import AdapterLayer, LayerSetup, on_cpu
from sd3pipe.adapters.lora import LoRA, LoRADelta


class LoRAFA(LoRA):
    def __init__(self, setup: LayerSetup) -> None:
        super().__init__(setup)
        self.down.requires_grad_(False)

    def delta(self) -> "LoRAFADelta":
        return LoRAFADelta(down=on_cpu(self.down), up=on_cpu(self.up), alpha=self.setup.alpha)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoRAFADelta(LoRADelta):
    algorithm: ClassVar[str] = "lora-fa"
    title: ClassVar[str] = "LoRA-FA"
    layer_class: ClassVar[type[AdapterLayer]] = LoRAFA
"""
_GENERIC = '        yield "diffusion_model." + path, NativeModule("comfyui-generic", path)\n'
_PREFIXED = '        yield "model.diffusion_model." + path, NativeModule("prefixed", path)\n'
ADDITIONS = {
    "an option": Addition(
        edits=(
            (
                "rules/flow.py",
                "    min_timestep: int = rule(0, ",
                '    tilt: float = rule(0.0, "Added to each draw.", advanced=True)\n    min_timestep: int = rule(0, ',
            ),
            (
                "training/flow.py",
                "scheme_times(uniform_B.double(),",
                "scheme_times(uniform_B.double() + sampling.tilt,",
            ),
        ),
        most_files=3,
        use="""
from sd3pipe.params.train import TrainParams
params = TrainParams(model="m", text="t", latents="l", out="o", tilt=0.25)
assert params.noise.tilt == 0.25 and "tilt" in params.with_role("identity")
plain = TrainParams(model="m", text="t", latents="l", out="o")
tilted, untilted = (sample_sigmas(torch.tensor([0.5]), torch.ones(1), p.noise) for p in (params, plain))
assert tilted > untilted
""",
    ),
    "an optimizer": Addition(
        edits=(
            (
                "training/optimizers.py",
                '    "adam": "torch.optim.Adam",\n',
                '    "adam": "torch.optim.Adam",\n    "rprop": "torch.optim.Rprop",\n',
            ),
        ),
        most_files=1,
        use="""
from sd3pipe.training.optimizers import check_optimizer, make_optimizer
check_optimizer("rprop")
groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 1.0}]
assert isinstance(make_optimizer("rprop", groups, {}), torch.optim.Rprop)
""",
    ),
    "a weighting": Addition(
        edits=(
            ("words.py", '"cosmap", "sigma_sqrt"]', '"cosmap", "sigma_sqrt", "cubic"]'),
            (
                "training/flow.py",
                '        case "mode":  # eq. 20\n',
                '        case "cubic":\n            return uniform_B**3\n        case "mode":  # eq. 20\n',
            ),
        ),
        most_files=3,
        use="""
from sd3pipe.params.train import TrainParams
params = TrainParams(model="m", text="t", latents="l", out="o", weighting_scheme="cubic", training_shift=1.0)
assert sample_sigmas(torch.tensor([0.5]), torch.ones(1), params.noise).item() == 0.125
""",
    ),
    "an adapter kind": Addition(
        edits=(
            ("words.py", '"oftv2", "tlora"]', '"oftv2", "tlora", "lora-fa"]'),
            ("adapters/lora_fa.py", "", _LORA_FA),
            (
                "adapters/kinds.py",
                "from sd3pipe.adapters.targets",
                "from sd3pipe.adapters.lora_fa import LoRAFADelta\nfrom sd3pipe.adapters.targets",
            ),
            ("adapters/kinds.py", "OFTv2Delta, FullDelta,\n", "OFTv2Delta, FullDelta, LoRAFADelta,\n"),
        ),
        most_files=3,
        use="""
from sd3pipe.adapters.network import attach
from sd3pipe.models.architecture import MMDiTArchitecture
from sd3pipe.models.mmdit import MMDiT
from sd3pipe.params.train import TrainParams
from sd3pipe.training.adapter_options import adapter_spec
params = TrainParams(model="m", text="t", latents="l", out="o", adapter_type="lora-fa")
spec = adapter_spec(params.adapter, seed=0)
network = attach(MMDiT(MMDiTArchitecture(depth=1, pos_embed_max=4, qk_norm=True)), spec)
trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
assert trained and all(name.endswith("up") for name in trained)
assert {delta.algorithm for delta in network.deltas().values()} == {"lora-fa"}
""",
    ),
    "an export form": Addition(
        edits=(
            ("words.py", '"comfyui-generic", "diffusers"]', '"comfyui-generic", "diffusers", "prefixed"]'),
            (
                "adapters/keymap.py",
                _GENERIC,
                _GENERIC + _PREFIXED,
            ),
        ),
        most_files=3,
        use="""
from pathlib import Path
from sd3pipe.adapters.files import compare, read_adapter, save_adapter
from sd3pipe.adapters.lora import LoRADelta
from sd3pipe.commands.export import main
from sd3pipe.params.export import ExportParams
lora = LoRADelta(down=torch.randn(2, 64), up=torch.randn(64, 2), alpha=1.0)
save_adapter(Path("a.safetensors"), {"joint_blocks.0.x_block.attn.proj": lora})
main(ExportParams(adapter=Path("a.safetensors"), out=Path("b.safetensors"), format="prefixed", dtype="fp32"))
written = read_adapter(Path("b.safetensors"))
assert written.forms == ("prefixed",)
assert compare(read_adapter(Path("a.safetensors")).adapter, written.adapter)[0] == 0.0
""",
    ),
    "a model variant": Addition(
        edits=(
            (
                "words.py",
                'ToldVariant = Literal["sd35-large-turbo"]',
                'ToldVariant = Literal["sd35-large-turbo", "sd35-medium-turbo"]',
            ),
            (
                "diffusion/sampler.py",
                '    "sd35-large": SamplingSettings',
                '    "sd35-medium-turbo": SamplingSettings(steps=6, scale=1.0),\n    "sd35-large": SamplingSettings',
            ),
            (
                "project/recipes.py",
                '    "sd35-medium": {},\n',
                '    "sd35-medium": {},\n    "sd35-medium-turbo": {},\n',
            ),
        ),
        most_files=3,
        use="""
from sd3pipe.diffusion.sampler import DEFAULTS
from sd3pipe.params.init import InitParams
from sd3pipe.params.sample import SampleParams
assert DEFAULTS[SampleParams(model="m", prompts="p", out="o", variant="sd35-medium-turbo").variant].steps == 6
assert InitParams(variant="sd35-medium-turbo").variant == "sd35-medium-turbo"
""",
    ),
    "a picture format": Addition(
        edits=(
            ("data/folders.py", '    ".png", ".jpg"', '    ".tga", ".png", ".jpg"'),
            ("data/headers.py", '"PNG", "TIFF"', '"PNG", "TGA", "TIFF"'),
        ),
        most_files=3,
        use="""
import io
from PIL import Image
from sd3pipe.data.folders import PICTURE_ENDINGS
from sd3pipe.data.headers import read_header
data = io.BytesIO()
Image.new("RGB", (3, 2)).save(data, format="TGA")
assert ".tga" in PICTURE_ENDINGS and read_header(data.getvalue(), ".tga").width == 3
""",
    ),
}
_IMPORTS = "import torch\nfrom sd3pipe.training.flow import sample_sigmas\n"


def use(package: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    return subprocess.run(
        [sys.executable, "-c", _IMPORTS + code], env=environment, cwd=package.parent, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDITIONS)
def test_an_addition_touches_few_files(name, tmp_path):
    addition = ADDITIONS[name]
    copy = tmp_path / "sd3pipe"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "base"))
    assert use(copy, addition.use).returncode, "the unchanged package knows it already"
    for file, old, new in addition.edits:
        text = (copy / file).read_text(encoding="utf-8") if old else ""
        assert not old or text.count(old) == 1, f"{file} has {old!r} {text.count(old)} times"
        (copy / file).write_text(text.replace(old, new) if old else new, encoding="utf-8")
    done = use(copy, addition.use)
    assert done.returncode == 0, done.stderr
    assert len({file for file, _, _ in addition.edits}) <= addition.most_files
