"""What the caches of a dataset will hold, by the very rows that the encode stages want; from headers, free of torch.

Where captions may be longer than t5_pad_to, what they take at most: their tokens are not counted here.
"""

from sd3pipe.cache.folder import machine_folder
from sd3pipe.data.scan import tell_about_pictures
from sd3pipe.encoding.latent_plan import latent_recipe, latents_wanted, usable_views
from sd3pipe.encoding.stage import read_dataset
from sd3pipe.encoding.text_plan import caption_texts, encoder_files, text_recipe
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.row_sizes import known_text_sizes, known_vae, t5_tokens_at_most, text_advice, text_bytes
from sd3pipe.params.encode_latents import EncodeLatentsParams
from sd3pipe.params.encode_text import EncodeTextParams


def cache_sizes(latents: EncodeLatentsParams, text: EncodeTextParams) -> tuple[dict[str, int], str | None]:
    """Returns the bytes of both caches, and how much text takes that could take less.

    Where weights are not here, those of the published ones. Raises InputError.
    """
    read = read_dataset(latents.dataset, FileStamps(machine_folder(latents.out) / "stat.json"), captions=True)
    tell_about_pictures(read.found)
    views, unreadable = usable_views(read, latents)
    vae = known_vae(latents.model, latents.vae)
    rows = latents_wanted(views, unreadable, read.dataset, vae, "", latent_recipe(latents))
    captions = caption_texts(read.found, read.dataset, variants=text.caption_variants, seed=text.seed)
    encoders = known_text_sizes(text.model, encoder_files(text))
    recipe = text_recipe(text)
    t5_tokens = t5_tokens_at_most(
        captions.text_by_hash.values(), pad_to=recipe.t5_pad_to, max_length=recipe.t5xxl_max_token_length
    )
    size = text_bytes(t5_tokens, encoders, recipe.text_dtype, packed=recipe.t5xxl_row_dtype)
    advice = text_advice(t5_tokens, encoders, text_dtype=recipe.text_dtype, packed=recipe.t5xxl_row_dtype)
    return {"text": size, "latents": rows.nbytes}, advice
