"""Makes the demo's judge model: a tiny CLIP in transformers' layout that knows the drawings' grammar by sight.

    python scripts/make_demo_judge.py [--steps N]

writes sd3pipe/demo/judge: config.json, model.safetensors in half precision, the picture preprocessor and a copy of the
demo base's small vocabulary. It learns captions of the known shapes, and to tell random outlines apart, which is what
it sees a new shape by: no picture of the new shape is among them, nor an outline that is much like it, and the new
word is in no caption. Seeds are fixed; it takes 20 to 35 minutes on one core.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from demo_blobs import blob_outline
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sd3pipe.console import progress, setup_logging
from sd3pipe.demo.base_files import TOKENIZERS
from sd3pipe.demo.drawings import (
    ALL_OUTLINES,
    BACKGROUNDS,
    NEW_WORD,
    RADII,
    WORDINGS,
    Outline,
    Subject,
    all_subjects,
    coverage,
    draw,
)
from sd3pipe.judging.concept import discriminant

# B batch, H W pixels, N captions or pictures, D embedding width

TARGET = Path(__file__).resolve().parent.parent / "sd3pipe" / "demo" / "judge"
SIDE_PX, SEEN_PX, PATCH_PX = 64, 48, 8  # of a drawing, of what the model sees of it, of its patches
LENGTH = 12  # of a caption, in tokens
SIZES = ((64, 64), (64, 96), (96, 64))  # height, width
OUTLINES, ALIKE_COLOURS = 2400, 8  # random outlines, and how many in a row share their colours
LIKE_THE_NEW_SHAPE = 0.7  # overlap from which on an outline is left out
TOLD_APART = 60  # drawings of the new shape and of a known one that are to be told apart at the end
BATCH, LEARNING_RATE, WARM_UP = 64, 2e-3, 0.1
_SEED = 13


def main() -> None:
    """Trains the model and writes its folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    setup_logging()
    torch.manual_seed(_SEED)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / "clip_l")
    model = CLIPModel(_config(len(tokenizer)))
    train(model, tokenizer, options.steps)
    for shape, area in apart(model.eval()).items():
        print(f"{NEW_WORD} and {shape}: area under the curve {area:.3f}")
    write(model, tokenizer, options.out)


def _config(vocabulary: int) -> CLIPConfig:
    return CLIPConfig(
        projection_dim=64,
        vision_config={
            "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3,
            "image_size": SEEN_PX, "patch_size": PATCH_PX, "projection_dim": 64,
        },
        text_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": LENGTH, "vocab_size": vocabulary, "projection_dim": 64,
            "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1,
        },
    )  # fmt: skip


def train(model: CLIPModel, tokenizer: CLIPTokenizer, steps: int) -> None:
    """Trains with two contrasts: pictures with captions, and two drawings of one outline with others of its colours."""
    generator = np.random.default_rng(_SEED)
    subjects = all_subjects()
    drawings = [square(draw(s, height=h, width=w, generator=generator)) for s in subjects for h, w in SIZES]
    outlines = outline_pairs(generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=WARM_UP)
    with progress("judge model", steps, "steps") as bar:
        for _ in range(steps):
            captions, seen = caption_batch(subjects, drawings, generator)
            tokens = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
            texts_BD = unit(model.get_text_features(**tokens).pooler_output)
            first, second = outline_batch(outlines, generator)
            pixels = rough(torch.cat([seen, first, second]), generator)
            pictures_BD = unit(model.get_image_features(pixels).pooler_output)
            matched, views = pictures_BD[: len(captions)], pictures_BD[len(captions) :].chunk(2)
            by_caption = contrast(matched, texts_BD, model.logit_scale.exp())
            by_outline = contrast(views[0], views[1], torch.tensor(15.0))
            (by_caption + by_outline).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            model.logit_scale.data.clamp_(max=4.0)
            bar.advance(captions=f"{by_caption.item():.3f}", outlines=f"{by_outline.item():.3f}")


def caption_batch(
    subjects: list[Subject], drawings: list[NDArray[np.uint8]], generator: np.random.Generator
) -> tuple[list[str], Tensor]:
    """Returns different subjects' captions and their pictures [N, 3, H, W]."""
    chosen = generator.choice(len(subjects), BATCH, replace=False)
    captions = [subjects[i].caption(int(generator.integers(len(WORDINGS)))) for i in chosen]
    return captions, as_pixels([drawings[i * len(SIZES) + int(generator.integers(len(SIZES)))] for i in chosen])


def outline_pairs(generator: np.random.Generator) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Returns two drawings of each random outline; some in a row share size and colours: only the form tells them."""
    pairs = []
    for _ in range(OUTLINES // ALIKE_COLOURS):
        colour, background = generator.choice(list(BACKGROUNDS), 2, replace=False).tolist()
        size = str(generator.choice(list(RADII)))
        look = Subject(shape="", colour=colour, size=size, background=background)
        for _ in range(ALIKE_COLOURS):
            outline = other_outline(generator)
            first, second = (
                draw(look, height=SIDE_PX, width=SIDE_PX, generator=generator, outline=outline) for _ in range(2)
            )
            pairs.append((first, second))
    return pairs


def other_outline(generator: np.random.Generator) -> Outline:
    """Returns a random outline that is not much like the new shape."""
    while True:
        outline = blob_outline(generator)
        shapes = (outline, ALL_OUTLINES[NEW_WORD])
        own, new = (coverage(shape, height=32, width=32, y=16, x=16, radius=15) > 0.5 for shape in shapes)
        if (own & new).sum() / (own | new).sum() < LIKE_THE_NEW_SHAPE:
            return outline


def outline_batch(
    pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Returns both drawings of some rows of outlines with equal colours."""
    starts = generator.choice(OUTLINES // ALIKE_COLOURS, BATCH // ALIKE_COLOURS, replace=False) * ALIKE_COLOURS
    chosen = [pairs[start + i] for start in starts for i in range(ALIKE_COLOURS)]
    return as_pixels([first for first, _ in chosen]), as_pixels([second for _, second in chosen])


def contrast(first_ND: Tensor, second_ND: Tensor, scale: Tensor) -> Tensor:
    """Returns the loss of telling, both ways, which belongs to which (Radford et al. 2021, figure 3)."""
    logits = scale * first_ND @ second_ND.T
    wanted = torch.arange(len(logits))
    return (functional.cross_entropy(logits, wanted) + functional.cross_entropy(logits.T, wanted)) / 2


def rough(pixels_B3HW: Tensor, generator: np.random.Generator) -> Tensor:
    """Returns pictures as a decoder might draw them: some blurred, all a little noisy."""
    blurred = functional.avg_pool2d(pixels_B3HW, 3, stride=1, padding=1, count_include_pad=False)
    share = torch.from_numpy(generator.uniform(0, 1, (len(pixels_B3HW), 1, 1, 1))).float()
    noise = torch.from_numpy(generator.standard_normal(pixels_B3HW.shape, dtype=np.float32))
    return torch.lerp(pixels_B3HW, blurred, share) + 0.04 * noise


def square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns the middle square of a picture whose shorter side is SIDE_PX long."""
    top, left = ((pixels - SIDE_PX) // 2 for pixels in picture.shape[:2])
    return picture[top : top + SIDE_PX, left : left + SIDE_PX]


def as_pixels(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """Returns pictures [N, 3, H, W] in [-1, 1], as the preprocessor makes them."""
    pixels_N3HW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return functional.interpolate(pixels_N3HW, (SEEN_PX, SEEN_PX), mode="bicubic", antialias=True)


@torch.inference_mode()
def apart(model: CLIPModel) -> dict[str, float]:
    """Returns how well the new shape is told from each known one, along a direction that other drawings set."""
    generator = np.random.default_rng(_SEED)
    seen = {}
    for shape in ALL_OUTLINES:
        subjects = generator.choice(np.array(all_subjects((shape,)), object), 2 * TOLD_APART, replace=False)
        drawings = [draw(subject, height=SIDE_PX, width=SIDE_PX, generator=generator) for subject in subjects]
        pixels = rough(as_pixels(drawings), generator)
        seen[shape] = unit(model.get_image_features(pixels).pooler_output).double().numpy()
    new_ND = seen.pop(NEW_WORD)
    return {shape: _area(known_ND, new_ND) for shape, known_ND in seen.items()}


def _area(known_ND: NDArray[np.float64], new_ND: NDArray[np.float64]) -> float:
    """Returns the area under the curve of telling second halves apart along the discriminant of the first ones."""
    direction_D = discriminant(known_ND[:TOLD_APART], new_ND[:TOLD_APART])
    known_N, new_N = known_ND[TOLD_APART:] @ direction_D, new_ND[TOLD_APART:] @ direction_D
    return float((new_N[:, None] > known_N).mean())


def unit(vectors_BD: Tensor) -> Tensor:
    return functional.normalize(vectors_BD, dim=-1)


def write(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes what AutoModel and AutoProcessor read."""
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    tokenizer.model_max_length = LENGTH
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SEEN_PX}, crop_size=SEEN_PX, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
