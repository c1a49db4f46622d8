"""A row's key: what went into its numbers, and nothing else. Known before anything is encoded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import JsonValue

from sd3pipe.fingerprint import canonical_json, hash_bytes, hash_json

Kind = Literal["latents", "text", "prompts", "captions", "embeddings", "errors"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FORMAT_VERSION = 1  # of keys, segments, index and manifest together


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredients:
    """What a row's key is made of, beside its kind and source; shared by many rows.

    `recipe` holds what is done to the source, as JSON; `recipe_version` counts changes of our own code that move
    numbers; `fingerprints` identify weights and tokenizers.
    """

    recipe: Mapping[str, JsonValue]
    recipe_version: int
    fingerprints: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        return {
            "fingerprints": dict(self.fingerprints),
            "recipe": dict(self.recipe),
            "recipe_version": self.recipe_version,
        }

    def key(self, kind: Kind, source: str) -> str:
        """Returns 64 hex digits that change with anything that can change the row's numbers.

        `source` is the hash of the input's bytes.
        """
        return self.keys_of(kind)(source)

    def keys_of(self, kind: Kind) -> Callable[[str], str]:
        """Returns what makes a key of a source: where there are many, what they have in common is put down once."""
        common = canonical_json({"format": FORMAT_VERSION, "kind": kind, "source": "", **self.to_json()})
        start = common.removesuffix(b'""}')  # the source stands last among sorted names
        return lambda source: hash_bytes(start + canonical_json(source) + b"}")


def latents_source(image_hash: str, mask_hash: str | None = None) -> str:
    """Returns the source of a latents row: the bytes of the picture file and of its mask file, if it has one."""
    return image_hash if mask_hash is None else hash_json({"image": image_hash, "mask": mask_hash})


def text_source(caption: str) -> str:
    """Returns the source of a text row: the processed caption, whatever its line ends and byte order mark."""
    text = caption.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return hash_bytes(text.encode("utf-8", "surrogatepass"))
