"""Makes a tiny captioner in BLIP's layout that says what a drawing shows: size, colour, shape and background.

    python scripts/make_demo_captioner.py --out DIR [--steps N]

Slow tests make it for themselves; it is not shipped. Seeds are fixed; it takes about 70 CPU seconds.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from sd3pipe.console import progress, setup_logging
from sd3pipe.demo.drawings import BACKGROUNDS, OUTLINES, RADII, all_subjects, draw
from sd3pipe.files import make_folder, write_text

# B batch, C channels, H W pixels, L tokens, N drawings

SIDE_PX = 64  # of a drawing
SEEN_PX, PATCH_PX, WIDTH, LAYERS = 32, 8, 64, 2  # at 48 pixels it learns shapes four times as slowly
DRAWINGS, BATCH, LEARNING_RATE, WARM_UP, STEPS = 6000, 64, 3e-3, 50, 1600
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
_SEED = 17


def main() -> None:
    """Trains the model and writes its folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    setup_logging()
    make_captioner(options.out, options.steps)


def make_captioner(folder: Path, steps: int) -> None:
    """Writes the trained model's folder."""
    words = [*_SPECIAL, "a", "on", "background", *RADII, *OUTLINES, *BACKGROUNDS]
    write_text(make_folder(folder) / "vocab.txt", "\n".join(words))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), bos_token="[DEC]", additional_special_tokens=["[ENC]"])
    pictures = BlipImageProcessorPil(size={"height": SEEN_PX, "width": SEEN_PX})
    processor = BlipProcessor(pictures, tokenizer)
    torch.manual_seed(_SEED)
    model = BlipForConditionalGeneration(_config(len(words)))
    train(model, processor, steps)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def train(model: BlipForConditionalGeneration, processor: BlipProcessor, steps: int) -> None:
    """Teaches the first wording of the grammar."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, max(0.02, 1 - step / steps))
    )
    generator = np.random.default_rng(_SEED)
    pixels_NCHW, tokens_NL = _drawings(processor, generator)
    model.train()
    with progress("captioner", steps, "steps") as bar:
        for _ in range(steps):
            chosen = torch.from_numpy(generator.integers(DRAWINGS, size=BATCH))
            tokens_BL = tokens_NL[chosen]
            loss = model(pixel_values=pixels_NCHW[chosen], input_ids=tokens_BL, labels=tokens_BL).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.advance()
    model.eval()


def _drawings(processor: BlipProcessor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Returns what the model sees of drawings, and the tokens that it is to say of them."""
    subjects = [all_subjects()[number] for number in generator.integers(len(all_subjects()), size=DRAWINGS)]
    drawings = [draw(subject, height=SIDE_PX, width=SIDE_PX, generator=generator) for subject in subjects]
    pixels_NCHW = processor.image_processor(drawings, return_tensors="pt").pixel_values
    tokens_NL = processor.tokenizer([subject.caption() for subject in subjects], return_tensors="pt").input_ids
    tokens_NL[:, 0] = processor.tokenizer.bos_token_id
    return pixels_NCHW, tokens_NL


def _config(words: int) -> BlipConfig:
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "projection_dim": 16,
    }  # fmt: skip
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    return BlipConfig(
        text_config={**shape, **ids, "vocab_size": words, "encoder_hidden_size": WIDTH, "max_position_embeddings": 16,
                     "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        vision_config={**shape, "image_size": SEEN_PX, "patch_size": PATCH_PX},
    )  # fmt: skip


if __name__ == "__main__":
    main()
