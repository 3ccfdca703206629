"""``adapter_config.json`` of PEFT: what kind of adapter lies beside it, and how it is scaled.

Only the plain low-rank update of LoRA is a difference of weights that can be merged like any other.
What changes the layer in another way, or the base itself before training, is refused by name: taken
as LoRA, it would give a model that loads and is wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lit_merge.errors import InputError
from lit_merge.location import Location
from lit_merge.strict_json import parse_json

CONFIG = "adapter_config.json"

_APPLY = (
    "Apply it to its base with PEFT (merge_and_unload(), then save_pretrained()), and give the "
    "whole model as the expert."
)
# Entries that make of an adapter something else than W + scaling · B·A.
_VARIANTS = {
    "use_dora": "DoRA, which also rescales the base's weights",
    "use_qalora": "QALoRA, which pools the inputs",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "alora_invocation_tokens": "activated LoRA, which works on some tokens only",
    "arrow_config": "Arrow, which chooses among adapters by token",
    "kasa_config": "KaSA, which scales the singular values",
    "monteclora_config": "MonteCLoRA, which samples its factors",
    "layer_replication": "an adapter of replicated layers",
    "target_parameters": "LoRA of single parameters (target_parameters)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
}
# Ways to begin that leave the base as it is; the others subtract the first B·A from its weights.
_HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


_T = TypeVar("_T")


@dataclass(frozen=True)
class AdapterConfig:
    """What of ``adapter_config.json`` decides about the weights.

    Attributes:
        path: The file.
        rank: r of the layers that no pattern names.
        alpha: The numerator of the scaling of the layers that no pattern names.
        rank_pattern: r by regular expression of module names.
        alpha_pattern: As ``rank_pattern``.
        use_rslora: Whether alpha is divided by √r instead of r.
        fan_in_fan_out: Whether weights are stored as [in, out], as GPT-2's are.
        base_model: What the adapter says that it was trained on; "" for nothing.
        task_type: PEFT's name of the kind of model, or None.
    """

    path: Location
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    fan_in_fan_out: bool
    base_model: str = ""
    task_type: str | None = None

    def rank_of(self, module: str) -> int:
        """Return r of a module."""
        return self._chosen(self.rank_pattern, module, self.rank)

    def scaling_of(self, module: str) -> float:
        """Return what B·A of a module is multiplied with.

        References:
            Hu et al. (2021), arXiv:2106.09685: α/r. Kalajdzievski (2023), arXiv:2312.03732: α/√r.
        """
        alpha = self._chosen(self.alpha_pattern, module, self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _chosen(self, patterns: Mapping[str, _T], module: str, default: _T) -> _T:
        """Return the value of the first pattern that fits a whole name, or its last components."""
        for pattern, value in patterns.items():
            try:
                fits = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise InputError(
                    f"{self.path}: patterns must be regular expressions; got {pattern!r} "
                    f"({error}). Correct rank_pattern and alpha_pattern."
                ) from error
            if fits:
                return value
        return default


def read_adapter_config(folder: Location) -> AdapterConfig:
    """Read ``adapter_config.json`` in a folder.

    Raises:
        InputError: It is missing or damaged, or the adapter is no plain LoRA.
    """
    path = folder / CONFIG
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: must be JSON; got {error}. Copy or save the adapter again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: must be a JSON object; got {type(content).__name__}. Save the adapter again."
        )
    kind = content.get("peft_type")
    if kind != "LORA":
        raise InputError(f'{path}: peft_type must be "LORA"; got {kind!r}. {_APPLY}')
    for key, what in _VARIANTS.items():
        if content.get(key):
            raise InputError(f"{path}: must be plain LoRA; got {what} ({key}). {_APPLY}")
    begun = content.get("init_lora_weights", True)
    if begun not in _HARMLESS_INITS:
        raise InputError(
            f"{path}: init_lora_weights must leave the base's weights as they are; got {begun!r}, "
            "whose B·A is relative to a changed base. Save the adapter with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it "
            "one of the base itself."
        )
    return AdapterConfig(
        path=path,
        rank=_positive_int(content.get("r"), "r", path),
        alpha=_number(content.get("lora_alpha"), "lora_alpha", path),
        rank_pattern=_patterns(content, "rank_pattern", path, _positive_int),
        alpha_pattern=_patterns(content, "alpha_pattern", path, _number),
        use_rslora=_switch(content, "use_rslora", path),
        fan_in_fan_out=_switch(content, "fan_in_fan_out", path),
        base_model=str(content.get("base_model_name_or_path") or ""),
        task_type=_text(content.get("task_type"), "task_type", path),
    )


def _patterns(content: Mapping[str, Any], key: str, path: Location, check: Any) -> dict[str, Any]:
    given = content.get(key) or {}
    if not isinstance(given, dict):
        raise _wrong(path, key, "values by pattern", given)
    return {pattern: check(value, f"{key}[{pattern!r}]", path) for pattern, value in given.items()}


def _positive_int(value: object, key: str, path: Location) -> int:
    if type(value) is not int or value < 1:
        raise _wrong(path, key, "a positive integer", value)
    return value


def _number(value: object, key: str, path: Location) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(path, key, "a finite number", value)
    return float(value)


def _switch(content: Mapping[str, Any], key: str, path: Location) -> bool:
    value = content.get(key) or False
    if not isinstance(value, bool):
        raise _wrong(path, key, "true or false", value)
    return value


def _text(value: object, key: str, path: Location) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _wrong(path, key, "a text or null", value)
    return value


def _wrong(path: Location, key: str, what: str, value: object) -> InputError:
    return InputError(f"{path}: {key} must be {what}; got {value!r}. Correct or save it again.")
