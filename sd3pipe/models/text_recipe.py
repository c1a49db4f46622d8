"""What is done to a caption on its way to a row, as far as it changes numbers. Free of torch."""

from dataclasses import asdict, dataclass
from typing import Any

from sd3pipe.errors import ParameterError
from sd3pipe.words import Format, PackedFormat, Padding, RowFormat

RECIPE_VERSION = 1  # counts the changes of this package that move the numbers in text rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """The settings that enter a text row's key.

    padding                  hidden states at padding positions: kept as they come, as every inference program does, or
                             zeroed
    apply_lg_attn_mask       CLIP-L and CLIP-G do not attend to padding
    apply_t5_attn_mask       T5 does not attend to padding
    t5xxl_max_token_length   T5 tokens a caption is cut to
    t5_pad_to                T5 tokens a shorter caption is padded to; longer ones keep their own length
    text_dtype               number format of computing and of the rows; T5 computes in float32 for float16, in which
                             it overflows
    t5xxl_base_dtype         T5's matrices are packed as this while encoding, if set
    t5xxl_row_dtype          T5's states are packed as this in the rows, if set
    """

    padding: Padding = "keep"
    apply_lg_attn_mask: bool = False
    apply_t5_attn_mask: bool = False
    t5xxl_max_token_length: int = 256
    t5_pad_to: int = 256
    text_dtype: Format = "bfloat16"
    t5xxl_base_dtype: PackedFormat | None = None
    t5xxl_row_dtype: RowFormat | None = None

    def __post_init__(self) -> None:
        if self.t5_pad_to > self.t5xxl_max_token_length:
            raise ParameterError(
                f"--t5-pad-to {self.t5_pad_to} is more than --t5xxl-max-token-length {self.t5xxl_max_token_length}: "
                "lower the first or raise the second"
            )

    def fields(self) -> dict[str, Any]:
        """Returns the settings as JSON types, for keys and the manifest; what is not packed has no format."""
        return {name: value for name, value in asdict(self).items() if value is not None}
