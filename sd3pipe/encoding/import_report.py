"""What an import took over and what it refused, row by row."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sd3pipe.cache.keys import Kind
from sd3pipe.console import count, one_line

_SHOWN = 3  # rows that a line names


@dataclass(slots=True, kw_only=True)
class ImportReport:
    """Counts and reasons of one kind of rows. `off` is the largest distance of a row that was encoded again."""

    kind: Kind
    imported: int = 0
    verified: int = 0
    off: float = 0.0
    refused: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def refuse(self, name: str, reason: str) -> None:
        self.refused.append((one_line(name), reason))

    def keep_right(
        self, keys: Sequence[str], wrong: Mapping[str, str], names: Mapping[str, str], *, checked: int
    ) -> list[str]:
        """Returns the rows to take, given those that proved wrong: the others only if all were checked."""
        if wrong and checked < len(keys):
            reason = (
                f"{len(wrong)} of {checked} rows that were encoded again are wrong, so none is taken on trust "
                f"(--verify-rows {len(keys)} checks each)"
            )
            for key in keys:
                self.refuse(names[key], wrong.get(key, reason))
            return []
        for key, reason in wrong.items():
            self.refuse(names[key], reason)
        return [key for key in keys if key not in wrong]

    def lines(self) -> Iterator[str]:
        """Yields the counts, and a line for each reason."""
        rows = self.imported + len(self.refused)
        checked = f", {self.verified} encoded again and off by {self.off:.2%} at most" if self.verified else ""
        yield f"{self.kind}: {self.imported} of {count(rows, 'row')} imported{checked}"
        for reason, number in Counter(reason for _, reason in self.refused).most_common():
            names = [name for name, why in self.refused if why == reason]
            more = f" and {number - _SHOWN} more" if number > _SHOWN else ""
            yield f"  refused, {number}: {reason}: {', '.join(names[:_SHOWN])}{more}"

    def to_json(self) -> dict[str, Any]:
        refused = [{"name": name, "reason": reason} for name, reason in self.refused]
        return {"imported": self.imported, "verified": self.verified, "off": self.off, "refused": refused}


def drawn_to_verify(keys: Sequence[str], number: int) -> list[str]:
    """Returns which rows to encode again: keys are hashes, so the smallest ones are a random choice that repeats."""
    return sorted(keys)[:number]
