from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import (
    Average,
    GradientMatching,
    MergeMethod,
    ParameterSlice,
    TaskArithmetic,
)
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import merge, merge_in_memory, merge_state_dicts
from lit_merge.streaming import pieces as merge_plan
from tests.merge_files import (
    MERGED,
    METHODS,
    hessian,
    save_base,
    save_expert,
    save_experts,
    tensors,
    weights,
)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_size_of_chunks_changes_nothing(
    tmp_path: Path, method: MergeMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path, classes=5)
    merge(base, experts, method, tmp_path / "one")
    monkeypatch.setattr(merge_plan, "CHUNK", 5)
    merge(base, experts, method, tmp_path / "many")
    for name in ("model.safetensors", "heads/svhn.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    states = [weights(seed, dtype=torch.bfloat16) for seed in range(4)]
    merged = merge_state_dicts(states[0], states[1:], TaskArithmetic(0.3))

    def is_rounded_once(value: Tensor, exact: Tensor) -> bool:
        return bool(((value.double() - exact).abs() <= exact.abs() / 256 + 1e-6).all())

    for name in ("emb.weight", "linear.weight"):
        base, *experts = (state[name] for state in states)
        exact = base.double() + 0.3 * sum(e.double() - base.double() for e in experts)
        assert merged[name].dtype == torch.bfloat16
        assert is_rounded_once(merged[name], exact)
        assert not is_rounded_once(base + 0.3 * sum(e - base for e in experts), exact)


def test_float64_stays_float64() -> None:
    states = [weights(seed, dtype=torch.float64) for seed in range(3)]
    merged = merge_state_dicts(states[0], states[1:], TaskArithmetic(1 / 3))
    base, *experts = (state["linear.weight"] for state in states)
    exact = base + sum(expert - base for expert in experts) / 3
    torch.testing.assert_close(merged["linear.weight"], exact, rtol=0, atol=1e-15)


def test_values_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    large = torch.ones(6)
    large[4] = 1e6
    experts = {"svhn": save_expert(tmp_path, "svhn", 1, changes={"linear.bias": large})}
    message = r"^dtype: .*got 1e\+06 at \[4\] of tensor 'linear\.bias', which is inf in float16"
    with pytest.raises(InputError, match=message):
        merge(save_base(tmp_path), experts, Average(), tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_a_method_that_overflows_is_refused() -> None:
    huge = {"w": torch.full((2,), 3e38)}
    with pytest.raises(InputError, match=r"^method: must give finite values; got inf at \[0\]"):
        merge_state_dicts({"w": torch.zeros(2)}, [huge, huge], TaskArithmetic())


def test_methods_that_need_whole_tensors_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_plan, "CHUNK", 5)
    shapes = {}

    @dataclasses.dataclass(frozen=True)
    class Whole(MergeMethod):
        elementwise = False

        def __call__(self, p: ParameterSlice) -> Tensor:
            shapes[p.name] = tuple(p.experts[0].shape)
            return p.experts[0] - p.experts[0].mean()

    result = merge(save_base(tmp_path), save_experts(tmp_path), Whole(), tmp_path / "merged")
    assert shapes == {name: tuple(weights(0)[name].shape) for name in MERGED}
    merged = tensors(result.path / "model.safetensors")["linear.weight"]
    torch.testing.assert_close(
        merged, weights(1)["linear.weight"] - weights(1)["linear.weight"].mean()
    )


def test_empty_and_scalar_tensors_are_carried() -> None:
    states = [{"none": torch.empty(0, 3), "temperature": torch.tensor(float(i))} for i in range(3)]
    merged = merge_state_dicts(states[0], states[1:], Average())
    assert merged["none"].shape == (0, 3)
    assert merged["temperature"].item() == 1.5


def test_inputs_in_memory_are_not_touched_or_shared() -> None:
    states = [weights(seed) for seed in range(3)]
    merged = merge_state_dicts(
        states[0], states[1:], GradientMatching(), hessians=[hessian(s, 1) for s in states[1:]]
    )
    pointers = {value.data_ptr() for state in states for value in state.values()}
    assert pointers.isdisjoint(value.data_ptr() for value in merged.values())
    for seed, state in enumerate(states):
        for name, value in weights(seed).items():
            assert torch.equal(state[name], value)


def test_modules_merge_through_their_state_dicts() -> None:
    modules = [torch.nn.Linear(3, 2).to(torch.bfloat16) for _ in range(3)]
    merged = merge_state_dicts(
        modules[0].state_dict(), [module.state_dict() for module in modules[1:]], Average()
    )
    modules[0].load_state_dict(merged)
    assert modules[0].weight.dtype == torch.bfloat16
    parameters = [dict(module.named_parameters()) for module in modules]
    again = merge_state_dicts(parameters[0], parameters[1:], Average())
    assert not any(value.requires_grad for value in again.values())


def test_frozen_tensors_of_another_base_are_refused(tmp_path: Path) -> None:
    other = {"emb.weight": weights(7)["emb.weight"]}
    experts = save_experts(tmp_path, changes=other, frozen_parameters=("emb.weight",))
    base = save_base(tmp_path)
    message = r"svhn/model\.safetensors: tensor 'emb\.weight', which expert\.json says was frozen"
    with pytest.raises(InputError, match=message):
        merge(base, experts, output=tmp_path / "merged")
    keep = ParametersPolicy(rules={"emb.*": "keep"})
    merged = merge_in_memory(base, experts, policy=keep)
    assert torch.equal(merged.state["emb.weight"], weights(0)["emb.weight"])


def test_kept_tensors_must_be_finite_unless_a_rule_keeps_them() -> None:
    states = [weights(seed) for seed in range(2)]
    for state in states:
        state["mask.weight"] = torch.tensor([0.0, float("-inf")])
        state["mask.counts"] = torch.tensor([1, 2])
    with pytest.raises(InputError, match=r"'mask\.weight' must be finite; got -inf at \[1\]"):
        merge_state_dicts(states[0], states[1:], TaskArithmetic())
    policy = ParametersPolicy(rules={"mask.*": "keep"})
    merged = merge_state_dicts(states[0], states[1:], TaskArithmetic(), policy=policy)
    assert merged["mask.weight"].tolist() == [0.0, float("-inf")]
