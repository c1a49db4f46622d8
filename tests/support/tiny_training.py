"""A tiny base and two small caches of random rows, made in a moment, and runs of `train` on them in this process."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sd3pipe.cache.keys import latents_source, text_source
from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.store import fill_cache
from sd3pipe.cache.tensors import from_torch
from sd3pipe.cache.wanted import Wanted
from sd3pipe.commands.train import main
from sd3pipe.params.train import TrainParams
from sd3pipe.rules.flow import SigmaSampling
from sd3pipe.training.batches import MicroBatch, epoch_batches
from sd3pipe.training.feed import Feed, FeedRules
from sd3pipe.training.training_data import open_data
from support.tiny_mmdit import CONTEXT_WIDTH, random_weights, tiny_architecture

CLIP_WIDTHS = (24, 40)
POOLED_WIDTHS = (16, 24)  # together the tiny MMDiT's pooled width
CLIP_TOKENS = 5
SUBSET = {
    "dataset": 0,
    "num_repeats": 1,
    "is_reg": False,
    "prior_loss_weight": None,
    "loss_weight": 1.0,
    "caption_dropout_rate": 0.0,
    "caption_dropout_every_n_epochs": 0,
    "diff_output_preservation": False,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What one picture of the fake dataset is like."""

    name: str
    subset: str = "photos"
    size: tuple[int, int] = (8, 8)  # h, w of the latents
    split: str = "train"
    captions: tuple[str, ...] = ()
    tokens: int = 6  # T5 tokens of its captions
    flips: bool = False
    crops: int = 1
    masked: bool = False
    plain: bool = False  # one colour all over

    @property
    def image_hash(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Inputs:
    folder: Path
    model: Path
    text: Path
    latents: Path
    defaults: dict[str, Any] = field(default_factory=dict)

    def params(self, out: str | Path, **options: Any) -> TrainParams:
        """Returns options of a quick run; `out` is a name below runs/ or a path."""
        values = {
            "model": str(self.model),
            "text": self.text,
            "latents": self.latents,
            "out": self.folder / "runs" / out,
            "threads": 1,
            "device": "cpu",
            "network_dim": 2,
            "learning_rate": 1e-2,
            "lr_warmup_steps": 0.0,
            "max_train_steps": 4,
            "save_every_n_steps": 2,
            **self.defaults,
            **options,
        }
        return TrainParams(**values)

    def train(self, out: str | Path, **options: Any) -> "Run":
        """Trains in this process."""
        params = self.params(out, **options)
        main(params)
        return Run(params.out)


@dataclass(frozen=True)
class Run:
    folder: Path

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step-{step:08d}"

    def steps(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.folder / "checkpoints").glob("step-????????"))

    def adapter(self, step: int | None = None) -> dict[str, torch.Tensor]:
        folder = self.folder / "final" if step is None else self.checkpoint(step)
        return load_file(folder / "adapter.safetensors")

    def optimizer(self, step: int) -> dict[str, torch.Tensor]:
        return load_file(self.checkpoint(step) / "optimizer.safetensors")

    def state(self, step: int) -> dict[str, Any]:
        return json.loads((self.checkpoint(step) / "state.json").read_text())

    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())

    def records(self, kind: str = "step") -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def samples(self) -> list[list[Any]]:
        return [record["samples"] for record in self.records()]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.records()]


def pictures(count: int, **common: Any) -> list[Picture]:
    """Returns pictures of two shapes with a caption each."""
    sizes = ((8, 8), (8, 12))
    return [
        Picture(name=f"{number:03d}.png", **{"size": sizes[number % 2], "captions": (f"picture {number}",), **common})
        for number in range(count)
    ]


def make_inputs(
    folder: Path,
    dataset: Sequence[Picture],
    *,
    variant: str = "sd35-medium",
    depth: int = 2,
    subsets: dict[str, dict[str, Any]] | None = None,
    vae: str = "vae-1",
    latent_tensor: str = "moments",
    encoded_by: str | None = None,
    **defaults: Any,
) -> Inputs:
    """Writes a random base and both caches below `folder`; latents may be marked as encoded by another program."""
    model = folder / f"{variant}.safetensors"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        weights = random_weights(tiny_architecture(variant, depth), seed=3)
        save_file({f"model.diffusion_model.{key}": tensor for key, tensor in weights.items()}, model)
    rules = {picture.subset: SUBSET | (subsets or {}).get(picture.subset, {}) for picture in dataset}
    _fill_text(folder / "caches" / "text", dataset, rules)
    _fill_latents(folder / "caches" / "latents", dataset, rules, vae, latent_tensor, encoded_by)
    return Inputs(
        folder=folder,
        model=model,
        text=folder / "caches" / "text",
        latents=folder / "caches" / "latents",
        defaults=defaults,
    )


def fill_prompts(
    out: Path,
    settings: Sequence[dict[str, Any]],
    *,
    tokens: int = 6,
    recipe: dict[str, Any] | None = None,
    clip_l: str = "l",
    first_name: str = "000",
) -> Path:
    """Writes a cache of sample prompts, one for each of the settings."""
    texts = [*(f"prompt {number}" for number in range(len(settings))), ""]
    recipe = recipe or {"tiny": 1}
    rows = [WantedRow(source=text_source(text), recipe=recipe, group="text", nbytes=4096) for text in texts]
    samples = {
        "name": [first_name, *(f"{number:03d}" for number in range(1, len(settings)))],
        "prompt": texts[:-1],
        "negative": ["" for _ in settings],
        "settings": [json.dumps(values) for values in settings],
        "key": range(len(settings)),
        "negative_key": [len(settings) for _ in settings],
    }
    wanted = Wanted(
        kind="prompts", recipe_version=1, fingerprints={"clip_l": clip_l}, recipe=recipe, rows=rows, samples=samples
    )
    by_key = dict(zip(wanted.keys, texts, strict=True))

    def encode(wanted_keys: Sequence[str]):
        for key in wanted_keys:
            yield key, {name: from_torch(tensor) for name, tensor in text_row(by_key[key], tokens).items()}

    fill_cache(out, wanted, encode, made_with="tiny 1")
    return out


def make_feed(inputs: Inputs, **rules: Any) -> Feed:
    """Returns what makes batches of the rows to train on."""
    data = open_data(inputs.params("none"))
    return Feed(data.train, data.latents, data.text, FeedRules(**{"seed": 42, "sampling": SigmaSampling(), **rules}))


def plans(feed: Feed, epochs: range, batch_size: int = 6) -> list[MicroBatch]:
    """Returns the batches of some epochs."""
    return [p for e in epochs for p in epoch_batches(feed.items, seed=42, epoch=e, batch_size=batch_size)]


def with_other_vae(inputs: Inputs, folder: Path, dataset: Sequence[Picture]) -> Inputs:
    """Returns inputs whose latents come from another VAE."""
    return replace(inputs, latents=make_inputs(folder, dataset, vae="vae-2").latents)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two files' tensors are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _random(*shape: int, key: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _fill_text(out: Path, dataset: Sequence[Picture], rules: dict[str, dict[str, Any]]) -> None:
    uses = [(picture, variant, text) for picture in dataset for variant, text in enumerate(picture.captions)]
    tokens = {text: picture.tokens for picture, _, text in uses} | {"": max(picture.tokens for picture in dataset)}
    texts = list(tokens)
    rows = [WantedRow(source=text_source(text), recipe={"tiny": 1}, group="text", nbytes=4096) for text in texts]
    samples = {
        "name": [picture.name for picture, _, _ in uses],
        "subset": [picture.subset for picture, _, _ in uses],
        "image_hash": [picture.image_hash for picture, _, _ in uses],
        "caption_hash": [text_source(text) for _, _, text in uses],
        "variant": [variant for _, variant, _ in uses],
        "key": [texts.index(text) for _, _, text in uses],
    }
    wanted = Wanted(
        kind="text",
        recipe_version=1,
        fingerprints={"clip_l": "l", "clip_g": "g", "t5xxl": "t5"},
        recipe={"tiny": 1},
        rows=rows,
        samples=samples,
        subsets=rules,
        named_rows={"empty_caption": texts.index("")},
        tags={name: {"tiny": 1} for name in rules},
    )
    by_key = dict(zip(wanted.keys, texts, strict=True))

    def encode(wanted_keys: Sequence[str]):
        for key in wanted_keys:
            text = by_key[key]
            yield key, {name: from_torch(tensor) for name, tensor in text_row(text, tokens[text]).items()}

    fill_cache(out, wanted, encode, made_with="tiny 1")


def text_row(text: str, tokens: int, context_width: int = CONTEXT_WIDTH) -> dict[str, torch.Tensor]:
    """Returns the tensors of a caption's row."""
    return {
        "clip_l": _random(CLIP_TOKENS, CLIP_WIDTHS[0], key=f"l {text}"),
        "clip_g": _random(CLIP_TOKENS, CLIP_WIDTHS[1], key=f"g {text}"),
        "t5xxl": _random(tokens, context_width, key=f"t5 {text}"),
        "pooled_l": _random(POOLED_WIDTHS[0], key=f"pl {text}"),
        "pooled_g": _random(POOLED_WIDTHS[1], key=f"pg {text}"),
        "mask_t5": torch.ones(tokens, dtype=torch.uint8),
    }


def _fill_latents(
    out: Path,
    dataset: Sequence[Picture],
    rules: dict[str, dict[str, Any]],
    vae: str,
    latent_tensor: str,
    encoded_by: str | None,
) -> None:
    origin = {"imported_from": encoded_by} if encoded_by else {}
    uses = [
        (picture, crop, flip)
        for picture in dataset
        for crop in range(picture.crops)
        for flip in range(1 + picture.flips)
    ]
    recipe = {"tiny": 1, **origin}
    rows = [
        WantedRow(
            source=latents_source(picture.image_hash),
            recipe={**recipe, "crop": crop, "flip": flip, "size": list(picture.size), "tensor": latent_tensor},
            group=f"{8 * picture.size[0]}x{8 * picture.size[1]}",
            nbytes=1 << 16,
        )
        for picture, crop, flip in uses
    ]
    samples = {
        "name": [picture.name for picture, _, _ in uses],
        "subset": [picture.subset for picture, _, _ in uses],
        "image_hash": [picture.image_hash for picture, _, _ in uses],
        "bucket_h": [8 * picture.size[0] for picture, _, _ in uses],
        "bucket_w": [8 * picture.size[1] for picture, _, _ in uses],
        "crop": [crop for _, crop, _ in uses],
        "flip": [flip for _, _, flip in uses],
        "original_h": [512 for _ in uses],
        "original_w": [512 for _ in uses],
        "split": [picture.split for picture, _, _ in uses],
        "key": range(len(uses)),
    }
    wanted = Wanted(
        kind="latents",
        recipe_version=1,
        fingerprints={"vae": vae},
        recipe=recipe,
        rows=rows,
        samples=samples,
        subsets=rules,
    )
    by_key = dict(zip(wanted.keys, uses, strict=True))

    def encode(wanted_keys: Sequence[str]):
        for key in wanted_keys:
            picture, crop, flip = by_key[key]
            yield key, {name: from_torch(t) for name, t in _latent_row(picture, crop, flip, vae, latent_tensor).items()}

    fill_cache(out, wanted, encode, made_with="tiny 1")


def _latent_row(picture: Picture, crop: int, flip: int, vae: str, latent_tensor: str) -> dict[str, torch.Tensor]:
    height, width = picture.size
    mean = _random(16, height, width, key=f"{picture.name} {crop} {vae}")
    mean = mean[:, :1, :1].expand(16, height, width) if picture.plain else mean
    mean = mean.flip(-1) if flip else mean
    moments = torch.cat([mean, torch.full((16, height, width), -4.0)])
    row = {latent_tensor: moments if latent_tensor == "moments" else mean}
    if picture.masked:
        row["mask"] = (torch.arange(width) < width // 2).float().expand(height, width).contiguous()
    return row
