"""What an encode stage says where its code makes other numbers than those that its cache has."""

from pathlib import Path

from sd3pipe.cache.folder import MANIFEST
from sd3pipe.cache.manifest import read_manifest
from sd3pipe.cache.wanted import Wanted


def version_change(out: Path, wanted: Wanted) -> str:
    """Returns the words about a cache of another recipe version, nothing for one of this version or none.

    Raises InputError for a manifest that cannot be understood.
    """
    manifest = read_manifest(out / MANIFEST)
    if manifest is None or manifest.recipe_version == wanted.recipe_version:
        return ""
    return (
        f"{out} was encoded by version {manifest.recipe_version} of its recipe, this sd3pipe has version "
        f"{wanted.recipe_version}, which makes its rows anew (train takes the cache as it is, too)"
    )
