"""The public models' architectures, at their real sizes."""

from sd3pipe.models.architecture import MMDiTArchitecture

PUBLIC_ARCHITECTURES = {
    "sd3-medium": MMDiTArchitecture(depth=24, pos_embed_max=192, qk_norm=False),
    "sd35-medium": MMDiTArchitecture(depth=24, pos_embed_max=384, qk_norm=True, dual_attention_blocks=tuple(range(13))),
    "sd35-large": MMDiTArchitecture(depth=38, pos_embed_max=192, qk_norm=True),
}
