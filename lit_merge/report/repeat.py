"""What has to be typed to do a thing again: the YAML of a merge or of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lit_merge.evaluation import Evaluation
from lit_merge.merge_record import MergeRecord


def merge_yaml(record: MergeRecord) -> str | None:
    """Return a configuration of ``lit-merge merge``, or None where the record does not say enough.

    Paths are as they were given, so that the command is to be run in the same folder.
    """
    content = record.provenance
    experts, base = content.get("experts"), content.get("base")
    if not isinstance(experts, Mapping) or not isinstance(content.get("method"), Mapping):
        return None
    try:
        settings: dict[str, Any] = {
            "base": None if base is None else base["path"],
            "experts": {task: experts[task]["path"] for task in record.tasks},
            "method": content["method"],
        }
    except (KeyError, TypeError):
        return None
    overrides = content.get("overrides") or {}
    optional = {
        "base_hessian": content.get("base_hessian"),
        "policy": content.get("policy"),
        "overrides": {
            pattern: {key: value for key, value in override.items() if value is not None}
            for pattern, override in overrides.items()
        },
        "dtype": content.get("dtype"),
        "accumulate": content.get("accumulate"),
    }
    settings |= {key: value for key, value in optional.items() if value}
    return as_yaml({**settings, "output": record.name})


def evaluation_yaml(evaluation: Evaluation) -> str | None:
    """Return the configuration of ``lit-merge evaluate``, or None of an evaluation by hand."""
    text = evaluation.provenance.get("configuration")
    return text.strip() if isinstance(text, str) else None


def as_yaml(value: object) -> str:
    """Return a record as readable text."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text.strip()
