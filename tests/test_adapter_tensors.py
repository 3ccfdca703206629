from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_merge.checkpoint import open_state_dict, require_no_factors
from lit_merge.checkpoint.adapter_tensors import sort_tensors
from lit_merge.errors import InputError

ONE = torch.ones(2, 2)


def named(*names: str) -> dict[str, Tensor]:
    return {f"base_model.model.{name}": ONE for name in names}


def test_tensors_are_told_by_their_names() -> None:
    tensors = named(
        "a.q.lora_A.weight",
        "a.q.lora_B.weight",
        "a.q.lora_B.bias",
        "a.q.base_layer.bias",
        "wte.lora_embedding_A",
        "wte.lora_embedding_B",
        "wte.base_layer.weight",
        "head.weight",
        "head.modules_to_save.weight",
        "head.original_module.weight",
        "score.modules_to_save.default.weight",
    )
    parts = sort_tensors(open_state_dict(tensors))
    stem = "base_model.model."
    assert parts.factors == {
        "a.q": (f"{stem}a.q.lora_A.weight", f"{stem}a.q.lora_B.weight"),
        "wte": (f"{stem}wte.lora_embedding_A", f"{stem}wte.lora_embedding_B"),
    }
    assert parts.tables == {"wte"}
    assert parts.biases == {"a.q": f"{stem}a.q.lora_B.bias"}
    assert parts.others == {
        "a.q.bias": f"{stem}a.q.base_layer.bias",
        "wte.weight": f"{stem}wte.base_layer.weight",
        "head.weight": f"{stem}head.weight",
        "score.weight": f"{stem}score.modules_to_save.default.weight",
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("q.lora_A.one.weight", "q.lora_B.one.weight", "q.lora_A.two.weight"),
            r"must hold one adapter, without its name; got .*q\.lora_A\.one\.weight' \(adapter 'on",
        ),
        (("e.lora_embedding_A.default",), r"must hold one adapter, .* \(adapter 'default'\)"),
        (("q.lora_A.weight",), r"must hold both factors of 'q'; got no lora_B"),
        (("q.lora_B.weight",), r"must hold both factors of 'q'; got no lora_A"),
        (("q.lora_B.bias",), r"must hold both factors of 'q'; got no lora_A"),
        (("q.lora_magnitude_vector",), r"must hold only lora_A, lora_B and whole tensors; got"),
        (("q.lora_down.weight",), r"must hold only lora_A, lora_B and whole tensors; got"),
        (("e.token_adapter.trainable_tokens_delta",), r"must hold only lora_A, .*token_adapter"),
    ],
)
def test_what_is_not_one_plain_adapter_is_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sort_tensors(open_state_dict(named(*names), path="adapter"))


def test_two_values_of_one_tensor_are_refused() -> None:
    tensors = {"head.bias": ONE, "head.modules_to_save.bias": 2 * ONE}
    with pytest.raises(InputError, match=r"'head\.bias' and 'head\.modules_to_save\.bias', which"):
        sort_tensors(open_state_dict(tensors))


@pytest.mark.parametrize(
    "name", ["m.q.lora_A.default.weight", "q.lora_B.weight", "e.lora_embedding_A.default"]
)
def test_factors_are_refused_as_tensors_to_merge(name: str) -> None:
    with pytest.raises(InputError, match=r"run\.ckpt: must hold whole weights; got the LoRA"):
        require_no_factors(open_state_dict({"q.weight": ONE, name: ONE}, path="run.ckpt"))
    require_no_factors(open_state_dict({"lora_A.weight": ONE, "explora_A.weight": ONE}))
