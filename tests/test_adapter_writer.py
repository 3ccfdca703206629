from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_merge.checkpoint import AdaptedWeight, open_checkpoint, open_state_dict
from lit_merge.checkpoint.adapter_writer import (
    WrittenAdapter,
    adapted_weights,
    largest_rank,
    write_adapter,
)
from lit_merge.errors import InputError
from tests.tiny_adapters import RANK, adapted, bert, gpt2, layers, save_adapter

CASES = {
    "linear": (bert, {"target_modules": ["query", "dense"]}),
    "Conv1D and embedding": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True},
    ),
    "convolutions": (layers, {"target_modules": ["conv", "point", "signal", "table"]}),
}
LINEAR = AdaptedWeight("fc", "linear")


def loaded_by_peft(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Return the tensors that PEFT makes of a model and an adapter, which must fit entirely."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
        found = peft.get_peft_model_state_dict(wrapped)
        stored = load_file(folder / "adapter_model.safetensors")
        assert {name for name in found if "lora_" in name} == set(stored)
        for name, value in stored.items():
            assert torch.equal(found[name], value), name
        state: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    return {name: value.detach() for name, value in state.items()}


def whole(checkpoint: Any) -> dict[str, Tensor]:
    return {name: checkpoint.tensor(name).clone() for name in checkpoint}


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("kind", CASES)
def test_an_adapter_written_at_its_own_rank_is_that_adapter(
    tmp_path: Path, kind: str, alpha: float | None
) -> None:
    make, config = CASES[kind]
    model = make()
    base = open_state_dict(model.state_dict())
    folder = save_adapter(adapted(model, 1, **config), tmp_path / "one")
    with open_checkpoint(folder, base=base) as expert:
        merged = whole(expert)
        (tmp_path / "two").mkdir()
        written = write_adapter(
            tmp_path / "two",
            base,
            expert,
            rank=RANK,
            weights=adapted_weights([base, expert]),
            alpha=alpha,
        )
        assert set(written.errors) == set(expert.updates)  # type: ignore[attr-defined]
    assert max(written.errors.values()) < 1e-5
    assert written.relative_error < 1e-5
    for name, value in loaded_by_peft(model, tmp_path / "two").items():
        if name in merged:
            torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-5)
    with open_checkpoint(tmp_path / "two", base=base) as again:
        for name in again:
            torch.testing.assert_close(again.tensor(name), merged[name], rtol=0, atol=1e-5)


def written(tmp_path: Path, **options: Any) -> WrittenAdapter:
    base, merged = states()
    settings = {"rank": 2, "weights": {"fc.weight": LINEAR}, **options}
    return write_adapter(tmp_path, open_state_dict(base), open_state_dict(merged), **settings)


def states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    base = {"fc.weight": torch.randn(6, 4), "fc.bias": torch.randn(6), "step": torch.tensor(3)}
    return base, base | {"fc.weight": base["fc.weight"] + torch.randn(6, 4)}


def test_what_is_lost_by_truncation_is_returned_and_recorded(tmp_path: Path) -> None:
    result = written(tmp_path)
    base, merged = states()
    values = torch.linalg.svdvals((merged["fc.weight"] - base["fc.weight"]).double())
    error = float((values[2:] ** 2).sum() / (values**2).sum()) ** 0.5
    assert result.errors == {"fc.weight": pytest.approx(error, abs=1e-6)}
    assert result.relative_error == pytest.approx(error, abs=1e-6)
    assert result.lost == ()
    record = json.loads((tmp_path / "truncation.json").read_text())
    assert record["rank"] == 2
    assert record["weights"]["fc.weight"]["relative_error"] == result.errors["fc.weight"]
    assert record["weights"]["fc.weight"]["norm"] == pytest.approx(float(values.norm()))


def test_the_overall_error_weighs_by_the_norms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"a.weight": torch.zeros(5, 5), "b.weight": torch.zeros(5, 5)}
    merged = {"a.weight": torch.randn(5, 5), "b.weight": 10 * torch.randn(5, 5)}
    weights = {name: AdaptedWeight(name[0], "linear") for name in base}
    result = write_adapter(
        tmp_path,
        open_state_dict(base),
        open_state_dict(merged),
        rank=1,
        weights=weights,
    )
    rest = sum((result.errors[n] * float(merged[n].norm())) ** 2 for n in base)
    total = sum(float(value.norm()) ** 2 for value in merged.values())
    assert result.relative_error == pytest.approx((rest / total) ** 0.5)


def test_other_changes_are_refused_or_dropped_with_a_note(tmp_path: Path) -> None:
    base, merged = states()
    merged = {**merged, "fc.bias": base["fc.bias"] + 1, "head.weight": torch.ones(2)}
    arguments = (tmp_path, open_state_dict(base), open_state_dict(merged))
    weights = {"fc.weight": LINEAR}
    message = r"must differ from <memory> only in .*; got other values for 'fc\.bias', 'head\.weig"
    with pytest.raises(InputError, match=message):
        write_adapter(*arguments, rank=2, weights=weights)
    assert list(tmp_path.iterdir()) == []
    result = write_adapter(*arguments, rank=2, weights=weights, others="drop")
    assert result.lost == ("fc.bias", "head.weight")
    record = json.loads((tmp_path / "truncation.json").read_text())
    assert record["lost"] == ["fc.bias", "head.weight"]


def test_other_tensors_may_be_rounded_to_the_merged_type(tmp_path: Path) -> None:
    base, merged = states()
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in merged.items()}
    result = write_adapter(
        tmp_path,
        open_state_dict(base),
        open_state_dict(half),
        rank=4,
        weights={"fc.weight": LINEAR},
    )
    assert result.lost == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank: must be at least 1; got 0"),
        ({"alpha": 0.0}, r"alpha: must be positive and finite; got 0\.0"),
        ({"alpha": float("nan")}, r"alpha: must be positive and finite; got nan"),
        ({"weights": {}}, r"weights: must be at least one; got none"),
        ({"others": "keep"}, r'others: must be "refuse" or "drop"; got \'keep\''),
        ({"weights": {"x.weight": LINEAR}}, r"<memory>: must have tensor 'x\.weight' to adapt it"),
        (
            {"weights": {"step": LINEAR}},
            r"tensor 'step' must have the shape \[\] of the base, of",
        ),
        ({"weights": {"fc.bias": LINEAR}}, r"tensor 'fc\.bias' \[6\] must be the weight of a lin"),
        (
            {"weights": {"fc.weight": AdaptedWeight("fc", "convolution")}},
            r"tensor 'fc\.weight' \[6, 4\] must be the weight of a convolution layer",
        ),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        written(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.weight": torch.ones(6, 5)}, r"must have the shape \[6, 4\] of the base"),
        ({"fc.weight": torch.full((6, 4), torch.inf)}, r"'fc\.weight' must be finite, as must be"),
    ],
)
def test_bad_models_are_refused(tmp_path: Path, changes: dict[str, Tensor], message: str) -> None:
    base, merged = states()
    with pytest.raises(InputError, match=message):
        write_adapter(
            tmp_path,
            open_state_dict(base),
            open_state_dict(merged | changes),
            rank=2,
            weights={"fc.weight": LINEAR},
        )
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_multihead_attention_is_refused(tmp_path: Path) -> None:
    state = layers().state_dict()
    changed = state | {"attention.out_proj.weight": state["attention.out_proj.weight"] + 1}
    with pytest.raises(InputError, match=r"must be of a layer that PEFT adapts alone; got a part"):
        write_adapter(
            tmp_path,
            open_state_dict(state),
            open_state_dict(changed),
            rank=2,
            weights={"attention.out_proj.weight": AdaptedWeight("attention.out_proj", "linear")},
        )


def test_adapters_that_store_a_weight_differently_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    base = open_state_dict(model.state_dict())
    folders = [
        save_adapter(adapted(model, seed, target_modules=["0"]), tmp_path / str(seed))
        for seed in range(2)
    ]
    config = folders[1] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"fan_in_fan_out": True}))
    opened = [open_checkpoint(folder, base=base) for folder in folders]
    with pytest.raises(InputError, match=r"must adapt tensor '0\.weight' as the other adapters do"):
        adapted_weights(opened)


def test_the_largest_rank_is_that_of_any_weight(tmp_path: Path) -> None:
    model = bert()
    base = open_state_dict(model.state_dict())
    config = {"target_modules": ["query", "key"], "rank_pattern": {"key": 7}}
    folder = save_adapter(adapted(model, 1, **config), tmp_path / "one")
    with open_checkpoint(folder, base=base) as opened:
        assert largest_rank([base, opened]) == 7
    assert largest_rank([base]) == 0


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    done: list[int] = []
    written(tmp_path, advance=done.append)
    assert done == [6 * 4 * 4]
