"""What is wrong with annotations and pictures: each fault by file and entry, and counted."""

from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

LISTED = 1000  # of a kind; the rest is counted


def short(value) -> str:
    """A value in a message: at most 60 printable characters."""
    value = value.item() if isinstance(value, np.generic) else value
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class Finding:
    """kind: one of a few; file: the annotation file or picture; entry: where in it (annotations[3], line 7), may be
    empty; message: what is there and what was expected; dropped: whether what it speaks of is left out."""

    kind: str
    file: str
    entry: str
    message: str
    dropped: bool

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.file, self.entry, self.message)))


class Findings(list):
    """A list of Finding, the first LISTED of each kind; `counts` counts all by kind, `dropped` those that leave out
    what they speak of. strict: the first of those is raised as a ValueError instead."""

    def __init__(self, strict: bool = False):
        super().__init__()
        self.strict, self.counts, self.dropped = strict, Counter(), Counter()

    def drop(self, kind: str, file, entry: str, message, count: int = 1) -> None:
        finding = Finding(kind, str(file), entry, str(message), True)
        if self.strict:
            raise ValueError(str(finding))
        self.dropped[kind] += count
        self._keep(finding, count)

    def drop_all(self, kind: str, file, places, entry, message) -> None:
        """`drop` for each of many places, with entry(place) and message(place); from LISTED on they are only
        counted."""
        for k in places[:LISTED]:
            self.drop(kind, file, entry(k), message(k))
        if more := len(places) - LISTED if len(places) > LISTED else 0:
            self.dropped[kind] += more
            self.counts[kind] += more

    def note(self, kind: str, file, entry: str, message, count: int = 1) -> None:
        self._keep(Finding(kind, str(file), entry, str(message), False), count)

    def _keep(self, finding: Finding, count: int) -> None:
        if self.counts[finding.kind] < LISTED:
            self.append(finding)
        self.counts[finding.kind] += count

    def to_json(self) -> dict:
        return dict(counts=dict(self.counts), dropped=dict(self.dropped), findings=[asdict(f) for f in self])
