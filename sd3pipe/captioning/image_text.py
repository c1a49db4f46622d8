"""Image-text models of transformers: pictures in, words out. Imports torch and transformers."""

# H W pixels, C channels

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from sd3pipe.captioning.captioner import Captioner
from sd3pipe.device_memory import memory_errors
from sd3pipe.documents import read_text
from sd3pipe.errors import InputError, ParameterError
from sd3pipe.rules.captioning import GenerationRules

_PACKED = ("int8", "nf4")
_BEGINS_CAPTION = ("blip", "git")  # their prompt is the beginning of the caption, and part of it


class ImageTextModel:
    """An image-text model on its device, with what is fixed for a whole run.

    Raises InputError for a model that this transformers does not load, or not without running code of its own.
    """

    def __init__(
        self, captioner: Captioner, prompt: str, rules: GenerationRules, device: torch.device, *, trust_code: bool
    ) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._captioner, self._prompt, self._rules, self._device = captioner, prompt, rules, device
        with _model_errors(captioner), memory_errors(lambda: "pass --captioner-dtype nf4, or a smaller --captioner"):
            self._processor = _processor(captioner, trust_code)
            self._model = _model(captioner, rules, device, trust_code)
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        tokenizer.padding_side = "left"  # so that every text of a batch ends where its answer begins

    def words(self, pictures: Sequence[np.ndarray]) -> list[str]:
        """Returns what the model says of each picture, uint8 [H, W, 3]."""
        images = [Image.fromarray(pixels_HWC) for pixels_HWC in pictures]
        with memory_errors(lambda: "lower --captioner-batch-size or --captioner-px, or pass --captioner-dtype nf4"):
            inputs = {
                name: value.to(self._model.dtype) if torch.is_tensor(value) and value.is_floating_point() else value
                for name, value in self._inputs(images).to(self._device).items()
            }
            with torch.inference_mode():
                tokens = self._model.generate(
                    **inputs,
                    do_sample=False,
                    num_beams=self._rules.num_beams,
                    max_new_tokens=self._rules.max_new_tokens,
                )
        return [text.strip() for text in self._decoded(tokens, inputs.get("input_ids"))]

    def _inputs(self, images: list[Image.Image]) -> Any:
        if getattr(self._processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": self._prompt}]
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            texts = [text] * len(images)
            return self._processor(text=texts, images=[[image] for image in images], return_tensors="pt", padding=True)
        if not self._prompt:
            return self._processor(images=images, return_tensors="pt")
        texts = [self._prompt] * len(images)
        return self._processor(text=texts, images=images, return_tensors="pt", padding=True)

    def _decoded(self, tokens: torch.Tensor, asked: torch.Tensor | None) -> list[str]:
        """Returns the words behind what was asked, where the model repeats that."""
        repeats = (
            asked is not None
            and self._captioner.model_type not in _BEGINS_CAPTION
            and tokens.shape[1] >= asked.shape[1]
            and torch.equal(tokens[:, : asked.shape[1]], asked)
        )
        answer = tokens[:, asked.shape[1] :] if repeats and asked is not None else tokens
        return self._processor.batch_decode(answer, skip_special_tokens=True)


def _model(captioner: Captioner, rules: GenerationRules, device: torch.device, trust_code: bool) -> Any:
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "trust_remote_code": trust_code}
    if rules.captioner_dtype in _PACKED:
        if device.type != "cuda":
            raise ParameterError(f"captioner_dtype = {rules.captioner_dtype} needs a CUDA device: choose bfloat16")
        packed = transformers.BitsAndBytesConfig(
            load_in_8bit=rules.captioner_dtype == "int8",
            load_in_4bit=rules.captioner_dtype == "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options |= {"quantization_config": packed, "dtype": torch.bfloat16}
    else:
        options["dtype"] = getattr(torch, rules.captioner_dtype)
    if device.type == "cuda":
        options["device_map"] = "auto"  # what the card does not hold stays on the host, and is sent over layer by layer
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(captioner.folder, **options)
    model.generation_config.temperature = model.generation_config.top_p = model.generation_config.top_k = None
    return model.eval() if device.type == "cuda" else model.to(device).eval()


def _processor(captioner: Captioner, trust_code: bool) -> Any:
    """Returns the model's processor; where its own wants torchvision for videos, one that takes pictures only."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_code, "backend": "pil"}
    try:
        return transformers.AutoProcessor.from_pretrained(captioner.folder, **options)
    except ImportError:
        config = transformers.AutoConfig.from_pretrained(captioner.folder, local_files_only=True)
        whole: Any = transformers.PROCESSOR_MAPPING[type(config)]

    class PicturesOnly(whole):
        """The processor without its part for videos."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            """Lets that part be None."""
            if argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    tokenizer = transformers.AutoTokenizer.from_pretrained(captioner.folder, local_files_only=True)
    pictures = transformers.AutoImageProcessor.from_pretrained(captioner.folder, **options)
    file = captioner.folder / "chat_template.jinja"
    template = (read_text(file) if file.is_file() else None) or tokenizer.chat_template
    return PicturesOnly(image_processor=pictures, tokenizer=tokenizer, video_processor=None, chat_template=template)


@contextlib.contextmanager
def _model_errors(captioner: Captioner) -> Iterator[None]:
    """Turns what transformers raises for a model that it cannot load into one line."""
    try:
        yield
    except ParameterError:
        raise
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        text = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            text = "it brings code of its own: pass --trust-remote-code if you trust it"
        raise InputError(f"{captioner.folder}: this captioner cannot be loaded: {text}") from error
