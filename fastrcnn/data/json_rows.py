"""Large JSON files piece by piece: the lists of an object as runs of rows, so that a file is never in memory as a
whole."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

WINDOW = 1 << 22  # bytes read at a time
RUN = 1 << 14  # rows given at a time, about
STRETCH, TAIL = 1 << 20, 1 << 14  # characters read at once, and the last of them among which to cut
_BETWEEN = re.compile(r"\}[ \t\n\r]*,[ \t\n\r]*\{")
_BLANK = re.compile(r"[ \t\n\r]*")
_scan = json.JSONDecoder().scan_once


class _Window:
    """The text of a file from `at` on, which grows to the right as it is asked for and is forgotten to the left."""

    def __init__(self, file):
        self.file, self.text, self.at, self.before, self.ended = file, "", 0, 0, False
        first = file.read(WINDOW)
        self.decode = codecs.getincrementaldecoder(json.detect_encoding(first))("surrogatepass").decode
        self.text = self.decode(first)

    def grow(self) -> bool:
        """Reads as much again as is there. False at the end of the file."""
        if self.ended:
            return False
        data = self.file.read(max(WINDOW, len(self.text) - self.at))
        if not data:
            self.ended = True
            self.decode(b"", True)  # raises for half a character
            return False
        self.before += self.at
        self.text, self.at = self.text[self.at :] + self.decode(data), 0
        return True

    def peek(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            self.at = _BLANK.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def take(self, character: str) -> None:
        if self.peek() != character:
            raise self.error(f"expected {character!r}")
        self.at += 1

    def value(self):
        """The value that begins here."""
        self.peek()
        while True:
            try:
                found, end = _scan(self.text, self.at)
                # A number may go on behind the window.
                if end < len(self.text) or not self.grow():
                    self.at = end
                    return found
            except StopIteration as stop:
                if self._is_wrong(stop.value) or not self.grow():
                    raise self.error("expected a value", stop.value) from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string")
                if (not cut and self._is_wrong(error.pos)) or not self.grow():
                    raise self.error(error.msg, error.pos) from None

    def objects(self) -> list:
        """As many of the objects that follow each other here as lie in the next stretch of the text, at once; [] where
        they are not told apart so quickly."""
        if len(self.text) - self.at < STRETCH:
            self.grow()
        cuts = list(_BETWEEN.finditer(self.text, max(self.at, self.at + STRETCH - TAIL), self.at + STRETCH))
        if not cuts:
            return []
        end_of_last = cuts[-1].start() + 1
        # It is a list only if the cut is between two of its rows: brackets and quotes have to go up.
        try:
            rows, end = _scan("[" + self.text[self.at : end_of_last] + "]", 0)
        except (StopIteration, json.JSONDecodeError):
            return []
        if end != end_of_last - self.at + 2:  # the list ended before
            return []
        self.at = end_of_last
        return rows

    def _is_wrong(self, position: int) -> bool:
        """Whether an error lies so far from the window's end that reading on cannot mend it."""
        return position < len(self.text) - 64

    def error(self, said: str, position: int | None = None) -> ValueError:
        return ValueError(f"{said} at character {self.before + (self.at if position is None else position)}")


def _rows(window: _Window, part: str) -> Iterator[tuple[str, int, list]]:
    window.take("[")
    first, ends = 0, window.peek() == "]"
    while True:
        rows = [] if ends else window.objects()
        more = 0 if ends or rows else RUN
        while more and len(rows) < more:
            if rows:
                window.take(",")
            rows.append(window.value())
            if window.peek() == "]":
                ends, more = True, 0
        yield part, first, rows
        first += len(rows)
        if ends:
            return window.take("]")
        window.take(",")


def _parts(window: _Window, wanted: tuple[str, ...]) -> Iterator[tuple[str, int, object]]:
    if window.peek() != "{":
        window.value()
    else:
        window.take("{")
        ends = window.peek() == "}"
        while not ends:
            key = window.value()
            if not isinstance(key, str):
                raise window.error("expected a key in quotes")
            window.take(":")
            if key not in wanted:
                window.value()
            elif window.peek() == "[":
                yield from _rows(window, key)
            else:
                yield key, 0, window.value()
            ends = window.peek() == "}"
            if not ends:
                window.take(",")
        window.take("}")
    if window.peek():
        raise window.error("expected the end of the file")


def json_parts(path: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, int, object]]:
    """(key, place of its first row, rows) of the wanted keys of the object in a JSON file, in the file's order: a list
    in runs of at most RUN rows (an empty one once), another value as it is. What else the file holds is read and
    forgotten.

    UTF-8, UTF-16 or UTF-32, with a byte-order mark or without. Raises ValueError naming the file for what is no JSON,
    OSError where it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a file")
    with open(path, "rb") as file:
        try:
            yield from _parts(_Window(file), wanted)
        except (ValueError, RecursionError) as error:
            file.seek(0)
            hint = ": XML, as Pascal VOC's files are; COCO's are JSON" if file.read(99).lstrip()[:1] == b"<" else ""
            if isinstance(error, UnicodeDecodeError):
                hint = f": its bytes are no text ({error.reason})"
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(f"{path}: not JSON{hint or f' ({reason})'}") from None
