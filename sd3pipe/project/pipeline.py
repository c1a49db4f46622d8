"""The text of dvc.yaml: four stages whose paths come from project.toml and whose parameters from stages/."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sd3pipe.params.bands import BAND_NAMES

ENCODERS = ("clip_l", "clip_g", "t5xxl")

_HEADER = """\
# `dvc repro` does what `sd3pipe run` does, and records what went in and came out. Paths stand in project.toml.
# Caches persist, so that an encode stage sees the rows it has; of a run, only final/ is an out.
vars:
  - project.toml
"""


def dvc_yaml(paths: Mapping[str, str], dataset_deps: Iterable[str], *, folder: Path) -> str:
    """Returns dvc.yaml for the [paths] of a project in `folder`; `dataset_deps` are the folders with pictures."""
    has_prompts = "sample_prompts" in paths
    text_deps = [
        *_existing(paths, "dataset", "sample_prompts"), *dataset_deps, *_weights(folder, paths, "model", *ENCODERS)
    ]  # fmt: skip
    latent_flags = _flags(paths, "model", "vae", "dataset")
    latent_deps = [*_existing(paths, "dataset"), *dataset_deps, *_weights(folder, paths, "model", "vae")]
    stages = {
        "encode_text": _stage(
            [_encode_text(paths, "--dataset", "dataset", "text")]
            + ([_encode_text(paths, "--sample-prompts", "sample_prompts", "prompts")] if has_prompts else []),
            text_deps,
            "stages/encode_text.toml",
            ["${paths.caches}/text", *(["${paths.caches}/prompts"] if has_prompts else [])],
            persist=True,
        ),
        "encode_latents": _stage(
            [f"sd3pipe encode-latents {latent_flags} --out ${{paths.caches}}/latents"],
            latent_deps,
            "stages/encode_latents.toml",
            ["${paths.caches}/latents"],
            persist=True,
        ),
        "train": _stage(
            [_train(paths)],
            [*_weights(folder, paths, "model"), "${paths.caches}/text", "${paths.caches}/latents"],
            "stages/train.toml",
            ["${paths.run}/final"],
            persist=False,
        ),
        "export": _stage(
            [f"sd3pipe export --adapter ${{paths.run}}/final {_flags(paths, 'model')} --out ${{paths.export}}"],
            [*_weights(folder, paths, "model"), "${paths.run}/final"],
            "stages/export.toml",
            ["${paths.export}"],
            persist=False,
        ),
    }
    body = "\n".join(f"  {name}:\n{text}" for name, text in stages.items())
    return f"{_HEADER}\nstages:\n{body}\n{_RECORDS}"


_RECORDS = f"""
metrics:
  - ${{paths.run}}/metrics.json

plots:
  - loss:
      x: step
      y:
        ${{paths.run}}/plots/loss.csv: [loss, loss_mean]
  - validation:
      x: step
      y:
        ${{paths.run}}/plots/validation.csv: [loss, {", ".join(f"bands/{name}" for name in BAND_NAMES)}]
  - learning_rate:
      x: step
      y:
        ${{paths.run}}/plots/loss.csv: learning_rate
"""


def _encode_text(paths: Mapping[str, str], flag: str, key: str, cache: str) -> str:
    encoders = _flags(paths, "model", *ENCODERS, "tokenizers")
    return f"sd3pipe encode-text {encoders} {flag} ${{paths.{key}}} --out ${{paths.caches}}/{cache}"


def _train(paths: Mapping[str, str]) -> str:
    caches = "--text ${paths.caches}/text --latents ${paths.caches}/latents"
    prompts = " --prompts ${paths.caches}/prompts" if "sample_prompts" in paths else ""
    rest = _flags(paths, "loras_dir")
    return f"sd3pipe train {_flags(paths, 'model', 'vae')} {caches}{prompts} --out ${{paths.run}} {rest}".rstrip()


def _flags(paths: Mapping[str, str], *keys: str) -> str:
    return " ".join(f"--{key.replace('_', '-')} ${{paths.{key}}}" for key in keys if key in paths)


def _existing(paths: Mapping[str, str], *keys: str) -> list[str]:
    return [f"${{paths.{key}}}" for key in keys if key in paths]


def _weights(folder: Path, paths: Mapping[str, str], *keys: str) -> list[str]:
    """Returns the weight files as deps; a hub id is no file, and is pinned by its cache's fingerprints instead."""
    return [f"${{paths.{key}}}" for key in keys if key in paths and (folder / paths[key]).exists()]


def _stage(commands: list[str], deps: Iterable[str], params: str, outs: list[str], *, persist: bool) -> str:
    lines = ["    cmd:", *(f"      - {command}" for command in commands)]
    lines += ["    deps:", *(f"      - {dep}" for dep in deps)]
    lines += ["    params:", f"      - {params}:"]
    lines += ["    outs:"]
    for out in outs:
        lines += [f"      - {out}:", "          persist: true"] if persist else [f"      - {out}"]
    return "\n".join(lines)
