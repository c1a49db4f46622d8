"""How many rows encode-text would make from the captions as they are."""

from sd3pipe.cache.folder import machine_folder
from sd3pipe.cache.store import missing_rows
from sd3pipe.config import Project
from sd3pipe.encoding.text_plan import caption_texts, encoder_files, text_recipe, text_wanted
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.text_encoder_files import find_text_encoders
from sd3pipe.params.encode_text import EncodeTextParams
from sd3pipe.project.inputs import stage_options
from sd3pipe.stages import STAGES_BY_NAME
from sd3pipe.studio.gallery import Gallery


def rows_to_encode(project: Project, gallery: Gallery) -> tuple[int, int]:
    """Returns how many rows encode-text would make, and of how many. Raises InputError, ParameterError.

    Weights are known by what encode-text remembered of their files; without a cache nothing is there to compare.
    """
    params = stage_options(project, STAGES_BY_NAME["encode-text"])
    assert isinstance(params, EncodeTextParams) and params.out is not None
    texts = caption_texts(gallery.found, gallery.dataset, variants=params.caption_variants, seed=params.seed)
    total = len(texts.text_by_hash)
    if not (params.out / "manifest.json").is_file():
        return total, total
    encoders = find_text_encoders(params.model, encoder_files(params), params.tokenizers)
    weights = FileStamps(machine_folder(params.out).parent / "weights.json")
    wanted = text_wanted(texts, encoders.sizes, encoders.fingerprints(weights), text_recipe(params))
    return len(missing_rows(params.out, wanted).keys), total
