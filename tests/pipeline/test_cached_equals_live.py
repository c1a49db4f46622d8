"""The first step from caches has the loss of one with VAE and text encoders at hand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.text_encoding import encode
from support.tiny_base import write_tiny_base

from sd3pipe.commands import encode_latents, encode_text, train
from sd3pipe.diffusion.draws import normals
from sd3pipe.models.checkpoint import load_mmdit, load_vae
from sd3pipe.models.conditioning import assemble_conditioning
from sd3pipe.models.vae import to_model_space
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.params.train import TrainParams
from sd3pipe.rules.flow import SigmaSampling
from sd3pipe.training import flow
from sd3pipe.training.batches import epoch_batches
from sd3pipe.training.feed import Feed, FeedRules
from sd3pipe.training.training_data import open_data

CAPTION, SIDE, SEED = "a grey wall in the rain", 64, 42
DATASET = '[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = "{folder}"\n'


def test_the_first_loss_from_caches_is_that_of_live_encoders(tmp_path):
    base = write_tiny_base(tmp_path / "base", layout="separate")
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels_HWC).save(tmp_path / "pictures" / "wall.png")
    (tmp_path / "pictures" / "wall.txt").write_text(CAPTION)
    dataset = tmp_path / "dataset.toml"
    dataset.write_text(DATASET.format(side=SIDE, folder=tmp_path / "pictures"))
    text, latents = tmp_path / "text", tmp_path / "latents"
    encoders = {name: getattr(base, name) for name in ("clip_l", "clip_g", "t5xxl", "tokenizers")}
    common = {"dataset": dataset, "threads": 1}
    encode_text.main(
        EncodeTextParams(
            out=text, text_dtype="float32", t5xxl_max_token_length=32, t5_pad_to=32, **encoders, **common
        )
    )  # fmt: skip
    encode_latents.main(
        EncodeLatentsParams(
            model=str(base.model), out=latents, latent_dtype="float32", max_data_loader_n_workers=0,
            **common,
        )
    )  # fmt: skip
    params = TrainParams(
        model=str(base.model), text=text, latents=latents, out=tmp_path / "run", max_train_steps=1, threads=1, seed=SEED
    )
    train.main(params)
    cached_loss = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]

    data = open_data(params)
    rules = FeedRules(seed=SEED, sampling=SigmaSampling())
    (plan,) = epoch_batches(data.train, seed=SEED, epoch=0, batch_size=1)
    drawn = Feed(data.train, data.latents, data.text, rules).batch(plan)  # its noise and noise level
    pixels = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None] / 127.5 - 1
    context, pooled = assemble_conditioning(encode(base, [CAPTION], tmp_path))
    with torch.no_grad():
        mean, logvar = load_vae(str(base.model)).encode(pixels)
        draw = torch.from_numpy(normals(tuple(mean.shape[1:]), SEED, "latent", 0, int(plan.ids[0])))
        live = to_model_space(mean + (0.5 * logvar).exp() * draw)
        noisy = flow.add_noise(live, drawn.noise, drawn.sigmas)
        velocity = load_mmdit(str(base.model))(noisy, 1000 * drawn.sigmas, context, pooled)
    loss = (velocity - (drawn.noise - live)).square().mean()
    assert cached_loss == pytest.approx(float(loss), rel=1e-5)  # encoders in batches of other sizes round otherwise
