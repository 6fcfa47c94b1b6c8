"""The part of YAML that a YOLO data.yaml is written in: keys with a scalar, a list or a map of scalars, one level deep.

Read by hand, because it needs no more: no anchor, alias, tag or object that a YAML reader might follow.
"""

import json
import re
from pathlib import Path

from fastrcnn.data.findings import short
from fastrcnn.data.folders import read_text

_QUOTED = r'"(?:[^"\\]|\\.)*"|\'(?:[^\']|\'\')*\''
_COMMENT = re.compile(rf"({_QUOTED})|(?:^|(?<=\s))#.*")
_KEY = re.compile(rf"({_QUOTED}|[^\s\[\]{{}},:'\"#&*!|>%@`-][^:]*?|-?[0-9]+)\s*:(?:\s+(.*)|)$")
_ITEM = re.compile(rf"\s*({_QUOTED}|[^,\[\]{{}}'\"]*?)\s*(,|$)")
_PAIR = re.compile(rf"\s*({_QUOTED}|[^,:\[\]{{}}'\"]+?)\s*:\s+({_QUOTED}|[^,\[\]{{}}'\"]*?)\s*(,|$)")


def _scalar(text: str) -> str:
    text = text.strip()
    if text[:1] == '"':
        try:
            return json.loads(text)
        except ValueError:  # of backslashes in a path of Windows
            return text[1:-1]
    if text[:1] == "'":
        return text[1:-1].replace("''", "'")
    if text[:1] in ("&", "*", "!", "|", ">", "%", "@", "`"):
        raise ValueError(f"{short(text)} is none of the plain values that a data.yaml has")
    return text


def _flow(text: str) -> list[str] | dict[str, str]:
    """[a, b] or {a: b}"""
    inner, pattern = text[1:-1].strip(), _ITEM if text[0] == "[" else _PAIR
    found, at = [], 0
    while at < len(inner):
        match = pattern.match(inner, at)
        if match is None:
            raise ValueError(f"expected plain values between brackets, got {short(inner[at:])}")
        found.append([_scalar(group) for group in match.groups()[:-1]])
        at = match.end()
    return [value for (value,) in found] if text[0] == "[" else dict(found)


def _value(text: str):
    if text[:1] in ("[", "{"):
        if text[-1] != {"[": "]", "{": "}"}[text[0]]:
            raise ValueError(f"expected one closing bracket at the end of {short(text)}")
        return _flow(text)
    return _scalar(text)


def read_data_yaml(path: Path) -> dict[str, str | list[str] | dict[str, str]]:
    """The keys of a file and their values, all as texts. Raises ValueError naming file and line for what is not as
    above."""
    found: dict = {}
    key, open_text, start = None, "", 0  # of the value that goes on over lines
    script = False  # in the lines of a text that begins with | or >
    for number, raw in enumerate(read_text(path).splitlines(), 1):
        line = _COMMENT.sub(lambda match: match.group(1) or "", raw).rstrip()
        text = line.strip()
        script = script and (not text or line[0] in " \t")
        if script:
            continue
        try:
            if open_text:
                open_text += " " + text
            elif not text or text in ("---", "..."):
                continue
            elif text[0] == "-" and text[:2] in ("-", "- ") and key is not None:
                found[key] = found[key] or []
                found[key].append(_scalar(text[1:]))
                continue
            elif (match := _KEY.match(text)) is None:
                raise ValueError(f"expected key: value, got {short(text)}")
            elif line[0] in " \t" and key is not None and isinstance(found[key] or {}, dict):
                found[key] = found[key] or {}
                found[key][_scalar(match.group(1))] = _value(match.group(2) or "")
                continue
            elif line[0] in " \t":
                raise ValueError(f"expected no deeper level, got {short(text)}")
            else:
                key, open_text, start = _scalar(match.group(1)), match.group(2) or "", number
                if open_text[:1] in ("|", ">"):
                    script, open_text = True, ""
            if open_text[:1] in ("[", "{") and open_text.count(open_text[0]) > open_text.count(
                "]}"["[{".index(open_text[0])]
            ):
                if number - start > 100_000:
                    raise ValueError("a list without an end")
                continue
            found[key], open_text = _value(open_text), ""
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
    if open_text:
        raise ValueError(f"{path}: line {start}: a list without an end")
    return found
