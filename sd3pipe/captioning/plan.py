"""What a captions cache is to hold: a row for each picture that is to be captioned, whatever the words become later."""

from collections.abc import Mapping, Sequence
from typing import Any

from sd3pipe.cache.plan import WantedRow
from sd3pipe.cache.rows import Row
from sd3pipe.cache.wanted import Wanted
from sd3pipe.data.scan import Picture, UnreadableFile

RECIPE_VERSION = 1  # counts changes of our own code that change a model's words
WORDS = "caption"  # the name of a row's one tensor: the model's words in UTF-8
_ROW_BYTES = 512  # of a caption, about
_GROUP_DIGITS = 2  # of a picture's hash: rows share a segment by them, so that a kill loses 1/256 of the work


def captions_wanted(
    pictures: Sequence[Picture], unreadable: Sequence[UnreadableFile], fingerprint: str, recipe: Mapping[str, Any]
) -> Wanted:
    """Returns the whole content of the cache. Pictures of equal bytes share a row, wherever they lie."""
    numbers: dict[str, int] = {}
    for picture in pictures:
        numbers.setdefault(picture.image_hash, len(numbers))
    return Wanted(
        kind="captions",
        recipe_version=RECIPE_VERSION,
        fingerprints={"captioner": fingerprint},
        recipe=recipe,
        rows=[
            WantedRow(source=digest, recipe=recipe, group=digest[:_GROUP_DIGITS], nbytes=_ROW_BYTES)
            for digest in numbers
        ],
        samples={
            "name": [picture.name for picture in pictures],
            "subset": [picture.subset.name for picture in pictures],
            "image_hash": [picture.image_hash for picture in pictures],
            "key": [numbers[picture.image_hash] for picture in pictures],
        },
        unreadable=[file.to_json() for file in unreadable],
    )


def words_of(row: Row) -> str:
    """Returns the model's words in a row."""
    return bytes(row[WORDS].data).decode("utf-8")
