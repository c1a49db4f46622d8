"""The model card of a published adapter: a README with the YAML that the Hugging Face hub reads, and what people ask.

What the YAML's keys mean: huggingface.co/docs/hub/model-cards. Everything comes from what may be published.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sd3pipe.adapters.metadata import PROVENANCE_KEY, described_variant, read_provenance
from sd3pipe.console import one_line
from sd3pipe.exporting.hub_folder import PICTURES, WEIGHTS, SamplePictures, picture_name
from sd3pipe.exporting.published import model_name
from sd3pipe.exporting.reproduction import later_steps, reproduction
from sd3pipe.variants import PUBLIC_MODELS

_LICENSE_OF_BASES = "stabilityai-ai-community"
_LICENSES = {  # the hub's words for those that people give; others are "other" with a name
    "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "openrail", "openrail++", "creativeml-openrail-m", "gpl-3.0", "agpl-3.0",
    "unlicense", "wtfpl", "unknown",
}  # fmt: skip
_TAGS = ("text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion", "sd3pipe")
_DETAILS = {  # what sd-scripts calls it -> what people do
    "network_module": "adapter", "network_dim": "rank", "network_alpha": "alpha", "network_args": "more of the adapter",
    "steps": "steps", "epoch": "epochs", "num_train_images": "pictures in an epoch", "resolution": "largest bucket",
    "learning_rate": "learning rate", "lr_scheduler": "schedule", "lr_warmup_steps": "warm-up",
    "optimizer": "optimizer",
    "max_grad_norm": "largest gradient norm", "gradient_accumulation_steps": "accumulation",
    "mixed_precision": "precision", "weighting_scheme": "weighting", "training_shift": "shift", "loss_type": "loss",
    "t5xxl_max_token_length": "T5 tokens", "seed": "seed",
}  # fmt: skip
_USAGE = """## Use it with diffusers

```python
import torch
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16)
pipeline.load_lora_weights(".", weight_name="{weights}")  # or this repository's name instead of "."
picture = pipeline({prompt}).images[0]
```"""


def card_text(keys: Mapping[str, str], *, hub_id: str | None, samples: SamplePictures) -> str:
    """Returns the card of an adapter from metadata that may be published.

    `hub_id` is the base's repository where the user named one, else that of the model's makers stands there.
    """
    variant = described_variant(keys)
    base = hub_id or (PUBLIC_MODELS[variant].repository if variant else None)
    words = {name.removeprefix("modelspec."): one_line(text) for name, text in keys.items()}
    title = words.get("title") or words.get("trigger_phrase") or "LoRA"
    prompt = words.get("trigger_phrase") or "a photograph"
    parts = [
        f"---\n{_data(words, base, samples).to_yaml()}\n---",
        f"# {title}",
        words.get("description") or f"A LoRA for {model_name(keys)}.",
        *(["<Gallery />", f"Drawn after {samples.step} steps of training."] if samples.files else []),
        *([f"## Trigger\n\n`{words['trigger_phrase']}` in the prompt."] if words.get("trigger_phrase") else []),
        *([words["usage_hint"]] if words.get("usage_hint") else []),
        *([_USAGE.format(base=base, weights=WEIGHTS, prompt=repr(prompt))] if base else []),
        *_training(keys),
    ]
    return "\n\n".join(parts) + "\n"


def _data(words: Mapping[str, str], base: str | None, samples: SamplePictures) -> ModelCardData:
    own = [tag.strip() for tag in words.get("tags", "").split(",") if tag.strip()]
    more: dict[str, Any] = {
        **_license(words.get("license"), base),
        "base_model_relation": "adapter" if base else None,
        "instance_prompt": words.get("trigger_phrase"),
        "widget": [
            {"text": prompt, "output": {"url": f"{PICTURES}/{picture_name(number)}"}}
            for number, prompt in enumerate(samples.prompts)
        ]
        or None,
    }
    return ModelCardData(
        base_model=base,
        tags=list(dict.fromkeys([*_TAGS, *own])),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        **more,
    )


def _license(given: str | None, base: str | None) -> dict[str, str]:
    """Returns the licence that the user names, else the base's, which what is made from it comes under."""
    if given is None:
        if all(base != model.repository for model in PUBLIC_MODELS.values()):
            return {}
        link = f"https://huggingface.co/{base}/blob/main/LICENSE.md"
        return {"license": "other", "license_name": _LICENSE_OF_BASES, "license_link": link}
    if given.lower() in _LICENSES:
        return {"license": given.lower()}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", given.lower()).strip("-") or "other"}


def _training(keys: Mapping[str, str]) -> list[str]:
    said = {label: keys[f"ss_{name}"] for name, label in _DETAILS.items() if keys.get(f"ss_{name}", "{}") != "{}"}
    cells = {label: one_line(value).replace("|", "\\|") for label, value in said.items()}
    rows = [f"| {label} | {cell} |" for label, cell in cells.items()]
    parts = ["\n".join(["## Training", "", "| | |", "|---|---|", *rows])] if rows else []
    if PROVENANCE_KEY not in keys:
        return parts
    commands = reproduction(read_provenance(keys, Path()), later_steps(keys))
    return [*parts, "\n".join(["## Made with", "", "```sh", *map(one_line, commands), "```"])]
