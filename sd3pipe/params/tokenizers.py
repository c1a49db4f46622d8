"""Options of `sd3pipe tokenizers`."""

from sd3pipe.params.fields import OptionPath, Params, option


class TokenizersParams(Params):
    folder: OptionPath = option(
        ..., "Folder that gets clip_l/, clip_g/ and t5xxl/.", role="path", positional=True, paths_key="tokenizers"
    )
