"""Where the demo base lies in the package."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "base"
MODEL = FOLDER / "demo-base.safetensors"
TOKENIZERS = FOLDER / "tokenizers"
JUDGE = FOLDER.parent / "judge"
T5_LENGTH = 10  # what the base is trained at; it also knows padding to 77 or 256, which takes more time
