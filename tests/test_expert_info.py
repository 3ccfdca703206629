from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.expert.info import ExpertInfo
from tests.small_expert import written


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 0}, "num_examples: must be a positive integer; got 0"),
        ({"num_examples": 1.5}, "num_examples: must be a positive integer; got 1.5"),
        ({"reduction": "mean"}, 'reduction: must be "sum"'),
        ({"task": 3}, "task: must be a text or null; got 3"),
        ({"fingerprint": "xyz"}, "fingerprint: must be 64 hexadecimal digits; got 'xyz'"),
        ({"head_parameters": "head"}, "head_parameters: must be a list of names; got 'head'"),
        ({"tied_parameters": ("ab",)}, "tied_parameters: must be a list of names; got 'ab'"),
        ({"tied_parameters": "ab"}, "tied_parameters: must be a list of lists; got 'ab'"),
        ({"weights": "../x.safetensors"}, "weights: must be a path inside the expert folder; got"),
        ({"weights": "/x.safetensors"}, "weights: must be a path inside the expert folder; got"),
        ({"details": [1]}, r"details: must be values by name; got \[1\]"),
        ({"versions": None}, "versions: must be values by name; got None"),
    ],
)
def test_an_info_is_checked_when_it_is_made_and_when_it_is_read(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        ExpertInfo(**changes)
    path = written(tmp_path / "expert")
    content = json.loads((path / "expert.json").read_text())
    (path / "expert.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError, match=rf"expert\.json: {message}"):
        open_expert(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"expert\.json: must be JSON; got"),
        ("[" * 100_000, r"expert\.json: must be JSON; got"),
        ("[]", r"expert\.json: must hold entries by name; got a list"),
        ("{}", "must have format_version 1; got None"),
        (
            '{"format_version": 2}',
            "must have format_version 1; got 2. Use the lit-merge that wrote",
        ),
        ('{"format_version": 1, "labls": "x"}', "got 'labls'. Did you mean 'labels'?"),
        ('{"format_version": 1, "zzz": "x"}', "got 'zzz'. Put it under details"),
    ],
)
def test_a_damaged_expert_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path / "expert")
    (path / "expert.json").write_text(text)
    with pytest.raises(InputError, match=message):
        open_expert(path)
