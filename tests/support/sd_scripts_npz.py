"""Writes the .npz files that sd-scripts (48d368fa) caches beside pictures, from caches of this package.

Names, shapes and types are those that its SD3 strategies write: float32 latents that are one draw, text states of a
bfloat16 run widened to float32.
"""

from pathlib import Path

import numpy as np

from sd3pipe.cache.reader import CacheReader


def write_latents_npz(cache: Path, pictures: Path, *, seed: int = 0) -> list[Path]:
    """Writes the npz of every picture in a cache of moments; returns the files."""
    reader = CacheReader(cache)
    generator = np.random.default_rng(seed)
    samples, written = reader.samples, []
    for number in range(len(samples)):
        moments = reader.row(int(samples.numbers("row")[number]))["moments"].numpy().astype(np.float32)
        mean, logvar = np.split(moments, 2)
        draw = mean + np.exp(0.5 * logvar) * generator.standard_normal(mean.shape, dtype=np.float32)
        width, height = (int(samples.numbers(f"original_{side}")[number]) for side in "wh")
        name = Path(samples.strings("name")[number])
        suffix = f"_{draw.shape[1]}x{draw.shape[2]}"
        file = pictures / f"{name.stem}_{width:04d}x{height:04d}_sd3.npz"
        np.savez(
            file,
            **{
                f"latents{suffix}": draw,
                f"original_size{suffix}": np.array([width, height]),
                f"crop_ltrb{suffix}": np.array([0, 0, width, height]),
            },
        )  # pyright: ignore[reportArgumentType] (numpy's stub knows allow_pickle only)
        written.append(file)
    return written


def write_text_npz(cache: Path, pictures: Path) -> list[Path]:
    """Writes the npz of every caption in a cache of texts; returns the files."""
    reader = CacheReader(cache)
    samples, written = reader.samples, []
    for number in range(len(samples)):
        row = {name: tensor.numpy() for name, tensor in reader.row(int(samples.numbers("row")[number])).items()}
        file = pictures / f"{Path(samples.strings('name')[number]).stem}_sd3_te.npz"
        np.savez(
            file,
            lg_out=np.concatenate([row["clip_l"], row["clip_g"]], axis=1),
            lg_pooled=np.concatenate([row["pooled_l"], row["pooled_g"]]),
            t5_out=row["t5xxl"],
            clip_l_attn_mask=row["mask_l"].astype(np.int64),
            clip_g_attn_mask=row["mask_g"].astype(np.int64),
            t5_attn_mask=row["mask_t5"].astype(np.int64),
            apply_lg_attn_mask=np.array(False),
            apply_t5_attn_mask=np.array(False),
        )
        written.append(file)
    return written
