"""Cards of a dataset before anything is encoded: the very cuts, masks and captions that the encode stages will make."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sd3pipe.console import count, listed, one_line
from sd3pipe.data.buckets import cut_by_limit
from sd3pipe.data.caption_cache import CachedCaptions
from sd3pipe.data.captions import processed_captions, tag_frequency
from sd3pipe.data.cut import Cut, Size
from sd3pipe.data.decoding import DecodeJob, Pixels, row_job
from sd3pipe.data.feed import Decoded, decoded_rows
from sd3pipe.data.geometry import View, filter_name, views_of_all
from sd3pipe.data.looks import Seen, look_warnings
from sd3pipe.data.scan import NO_TEXT, Picture, Scan, UnreadableFile, is_no_text
from sd3pipe.previewing.cards import CARD_PX, Box, CaptionTokens, Card, Preview, Section, spread
from sd3pipe.previewing.thumbnails import Thumbnails

_AROUND = 0.25  # of a cut's side, shown on each side of it
_MUCH_ENLARGED = 1.25
_MUCH_CUT_OFF = 0.2
_TAGS_SHOWN = 60

CountTokens = Callable[[Sequence[str]], Mapping[str, CaptionTokens]]  # of captions; of none without tokenizers


@dataclass(frozen=True, kw_only=True)
class PictureItem:
    """A picture with its rows and its captions, and what is to be known of it; nothing of it is decoded."""

    views: list[View]
    captions: tuple[str, ...]
    copies: list[str]  # names of all pictures of equal content, itself among them
    tokens: Mapping[str, CaptionTokens]
    suggested: Mapping[str, str]  # what captioners said, by the name of their cache
    seen: Seen | None
    like: str  # name of the picture that looks most like it, "" where none does

    @property
    def picture(self) -> Picture:
        return self.views[0].picture

    @property
    def cuts(self) -> list[Cut]:
        return [view.cut for view in self.views]

    @property
    def cut(self) -> Cut:
        return self.views[0].cut

    @property
    def scale(self) -> float:
        """How many times larger the picture becomes, each way."""
        return max(self.cut.resized[0] / self.picture.width, self.cut.resized[1] / self.picture.height)

    @property
    def cut_off(self) -> float:
        """The share of the picture that is cut off."""
        return 1 - (self.cut.size[0] * self.cut.size[1]) / (self.cut.resized[0] * self.cut.resized[1])

    @property
    def long_caption(self) -> CaptionTokens | None:
        """The first caption that is cut off."""
        counted = (self.tokens[caption] for caption in self.captions if caption in self.tokens)
        return next((caption for caption in counted if caption.cut_off), None)

    @property
    def variants(self) -> Counter[str]:
        """The different captions in the order of the first of each, with how often each is there."""
        return Counter(self.captions)

    @property
    def facts(self) -> tuple[str, ...]:
        picture, subset = self.picture, self.picture.subset
        change = "as it is"
        if self.scale != 1:
            change = f"{'enlarged' if self.scale > 1 else 'reduced'} to {self.scale:.0%}"
        cut_off = f", {self.cut_off:.0%} cut off" if self.cut_off >= 0.005 else ""
        crops = len({view.cut for view in self.views if not view.flip})
        use = [f"subset {one_line(subset.name)}"]
        use += [f"{crops} random crops"] if crops > 1 else []
        use += ["mirrored too"] if any(view.flip for view in self.views) else []
        use += ["validation"] if picture.split == "validation" else []
        use += [f"seen {subset.num_repeats} times"] if subset.num_repeats > 1 else []
        use += ["regularisation"] if subset.is_reg else []
        tokens = (self.tokens[self.captions[0]].shown,) if self.captions[0] in self.tokens else ()
        return (f"{picture.width} x {picture.height}, {change}{cut_off}", ", ".join(use), *tokens)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(_card_warnings(self))


@dataclass(frozen=True, kw_only=True)
class DatasetItems:
    """All pictures of a dataset in the order of its scan, and those that are left out."""

    items: list[PictureItem]
    unreadable: list[UnreadableFile]
    warnings: tuple[str, ...]  # about the dataset as a whole


def dataset_items(
    found: Scan,
    *,
    caption_variants: int,
    crop_variants: int,
    seed: int,
    count_tokens: CountTokens,
    suggested: Mapping[str, CachedCaptions],
    seen: Mapping[str, Seen],
) -> DatasetItems:
    """Returns what is known of scanned pictures before one is decoded.

    `suggested` are captions by their cache, `seen` is what pictures look like by their hash.
    """
    pictures, unreadable = views_of_all(found, crop_variants=crop_variants, seed=seed)
    processed = [processed_captions(of[0].picture, variants=caption_variants, seed=seed) for of in pictures]
    tokens = count_tokens(sorted({caption for texts in processed for caption in texts}))
    names: dict[tuple[int, str], list[str]] = defaultdict(list)
    named = {picture.image_hash: _full_name(picture) for picture in reversed(found.pictures)}
    items: list[PictureItem] = []
    for views, texts in zip(pictures, processed, strict=True):
        picture = views[0].picture
        copies = names[picture.subset.dataset, picture.image_hash]
        copies.append(_full_name(picture))
        there = (picture.subset.name, picture.image_hash)
        said = {name: captions[there] for name, captions in suggested.items() if there in captions}
        looks = seen.get(picture.image_hash)
        items.append(
            PictureItem(
                views=views,
                captions=texts,
                copies=copies,
                tokens=tokens,
                suggested=said,
                seen=looks,
                like=named.get(looks.like, "") if looks and looks.like else "",
            )
        )
    copied = [same for same in names.values() if len(same) > 1]
    looks = look_warnings(found.pictures, seen)
    warnings = (*found.left_out, *_warnings(_by_bucket(items), items, copied), *looks)
    return DatasetItems(items=items, unreadable=unreadable, warnings=warnings)


def drawn_card(item: PictureItem) -> Card:
    """Returns the card of a picture, decoded in this process at the size at which it is drawn."""
    return _card(item, next(decoded_rows([_job(item)], workers=0)))


def dataset_preview(
    known: DatasetItems, *, title: str, per_bucket: int, thumbnails: Thumbnails, workers: int
) -> Preview:
    """Returns the preview of scanned pictures, of which it draws a few of each bucket."""
    buckets = _by_bucket(known.items)
    shown = {size: spread(items, per_bucket) for size, items in buckets.items()}
    flat = [item for items in shown.values() for item in items]
    drawn = thumbnails.drawn([_job(item) for item in flat], workers=workers)
    cards = (_card(item, pixels) for item, pixels in zip(flat, drawn, strict=True))
    sections = []
    for size, items in shown.items():
        rows = {(item.picture.image_hash, item.picture.mask_hash, cut) for item in buckets[size] for cut in item.cuts}
        sections.append(
            Section(
                width=size[0],
                height=size[1],
                pictures=len(buckets[size]),
                rows=len(rows),
                cards=tuple(itertools.islice(cards, len(items))),
            )
        )
    captions: dict[str, list[str]] = defaultdict(list)
    for item in itertools.chain.from_iterable(buckets.values()):
        captions[item.picture.subset.name].append(item.captions[0])
    tags = {name: tag_frequency(texts) for name, texts in captions.items()}
    return Preview(
        title=title,
        sections=tuple(sorted(sections, key=lambda section: (section.width / section.height, section.width))),
        warnings=known.warnings,
        held_out=sum(item.picture.split == "validation" for item in known.items),
        unreadable=tuple((file.name, file.reason) for file in known.unreadable),
        tags={name: dict(itertools.islice(table.items(), _TAGS_SHOWN)) for name, table in tags.items()},
    )


def _by_bucket(items: Iterable[PictureItem]) -> dict[Size, list[PictureItem]]:
    buckets: dict[Size, list[PictureItem]] = defaultdict(list)
    for item in items:
        buckets[item.cut.size].append(item)
    return buckets


def _full_name(picture: Picture) -> str:
    return f"{picture.subset.name}/{picture.name}"


def _window(cuts: Sequence[Cut]) -> tuple[int, int, int, int]:
    """Returns the part of the resized picture that is drawn: all cuts and something around them, as edges."""
    first = cuts[0]
    margin = (round(_AROUND * first.size[0]), round(_AROUND * first.size[1]))
    alike = [cut for cut in cuts if cut.resized == first.resized]
    left = max(0, min(cut.left for cut in alike) - margin[0])
    top = max(0, min(cut.top for cut in alike) - margin[1])
    right = min(first.resized[0], max(cut.left + cut.size[0] for cut in alike) + margin[0])
    bottom = min(first.resized[1], max(cut.top + cut.size[1] for cut in alike) + margin[1])
    return left, top, min(right, left + 3 * first.size[0]), min(bottom, top + 3 * first.size[1])


def _job(item: PictureItem) -> DecodeJob:
    """Returns the job that decodes a picture's window at the size it is drawn."""
    picture, first = item.picture, item.cut
    source, shrink = (picture.width, picture.height), CARD_PX / max(first.size)
    resized = (max(1, round(first.resized[0] * shrink)), max(1, round(first.resized[1] * shrink)))
    left, top, right, bottom = (round(edge * shrink) for edge in _window(item.cuts))
    small = replace(
        first,
        resized=resized,
        left=min(left, resized[0] - 1),
        top=min(top, resized[1] - 1),
        size=(max(1, min(right, resized[0]) - left), max(1, min(bottom, resized[1]) - top)),
        resize_filter=None if resized == source else filter_name(*source, resized, None),
    )
    return row_job(picture, small, latent_px=1)


def _boxes(cuts: Sequence[Cut]) -> tuple[Box, ...]:
    left, top, right, bottom = _window(cuts)
    width, height = right - left, bottom - top
    boxes = (
        ((cut.left - left) / width, (cut.top - top) / height, cut.size[0] / width, cut.size[1] / height)
        for cut in cuts
        if cut.resized == cuts[0].resized and not cut.flip
    )
    return tuple(dict.fromkeys(boxes))


def _card(item: PictureItem, drawn: Decoded) -> Card:
    pixels = drawn if isinstance(drawn, Pixels) else None
    unreadable = () if pixels else (f"left out: {drawn}",)
    return Card(
        name=one_line(item.picture.name),
        picture=pixels.rgb if pixels else np.full((CARD_PX // 2, CARD_PX, 3), 90, np.uint8),
        mask=pixels.mask if pixels else None,
        cuts=_boxes(item.cuts) if pixels else (),
        facts=item.facts,
        captions=item.captions,
        suggested=item.suggested,
        warnings=(*unreadable, *item.warnings),
    )


def _card_warnings(item: PictureItem) -> Iterator[str]:
    if item.scale >= _MUCH_ENLARGED:
        yield f"enlarged {item.scale:.1f} times"
    if item.cut_off >= _MUCH_CUT_OFF:
        yield f"{item.cut_off:.0%} of it is cut off"
    if item.picture.animated:
        yield "only the first frame is used"
    if len(item.copies) > 1:
        others = [one_line(name) for name in item.copies if name != _full_name(item.picture)]
        yield f"same file as {', '.join(others[:2])}"
    if item.seen and item.like:
        yield f"nearly the same as {one_line(item.like)}{', mirrored' if item.seen.mirrored else ''}"
    if item.seen and item.seen.blurred:
        yield "blurred everywhere"
    if not any(item.captions):
        yield "no caption"
    if item.long_caption:
        yield f"caption cut off: {item.long_caption.cut_off}"


def _warnings(
    buckets: Mapping[Size, Sequence[PictureItem]], everything: Sequence[PictureItem], copies: Sequence[Sequence[str]]
) -> Iterator[str]:
    """Yields what to know about the dataset as a whole."""
    enlarged = [item for item in everything if item.scale >= _MUCH_ENLARGED]
    yield from _about(enlarged, "enlarged by a quarter or more; bucket_no_upscale = true leaves them small")
    lone = [f"{width} x {height}" for (width, height), items in buckets.items() if len(items) == 1]
    if lone:
        yield f"{len(lone)} of {len(buckets)} buckets hold a single picture, so batches there have one: {listed(lone)}"
    if copies:
        same_ones = listed([one_line(" = ".join(same)) for same in copies])
        yield f"{count(len(copies), 'picture is', 'pictures are')} there more than once: {same_ones}"
    yield from _about([item for item in everything if not any(item.captions)], "without a caption")
    yield from _about([item for item in everything if any(map(is_no_text, item.captions))], NO_TEXT)
    yield from _about([item for item in everything if item.long_caption], "with a caption that is cut off")
    cropped = [item for item in everything if item.cut_off >= _MUCH_CUT_OFF]
    yield from _about(cropped, "of which a fifth or more is cut off")
    limited = Counter(
        item.cut.size for item in everything if cut_by_limit(item.cut.size, item.picture.subset.bucketing)
    )
    for (width, height), number in limited.items():
        yield f"{number} pictures train at {width} x {height}, well below the resolution: max_bucket_reso cuts them"


def _about(items: Sequence[PictureItem], what: str) -> Iterator[str]:
    if items:
        yield f"{count(len(items), 'picture')} {what}: {listed([one_line(item.picture.name) for item in items])}"
