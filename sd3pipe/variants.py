"""The public models: what each is called where, and the numbers that its adapters are known by. Free of torch."""

from dataclasses import dataclass

from sd3pipe.words import MMDiTVariant

HEAD_WIDTH = 64  # of every attention, in models and in text encoders; an MMDiT has one block for each 64 of width


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicModel:
    """A model of Stability AI that can be had. `repository` is the one on the hub that diffusers loads."""

    title: str
    architecture: str  # modelspec's word
    kohya_version: str  # sd-scripts' ss_base_model_version
    repository: str
    depth: int
    dual_blocks: int = 0  # the first so many have a second attention


PUBLIC_MODELS: dict[MMDiTVariant, PublicModel] = {
    "sd3-medium": PublicModel(
        title="Stable Diffusion 3 Medium",
        architecture="stable-diffusion-3-medium",
        kohya_version="medium",
        repository="stabilityai/stable-diffusion-3-medium-diffusers",
        depth=24,
    ),
    "sd35-medium": PublicModel(
        title="Stable Diffusion 3.5 Medium",
        architecture="stable-diffusion-3-5-medium",
        kohya_version="5-medium",
        repository="stabilityai/stable-diffusion-3.5-medium",
        depth=24,
        dual_blocks=13,
    ),
    "sd35-large": PublicModel(
        title="Stable Diffusion 3.5 Large",
        architecture="stable-diffusion-3-5-large",
        kohya_version="5-large",
        repository="stabilityai/stable-diffusion-3.5-large",
        depth=38,
    ),
}
