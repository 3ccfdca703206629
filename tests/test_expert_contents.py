from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_merge.errors import InputError
from lit_merge.expert import write_expert
from tests.small_expert import INFO, activations, hessian, weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"head.bias": torch.tensor([1.0, torch.nan])}}, "weights: tensor 'head.bias'"),
        (
            {"weights": {"head.bias": torch.tensor([1.0, torch.inf])}},
            "must be finite in float32; g",
        ),
        ({"weights": {"head._orig_mod.bias": torch.ones(2)}}, "weights: must have different names"),
        (
            {"hessian": {"head.bias": torch.tensor([1.0, torch.nan])}},
            "hessian: tensor 'head.bias' m",
        ),
        (
            {"hessian": {"head.bias": torch.tensor([1.0, -1e-9])}},
            r"hessian: tensor 'head.bias' must not be negative; got -1e-09",
        ),
        (
            {"hessian": {"head.bias": torch.tensor([1.0, 1e39], dtype=torch.float64)}},
            "Give a Hessian that float32 can hold",
        ),
        (
            {"hessian": {"head.bias": torch.ones(3)}},
            r"hessian: tensor 'head.bias' must have the sh",
        ),
        (
            {"hessian": {"other": torch.ones(3)}},
            "hessian: must have the names of weights; got 'oth",
        ),
        (
            {"hessian": {"head.bias": torch.tensor([1, 2])}},
            "must be of a floating type; got torch.i",
        ),
        (
            {"activations": {"body.0.mean": torch.full((4,), torch.nan)}},
            "activations: tensor 'body",
        ),
        ({"activations": {"body.1.mean": torch.ones(4)}}, "got 'body.1.mean' without count"),
        ({"activations": {"body.0.max": torch.ones(4)}}, "of each site; got 'body.0.max'"),
        (
            {"activations": {"body.0.m2": torch.ones(5)}},
            "'body.0.m2' must have one axis, the channe",
        ),
        (
            {"activations": {"body.0.count": torch.ones(4)}},
            "'body.0.count' must have no axes; got s",
        ),
        (
            {"info": {"head_parameters": ("hed.weight",)}},
            "head_parameters: must be names of the wei",
        ),
        (
            {"info": {"tied_parameters": (("a", "b"),)}},
            "tied_parameters: must be names of the weigh",
        ),
        (
            {"info": {"weights": "last.ckpt"}},
            r"weights: must be a .safetensors file; got 'last.ckpt'",
        ),
        ({"info": {"details": {"path": Path()}}}, "details: must hold only what JSON can; got"),
        (
            {"info": {"details": {"nan": float("nan")}}},
            "details: must hold only what JSON can; got",
        ),
    ],
)
def test_what_cannot_be_used_is_never_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        write_expert(
            tmp_path / "expert",
            weights={**weights(), **changes.get("weights", {})},
            info=replace(INFO, **changes.get("info", {})),
            hessian={**hessian(), **changes.get("hessian", {})},
            activations={**activations(), **changes.get("activations", {})},
        )
    assert list(tmp_path.iterdir()) == []
