from __future__ import annotations

import pytest

from lit_merge.strict_json import parse_json


def test_json_is_read() -> None:
    assert parse_json('{"a": [1, {"b": "é"}], "c": null}') == {"a": [1, {"b": "é"}], "c": None}
    assert parse_json(b"[1.5, true]") == [1.5, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        (b"\xff\xfe\x00", "codec can't decode"),
        ("[" * 100_000, "nested too deeply"),
        ('{"x": {"a": 1, "b": 2, "a": 3}}', "the name 'a' stands there twice"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_anything_else_is_a_value_error(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
