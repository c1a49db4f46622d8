"""Cards of a dataset before anything is encoded: the very cuts, masks and captions that the encode stages will make."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from sd3pipe.console import count, listed, one_line
from sd3pipe.data.buckets import Size, cut_by_limit
from sd3pipe.data.captions import processed_captions, tag_frequency
from sd3pipe.data.decoding import Job, Pixels
from sd3pipe.data.feed import decoded_rows
from sd3pipe.data.filters import filter_name
from sd3pipe.data.geometry import Cut, View, views_of_all
from sd3pipe.data.scan import Picture, Scan
from sd3pipe.previewing.cards import CARD_PX, Box, CaptionTokens, Card, Preview, Section, spread

_AROUND = 0.25  # of a cut's side, shown on each side of it
_MUCH_ENLARGED = 1.25
_MUCH_CUT_OFF = 0.2
_TAGS_SHOWN = 60

CountTokens = Callable[[Sequence[str]], Mapping[str, CaptionTokens]]  # of captions; of none without tokenizers

Found = tuple[Picture, list[View], tuple[str, ...]]  # a picture, its cuts, its captions


def dataset_preview(
    found: Scan,
    *,
    title: str,
    per_bucket: int,
    caption_variants: int,
    crop_variants: int,
    seed: int,
    count_tokens: CountTokens,
    workers: int,
) -> Preview:
    """Returns the preview of scanned pictures."""
    buckets: dict[Size, list[Found]] = defaultdict(list)
    pictures, unreadable = views_of_all(found, crop_variants=crop_variants, seed=seed)
    for cuts in pictures:
        captions = processed_captions(cuts[0].picture, variants=caption_variants, seed=seed)
        buckets[cuts[0].cut.size].append((cuts[0].picture, cuts, captions))
    everything = [item for items in buckets.values() for item in items]
    tokens = count_tokens(sorted({caption for _, _, captions in everything for caption in captions}))
    copies = _copies(everything)
    shown = {size: spread(items, per_bucket) for size, items in buckets.items()}
    drawn = decoded_rows((_job(item) for items in shown.values() for item in items), workers=workers)
    sections = []
    for size, items in shown.items():
        cards = tuple(_card(item, next(drawn), copies, tokens) for item in items)
        rows = len({(picture.image_hash, picture.mask_hash, v.cut) for picture, cuts, _ in buckets[size] for v in cuts})
        sections.append(Section(width=size[0], height=size[1], pictures=len(buckets[size]), rows=rows, cards=cards))
    return Preview(
        title=title,
        sections=tuple(sorted(sections, key=lambda section: (section.width / section.height, section.width))),
        warnings=tuple(_warnings(buckets, everything, copies, tokens)),
        unreadable=tuple((file.name, file.reason) for file in unreadable),
        tags=_tags(everything),
    )


def _scale(picture: Picture, cut: Cut) -> float:
    """Returns how many times larger the picture becomes, each way."""
    return max(cut.resized[0] / picture.width, cut.resized[1] / picture.height)


def _share_cut_off(cut: Cut) -> float:
    return 1 - (cut.size[0] * cut.size[1]) / (cut.resized[0] * cut.resized[1])


def _copies(everything: Sequence[Found]) -> dict[tuple[int, str], list[str]]:
    """Returns the names of pictures of equal content, by dataset and content, where there are several."""
    names: dict[tuple[int, str], list[str]] = defaultdict(list)
    for picture, _, _ in everything:
        names[picture.subset.dataset, picture.image_hash].append(_full_name(picture))
    return {key: same for key, same in names.items() if len(same) > 1}


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


def _job(item: Found) -> Job:
    """Returns the job that decodes a picture's window at the size it is drawn."""
    picture, found_views, _ = item
    cuts = [view.cut for view in found_views]
    first = cuts[0]
    source, shrink = (picture.width, picture.height), CARD_PX / max(first.size)
    resized = (max(1, round(first.resized[0] * shrink)), max(1, round(first.resized[1] * shrink)))
    left, top, right, bottom = (round(edge * shrink) for edge in _window(cuts))
    small = replace(
        first,
        resized=resized,
        left=min(left, resized[0] - 1),
        top=min(top, resized[1] - 1),
        size=(max(1, min(right, resized[0]) - left), max(1, min(bottom, resized[1]) - top)),
        resize_filter=None if resized == source else filter_name(*source, resized, None),
    )
    return Job(
        path=picture.path,
        image_hash=picture.image_hash,
        mask_path=picture.mask_path,
        mask_hash=picture.mask_hash,
        cut=small,
        latent_px=1,
    )


def _boxes(cuts: Sequence[Cut]) -> tuple[Box, ...]:
    left, top, right, bottom = _window(cuts)
    width, height = right - left, bottom - top
    boxes = (
        ((cut.left - left) / width, (cut.top - top) / height, cut.size[0] / width, cut.size[1] / height)
        for cut in cuts
        if cut.resized == cuts[0].resized and not cut.flip
    )
    return tuple(dict.fromkeys(boxes))


def _card(
    item: Found, drawn: object, copies: dict[tuple[int, str], list[str]], tokens: Mapping[str, CaptionTokens]
) -> Card:
    picture, found_views, captions = item
    cuts = [view.cut for view in found_views]
    pixels = drawn if isinstance(drawn, Pixels) else None
    token_facts = (tokens[captions[0]].shown,) if captions[0] in tokens else ()
    unreadable = () if pixels else (f"left out: {drawn}",)
    return Card(
        name=one_line(picture.name),
        picture=pixels.rgb if pixels else np.full((CARD_PX // 2, CARD_PX, 3), 90, np.uint8),
        mask=pixels.mask if pixels else None,
        cuts=_boxes(cuts) if pixels else (),
        facts=(*_facts(picture, found_views), *token_facts),
        captions=captions,
        warnings=(*unreadable, *_card_warnings(picture, cuts[0], captions, copies, tokens)),
    )


def _facts(picture: Picture, found_views: Sequence[View]) -> Iterator[str]:
    cut = found_views[0].cut
    scale = _scale(picture, cut)
    change = "as it is" if scale == 1 else f"{'enlarged' if scale > 1 else 'reduced'} to {scale:.0%}"
    cut_off = f", {_share_cut_off(cut):.0%} cut off" if _share_cut_off(cut) >= 0.005 else ""
    yield f"{picture.width} x {picture.height}, {change}{cut_off}"
    crops = len({view.cut for view in found_views if not view.flip})
    more = [f"{crops} random crops"] if crops > 1 else []
    more += ["mirrored too"] if any(view.flip for view in found_views) else []
    more += ["validation"] if picture.split == "validation" else []
    more += [f"seen {picture.subset.num_repeats} times"] if picture.subset.num_repeats > 1 else []
    more += ["regularisation"] if picture.subset.is_reg else []
    yield ", ".join([f"subset {one_line(picture.subset.name)}", *more])


def _first_cut_off(captions: Sequence[str], tokens: Mapping[str, CaptionTokens]) -> CaptionTokens | None:
    """Returns the first of a picture's captions that is cut off."""
    counted = (tokens[caption] for caption in captions if caption in tokens)
    return next((caption for caption in counted if caption.cut_off), None)


def _card_warnings(
    picture: Picture,
    cut: Cut,
    captions: Sequence[str],
    copies: dict[tuple[int, str], list[str]],
    tokens: Mapping[str, CaptionTokens],
) -> Iterator[str]:
    if _scale(picture, cut) >= _MUCH_ENLARGED:
        yield f"enlarged {_scale(picture, cut):.1f} times"
    if _share_cut_off(cut) >= _MUCH_CUT_OFF:
        yield f"{_share_cut_off(cut):.0%} of it is cut off"
    if picture.animated:
        yield "only the first frame is used"
    same = copies.get((picture.subset.dataset, picture.image_hash), [])
    if len(same) > 1:
        others = [one_line(name) for name in same if name != _full_name(picture)]
        yield f"same file as {', '.join(others[:2])}"
    if not any(captions):
        yield "no caption"
    if long := _first_cut_off(captions, tokens):
        yield f"caption cut off: {long.cut_off}"


def _warnings(
    buckets: dict[Size, list[Found]],
    everything: Sequence[Found],
    copies: dict[tuple[int, str], list[str]],
    tokens: Mapping[str, CaptionTokens],
) -> Iterator[str]:
    """Yields what to know about the dataset as a whole."""
    enlarged = [p.name for p, cuts, _ in everything if _scale(p, cuts[0].cut) >= _MUCH_ENLARGED]
    yield from _about(enlarged, "{} enlarged by a quarter or more; bucket_no_upscale = true leaves them small")
    lone = [f"{width} x {height}" for (width, height), items in buckets.items() if len(items) == 1]
    if lone:
        yield f"{len(lone)} of {len(buckets)} buckets hold a single picture, so batches there have one: {_list(lone)}"
    if copies:
        same_ones = _list(" = ".join(same) for same in copies.values())
        yield f"{count(len(copies), 'picture is', 'pictures are')} there more than once: {same_ones}"
    yield from _about([p.name for p, _, captions in everything if not any(captions)], "{} without a caption")
    long = [p.name for p, _, captions in everything if _first_cut_off(captions, tokens)]
    yield from _about(long, "{} with a caption that is cut off")
    cropped = [p.name for p, cuts, _ in everything if _share_cut_off(cuts[0].cut) >= _MUCH_CUT_OFF]
    yield from _about(cropped, "{} of which a fifth or more is cut off")
    sizes = [cuts[0].cut.size for p, cuts, _ in everything if cut_by_limit(cuts[0].cut.size, p.subset.bucketing)]
    limited = Counter(sizes)
    for (width, height), number in limited.items():
        yield f"{number} pictures train at {width} x {height}, well below the resolution: max_bucket_reso cuts them"


def _about(names: Sequence[str], text: str) -> Iterator[str]:
    if names:
        yield f"{text.format(count(len(names), 'picture'))}: {_list(names)}"


def _list(names: Iterable[str]) -> str:
    return listed([one_line(name) for name in names])


def _tags(everything: Sequence[Found]) -> dict[str, dict[str, int]]:
    """Returns the most frequent tags of each subset whose captions look like lists of tags."""
    captions: dict[str, list[str]] = defaultdict(list)
    for picture, _, found in everything:
        captions[picture.subset.name].append(found[0])
    tables = {name: tag_frequency(texts) for name, texts in captions.items()}
    return {name: dict(list(table.items())[:_TAGS_SHOWN]) for name, table in tables.items()}
