"""Does a manifest say what the rows were made from? Each segment's header has its rows' own ingredients."""

from sd3pipe.cache.manifest import Manifest
from sd3pipe.cache.segment import Ingredients

_MARK = "imported_from"  # of rows that another program made, and of a cache that has some
_UNLIKE_OURS = {_MARK, "latent_mode", "vae_dtype"}  # their recipes have these otherwise than the manifest


def contradiction(manifest: Manifest, made_from: Ingredients) -> str:
    """Returns what the manifest says otherwise than some rows' own ingredients, nothing where they agree.

    Rows may have more in their recipe than the manifest: what is a picture's own.
    """
    if manifest.recipe_version != made_from.recipe_version:
        return _differ("recipe_version", manifest.recipe_version, made_from.recipe_version)
    for name in sorted({*manifest.fingerprints, *made_from.fingerprints}):
        said, true = manifest.fingerprints.get(name), made_from.fingerprints.get(name)
        if said != true:
            return _differ(f"fingerprints.{name}", said, true)
    for name, said in manifest.recipe.items():
        true = made_from.recipe.get(name)
        if said != true and not (name in _UNLIKE_OURS and _MARK in manifest.recipe):
            return _differ(f"recipe.{name}", said, true)
    return ""


def _differ(name: str, said: object, true: object) -> str:
    return f"says {name} = {_short(said)}, its rows were made with {_short(true)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
