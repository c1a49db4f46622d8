"""Options of `sd3pipe init`."""

from sd3pipe.params.fields import FileName, OptionPath, Params, option
from sd3pipe.params.stage import AnyGoal, Size
from sd3pipe.words import Variant


class InitParams(Params):
    folder: OptionPath = option(".", "Folder of the new project.", positional=True, role="path", validate_default=True)
    model: str | None = option(None, "Checkpoint file, diffusers folder or hub id.", role="path", panel="Model")
    clip_l: OptionPath | None = option(None, "CLIP-L file, if not in the model.", role="path", panel="Model")
    clip_g: OptionPath | None = option(None, "CLIP-G file, if not in the model.", role="path", panel="Model")
    t5xxl: OptionPath | None = option(None, "T5-XXL file, if not in the model.", role="path", panel="Model")
    vae: OptionPath | None = option(None, "VAE file, if not the one in the model.", role="path", panel="Model")
    tokenizers: OptionPath | None = option(None, "Folder with the tokenizers.", role="path", panel="Model")
    variant: Variant | None = option(
        None, "Model variant; read from the file unless it is a hub id or large-turbo.", aliases=("for",), panel="Model"
    )
    images: str | None = option(
        None, "Folder, tar, Parquet file or s3:// address with pictures and captions.", role="path", panel="Pictures"
    )
    trigger: str | None = option(None, "Word that stands for what is learnt.", panel="Pictures")
    caption: str | None = option(
        None, "Model that captions the pictures nobody has captioned: a folder or a hub id.",
        role="path", panel="Pictures",
    )  # fmt: skip
    resolution: int = option(1024, "Side of the square whose area pictures are scaled to.", ge=64, panel="Pictures")
    goal: AnyGoal = option(
        "object", "What the adapter is to learn; subject is another word for object.", panel="Training"
    )
    train_batch_size: int = option(1, "Pictures per step, which the steps follow from.", ge=1, panel="Training")
    vram: Size | None = option(None, "Memory of the training card, such as 12GB.", panel="Training")
    name: FileName | None = option(
        None, "Name of the adapter; default: the trigger or the folder's name.", panel="Training"
    )
    loras_dir: OptionPath | None = option(
        None, "Folder that every saved adapter is copied to (ComfyUI's models/loras).", role="path", panel="Training"
    )
