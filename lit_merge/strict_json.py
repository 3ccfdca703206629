"""JSON from files of others, in which every name stands once and every text can be printed."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says.

    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the name 'a' stands there twice

    Raises:
        ValueError: If it is not well-formed, is nested too deeply, holds a name twice in one object
            (of which one would be lost), or half a character.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the name {name[:200]!r} stands there twice")
        for text in (name, value):
            if isinstance(text, str):
                text.encode()  # half of a surrogate pair is legal JSON, but no text
        fields[name] = value
    return fields


def _integer(text: str) -> int | float:
    # As other readers of JSON have it; an integer could not keep the sign.
    return -0.0 if text == "-0" else int(text)
