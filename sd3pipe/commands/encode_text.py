"""`sd3pipe encode-text`: captions or sample prompts to text encoder outputs, one row per distinct text, in a cache."""

import functools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sd3pipe.cache.folder import machine_folder, weight_stamps
from sd3pipe.cache.rows import Row
from sd3pipe.cache.store import FillCounts, check_room
from sd3pipe.config import find_project
from sd3pipe.console import count, listed, one_line
from sd3pipe.data.captions import caption_statistics
from sd3pipe.data.prompts import load_prompts
from sd3pipe.data.scan import tell_about_captions
from sd3pipe.encoding.cut_texts import Cuts, recall_cuts, remember_cuts
from sd3pipe.encoding.repetition import Repetition
from sd3pipe.encoding.stage import Encoding, Outlook, none_usable, read_dataset, run
from sd3pipe.encoding.text_plan import Texts, caption_texts, encoder_files, prompt_texts, text_recipe, text_wanted
from sd3pipe.errors import ParameterError, UnreadablePicture
from sd3pipe.file_stamps import FileStamps
from sd3pipe.models.row_sizes import text_bytes
from sd3pipe.models.text_encoder_files import TextEncoders, find_text_encoders
from sd3pipe.models.text_recipe import RECIPE_VERSION, TextRecipe
from sd3pipe.params.encode_text import EncodeTextParams

if TYPE_CHECKING:
    from sd3pipe.encoding.text_encoding import Tokens

log = logging.getLogger(__name__)

_Kind = Literal["text", "prompts"]

_PROJECT_KEYS: dict[_Kind, str] = {"text": "dataset", "prompts": "sample_prompts"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """One cache to fill from one file."""

    kind: _Kind
    source: Path
    out: Path


def main(params: EncodeTextParams) -> None:
    """Fills the text cache of a dataset or the cache of sample prompts; in a project, without either named, both."""
    for target in _targets(params):
        run(
            params,
            functools.partial(_prepare, target=target),
            stage=_TextRows.stage,
            out=target.out,
            inputs={
                _PROJECT_KEYS[target.kind]: str(target.source),
                **params.as_inputs("model", "clip_l", "clip_g", "t5xxl", "tokenizers"),
            },
            # of prompts there are few
            repetition=functools.partial(_repetition, params, target) if target.kind == "text" else None,
        )


def _repetition(params: EncodeTextParams, target: _Target) -> Repetition:
    def goes_by() -> dict[str, Any]:  # what makes the rows, beside the captions
        weights = weight_stamps(target.out, trust=not params.verify_weights)
        fingerprints = find_text_encoders(params.model, encoder_files(params), params.tokenizers).fingerprints(weights)
        weights.save()
        return {"weights": fingerprints, "recipe_version": RECIPE_VERSION, "options": params.model_dump(mode="json")}

    trust = not (params.rehash or params.verify_weights)
    return Repetition(target.out, target.source, goes_by, captions=True, trust=trust)


def _targets(params: EncodeTextParams) -> list[_Target]:
    """Returns the caches to fill: what the options name, else what project.toml does. Raises ParameterError."""
    project = find_project(Path.cwd())
    paths = project.paths if project else {}
    named: dict[_Kind, Path | None] = {"text": params.dataset, "prompts": params.sample_prompts}
    if not any(named.values()):
        named = {kind: Path(paths[key]) if key in paths else None for kind, key in _PROJECT_KEYS.items()}
    sources: dict[_Kind, Path] = {kind: path for kind, path in named.items() if path is not None}
    if not sources:
        raise ParameterError("encode-text: pass --dataset FILE or --sample-prompts FILE: there is nothing to encode")
    if params.out is not None and len(sources) > 1:
        del sources["prompts"]  # --out names one cache: that of the captions
    if params.out is None and "caches" not in paths:
        raise ParameterError("encode-text: --out is missing: name the folder of the cache, such as caches/text")
    return [
        _Target(kind=kind, source=source, out=params.out or Path(paths["caches"], kind))
        for kind, source in sources.items()
    ]


@dataclass(frozen=True, kw_only=True)
class _TextRows(Encoding):
    """The rows of captions or prompts, made by the three text encoders."""

    stage = "encode-text"
    parts_per_worker = 1  # for each part the three encoders are read anew, one after the other

    params: EncodeTextParams
    texts: Texts
    encoders: TextEncoders
    recipe: TextRecipe
    cuts: Cuts  # of texts that are longer than an encoder reads: of earlier runs, and what is found by this one

    @property
    def libraries(self) -> tuple[str, ...]:
        return ("torch", "transformers", "tokenizers")

    @property
    def folder(self) -> Path:
        return machine_folder(self.out)

    @functools.cached_property
    def hash_by_key(self) -> dict[str, str]:
        return dict(zip(self.wanted.keys, self.texts.text_by_hash, strict=True))

    def encode(self, keys: Sequence[str]) -> Iterator[tuple[str, Row | UnreadablePicture]]:
        from sd3pipe.encoding.text_encoding import encoded_texts  # imports torch and transformers

        tokens = self.look_at(keys)
        check_room(self.out, sum(self._bytes(tokens)))  # the store knows nominal sizes alone
        rows = encoded_texts(tokens, self.encoders, self.recipe, self.params, self.folder)
        yield from zip(keys, rows, strict=True)

    def look_at(self, keys: Sequence[str]) -> "Tokens":
        """Returns the token ids of the rows' texts, warns of those that lose some, and adds them to `cuts`.

        They are remembered at once: when the rows are published, a run that encodes nothing must know of them.
        """
        from sd3pipe.encoding.text_encoding import tokenized

        tokens, cut = tokenized(self._texts(keys), self.encoders, self.recipe)
        found: Cuts = {keys[text.number]: dict(text.tokens) for text in cut}
        self.cuts.update(found)
        remember_cuts(self.folder, self.cuts)
        clip_length, t5_length = self.encoders.sizes.clip_length, self.recipe.t5xxl_max_token_length
        cut_texts = self.cut_texts(found)
        for name, title, length in (("clip_l", "CLIP", clip_length), ("t5xxl", "T5", t5_length)):
            told = [item for item in cut_texts if name in item["tokens"]]
            if told:
                users = listed([f"{one_line(item['used_by'])} ({item['tokens'][name]})" for item in told])
                texts = count(len(told), "longer text")
                log.warning("%s reads the first %d tokens of %s: %s", title, length, texts, users)
        return tokens

    def _texts(self, keys: Sequence[str]) -> list[str]:
        return [self.texts.text_by_hash[self.hash_by_key[key]] for key in keys]

    def facts(self) -> dict[str, Any]:
        counts: dict[str, Any] = {"texts": len(self.texts.text_by_hash), "uses": len(self.texts.samples["key"])}
        if self.texts.kind == "text":
            used = [self.texts.text_by_hash[digest] for digest in self.texts.samples["caption_hash"]]
            counts["captions"] = caption_statistics(used)
        return counts

    def ending(self, counts: FillCounts) -> tuple[dict[str, Any], str]:
        remember_cuts(self.folder, self.cuts)
        cut = self.cut_texts(self.cuts)
        return {"cut": cut}, f", {count(len(cut), 'text')} cut" if cut else ""

    def cut_texts(self, cuts: Cuts) -> list[dict[str, Any]]:
        """Returns who uses each text that is cut, and how many tokens it has, in the order of the dataset."""
        users = self.texts.users
        return [
            {"used_by": users.get(digest, ""), "tokens": cuts[key]}
            for key, digest in self.hash_by_key.items()
            if key in cuts
        ]

    def outlook(self, keys: Sequence[str]) -> Outlook:
        from sd3pipe.encoding.text_encoding import seconds_to_encode, tokenized  # imports torch, only to tell the time

        tokens, _ = tokenized(self._texts(keys), self.encoders, self.recipe)
        device, seconds = seconds_to_encode(tokens, self.encoders, self.recipe, self.params)
        rows, meanwhile = self._bytes(tokens)
        nominal = sum(self.wanted.row_by_key[key].nbytes for key in keys)
        return Outlook(device=device, seconds=seconds, more_bytes=rows - nominal, meanwhile_bytes=meanwhile)

    def _bytes(self, tokens: "Tokens") -> tuple[int, int]:
        """Returns the size of the texts' rows, and of CLIP's outputs, which lie beside them until T5's are there."""
        lengths, sizes, dtype = tokens["t5xxl"].lengths, self.encoders.sizes, self.recipe.text_dtype
        rows = text_bytes(Counter(lengths), sizes, dtype, packed=self.recipe.t5xxl_row_dtype)
        return rows, len(lengths) * sizes.row_bytes(0, dtype)


def _prepare(params: EncodeTextParams, target: _Target) -> _TextRows:
    """Reads headers, captions or prompts, and what identifies the weights. Writes nothing for a dry run."""
    folder = machine_folder(target.out)
    pictures = FileStamps(folder / "stat.json", trust=not params.rehash)
    weights = weight_stamps(target.out, trust=not params.verify_weights)
    encoders = find_text_encoders(params.model, encoder_files(params), params.tokenizers)  # before all is read in vain
    read = None
    if target.kind == "text":
        read = read_dataset(target.source, pictures, captions=True)
        if not read.found.pictures:
            raise none_usable(read.dataset, read.found.unreadable)
        tell_about_captions(read.found)
        texts = caption_texts(read.found, read.dataset, variants=params.caption_variants, seed=params.seed)
    else:
        texts = prompt_texts(load_prompts(target.source))
    recipe = text_recipe(params)
    wanted = text_wanted(texts, encoders.sizes, encoders.fingerprints(weights), recipe)
    if not params.dry_run:
        pictures.save()
        weights.save()
    return _TextRows(
        params=params,
        out=target.out,
        wanted=wanted,
        read=read,
        texts=texts,
        encoders=encoders,
        recipe=recipe,
        cuts=recall_cuts(folder, set(wanted.keys)),
    )
