"""The words that options, files and code choose from: each set stands here once."""

from typing import Literal

WeightingScheme = Literal["uniform", "none", "logit_normal", "mode", "cosmap", "sigma_sqrt"]
LossForm = Literal["velocity", "x0"]
LossType = Literal["l2", "l1", "huber", "smooth_l1"]
HuberSchedule = Literal["constant", "exponential", "snr"]
MaskedLoss = Literal["mean", "sum", "off"]
SchedulerName = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
    "polynomial", "inverse_sqrt", "warmup_stable_decay", "piecewise_constant",
]  # fmt: skip
Algorithm = Literal["lora", "dora", "loha", "lokr", "oft", "oftv2", "tlora"]
AfterBadLoss = Literal["stop", "rollback"]

MMDiTVariant = Literal["sd3-medium", "sd35-medium", "sd35-large"]  # which the tensors tell apart
ToldVariant = Literal["sd35-large-turbo"]  # has large's keys and shapes, so only the user can tell it
Variant = Literal[MMDiTVariant, ToldVariant]
SideName = Literal["context_block", "x_block"]
ClipName = Literal["clip_l", "clip_g"]
EncoderName = Literal[ClipName, "t5xxl"]
VocabularyKind = Literal["clip", "t5"]
Goal = Literal["person", "object", "style", "concept"]

Precision = Literal["no", "fp16", "bf16"]  # accelerate's and sd-scripts' words; no: float32
WantedPrecision = Literal["auto", Precision]
Format = Literal["float32", "float16", "bfloat16"]  # torch's words
FORMAT_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
PackedFormat = Literal["fp8", "int8", "nf4"]
RowFormat = Literal["int8"]  # whole numbers, and a bfloat16 scale for each group of neighbours in a token's states
CLIP_TOKENS = 77  # of every prompt, for both CLIP encoders
SCALED_NEIGHBOURS = 64  # how many numbers of a row share a scale; fewer where they do not divide its width
BaseFormat = Literal["dense", PackedFormat]
MatmulFormat = Literal["int8", "fp8"]
SavePrecision = Literal["float", "fp16", "bf16"]  # sd-scripts' words
StoredFormat = Literal["auto", "same", "fp32", "fp16", "bf16"]

KeptActivations = Literal["none", "attention", "all"]  # of a joint block, for its backward pass
ModulationMode = Literal["stream", "resident", "ahead"]
AttentionKernel = Literal["auto", "flash", "cudnn", "efficient", "math"]
VerifyReads = Literal["always", "first", "never"]
LatentMode = Literal["moments", "mean"]
SampleForm = Literal["webdataset", "mds", "litdata"]  # of other training engines
CacheForm = Literal["zarr", SampleForm]
Padding = Literal["keep", "zero"]
AutoOnOff = Literal["auto", "on", "off"]
AdapterForm = Literal["comfyui", "comfyui-generic", "diffusers"]
MetadataAmount = Literal["full", "public", "none"]
Tracker = Literal["tensorboard", "wandb", "trackio"]  # each is the name of its package, too
Trackers = Literal[Tracker, "all"]
Engine = Literal["local", "ray"]
CaptionerFormat = Literal["float32", "float16", "bfloat16", "int8", "nf4"]
CaptionerKind = Literal["vlm", "tagger"]
AutoCaptionerKind = Literal["auto", "vlm", "tagger"]
WrittenCaptions = Literal["own", "missing", "all", "none"]
