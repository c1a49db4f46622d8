"""Options of `sd3pipe doctor`."""

from sd3pipe.params.fields import OptionPath, Params, option


class DoctorParams(Params):
    model: str | None = option(None, "Model beside which tokenizers are looked for.", role="path", paths_key="model")
    tokenizers: OptionPath | None = option(
        None, "Folder with clip_l/, clip_g/ and t5xxl/.", role="path", paths_key="tokenizers"
    )
    caches: OptionPath | None = option(
        None, "Folder whose disk is looked at; default: the current one.", role="path", paths_key="caches"
    )
    json_output: bool = option(False, "Answer as JSON.", aliases=("json",))
