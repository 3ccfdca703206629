from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_merge.checkpoint import (
    AdapterCheckpoint,
    fingerprint,
    open_checkpoint,
    open_state_dict,
)
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert
from tests.tiny_adapters import adapted, bert, gpt2, layers, merged_by_peft, save_adapter, save_base

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (bert, {"target_modules": ["query", "value", "dense"]}),
    "rslora": (bert, {"target_modules": ["query", "dense"], "use_rslora": True}),
    "patterns": (
        bert,
        {
            "target_modules": ["query", "key", "dense"],
            "rank_pattern": {"query": 2, r"encoder\.layer\.1\.attention\.self\.key": 3},
            "alpha_pattern": {"layer.0.attention.self.query": 11, "key": 1},
        },
    ),
    "head and biases": (
        bert,
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"},
    ),
    "all biases": (bert, {"target_modules": ["query"], "bias": "all"}),
    "bias of B": (bert, {"target_modules": ["query", "dense"], "lora_bias": True}),
    "Conv1D": (
        gpt2,
        {
            "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True,
            "modules_to_save": ["ln_f"],
        },
    ),
    "embedding": (gpt2, {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    "convolutions": (layers, {"target_modules": ["conv", "point", "signal", "table", "square"]}),
    "head": (layers, {"target_modules": ["square"], "modules_to_save": ["head"], "bias": "all"}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, Any]:
    """A base's file, an adapter's folder, and PEFT's model of both."""
    make, config = CASES[request.param]
    model = make()
    wrapped = adapted(model, 1, **config)
    return save_base(model, tmp_path), save_adapter(wrapped, tmp_path / "adapter"), wrapped


def test_an_adapter_reads_as_what_peft_merges(case: tuple[Path, Path, Any]) -> None:
    file, folder, wrapped = case
    expected = merged_by_peft(wrapped)
    with open_checkpoint(file) as base, open_checkpoint(folder, base=base) as opened:
        changed = 0
        for name in base:
            assert opened.infos[name] == base.infos[name]
            torch.testing.assert_close(opened.tensor(name), expected[name], rtol=0, atol=1e-6)
            changed += not torch.equal(opened.tensor(name), base.tensor(name))
        assert isinstance(opened, AdapterCheckpoint)
        assert changed == len(opened.adapted) > 0


def test_every_range_has_the_same_bits(
    case: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_merge.checkpoint.low_rank.BLOCK", 64)
    file, folder, _ = case
    with open_checkpoint(file) as base, open_checkpoint(folder, base=base) as opened:
        for name, info in opened.infos.items():
            whole = opened.tensor(name).flatten()
            for size in (7, 64, 100):
                for start in range(0, info.numel, size):
                    stop = min(start + size, info.numel)
                    assert torch.equal(opened.read(name, start, stop), whole[start:stop]), name
        assert opened.read(name, 3, 3).shape == (0,)


def test_over_a_bfloat16_base_the_difference_is_not_rounded(tmp_path: Path) -> None:
    model = bert().bfloat16().float()  # so that PEFT adds to the same numbers
    wrapped = adapted(model, 1, target_modules=["query", "dense"])
    folder = save_adapter(wrapped, tmp_path / "adapter")
    expected = merged_by_peft(wrapped)
    file = save_base(model, tmp_path, torch.bfloat16)
    with open_checkpoint(file) as base, open_checkpoint(folder, base=base) as opened:
        assert isinstance(opened, AdapterCheckpoint)
        for name, info in opened.infos.items():
            adapted_here = name in opened.updates
            assert info.dtype == (torch.float32 if adapted_here else torch.bfloat16), name
            value = opened.tensor(name).float()
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)
        assert len(opened.updates) == 2 * 4 + 1


def test_names_are_aligned_with_a_base_under_another_prefix(tmp_path: Path) -> None:
    model = gpt2()
    config = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]}
    folder = save_adapter(adapted(model, 1, **config), tmp_path / "adapter")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    bare = {name.removeprefix("transformer."): value for name, value in state.items()}
    wrapped = {f"model.{name}": value for name, value in state.items()}
    with open_checkpoint(folder, base=open_state_dict(state)) as opened:
        reference = {name: opened.tensor(name) for name in opened}
    for base, prefix in ((bare, "transformer."), (wrapped, "")):
        with open_checkpoint(folder, base=open_state_dict(base)) as opened:
            assert list(opened) == list(base)
            for name in opened:
                same = reference[(prefix + name).removeprefix("model.")]
                assert torch.equal(opened.tensor(name), same)


def test_a_tied_weight_that_is_stored_twice_is_adapted_under_both_names(tmp_path: Path) -> None:
    model = gpt2()
    config = {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}
    wrapped = adapted(model, 1, **config)
    folder = save_adapter(wrapped, tmp_path / "adapter")
    expected = merged_by_peft(wrapped)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with open_checkpoint(folder, base=open_state_dict(state)) as opened:
        assert isinstance(opened, AdapterCheckpoint)
        assert {"transformer.wte.weight", "lm_head.weight"} <= set(opened.updates)
        for name in opened:
            torch.testing.assert_close(opened.tensor(name), expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = handmade(tmp_path / "adapter", factors("fc"))
    message = r"<memory>: tensor 'fc\.weight' must be float64, .* Give the base before it was quant"
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder, base=open_state_dict({"fc.weight": torch.ones(6, 4).to(dtype)}))
    tensors = {name: value.to(dtype) for name, value in factors("fc").items()}
    folder = handmade(tmp_path / "codes", tensors)
    with pytest.raises(
        InputError, match=r"adapter_model\.safetensors: tensor '.*' must be float64"
    ):
        open_checkpoint(folder, base=open_state_dict(BASE))


@pytest.mark.parametrize("change", ["value", "constant", "type"])
def test_weights_that_are_not_tied_stay_apart(tmp_path: Path, change: str) -> None:
    one = torch.ones(6, 4) if change == "constant" else torch.randn(6, 4)
    two = one.clone()
    if change == "value":
        two[5, 3] += 1
    two = two.double() if change == "type" else two
    base = open_state_dict({"fc.weight": one, "other.weight": two})
    with open_checkpoint(handmade(tmp_path, factors("fc")), base=base) as opened:
        assert torch.equal(opened.tensor("other.weight"), two)
        assert not torch.equal(opened.tensor("fc.weight"), one)


def test_a_pickled_adapter_and_its_file_by_name_are_the_same(tmp_path: Path) -> None:
    model = bert()
    wrapped = adapted(model, 1, target_modules=["query"])
    safe = save_adapter(wrapped, tmp_path / "safe")
    pickled = save_adapter(wrapped, tmp_path / "pickled", safe_serialization=False)
    base = open_state_dict(model.state_dict())
    with (
        open_checkpoint(safe, base=base) as one,
        open_checkpoint(pickled, base=base) as two,
        open_checkpoint(safe / "adapter_model.safetensors", base=base) as three,
    ):
        assert two.path.suffix == ".bin"
        for name in one:
            assert torch.equal(one.tensor(name), two.tensor(name))
            assert torch.equal(one.tensor(name), three.tensor(name))


def test_an_adapter_is_read_where_it_is(tmp_path: Path) -> None:
    import fsspec

    folder = handmade(tmp_path, factors("fc"))
    memory = fsspec.filesystem("memory")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        memory.pipe(f"/adapters/one/{name}", (folder / name).read_bytes())
    base = open_state_dict(BASE)
    with (
        open_checkpoint(folder, base=base) as local,
        open_checkpoint("memory://adapters/one", base=base) as remote,
    ):
        assert isinstance(remote, AdapterCheckpoint)
        assert str(remote.path).startswith("memory://")
        assert torch.equal(remote.tensor("fc.weight"), local.tensor("fc.weight"))


def test_a_float64_base_is_added_to_in_float64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(3, 5), torch.randn(7, 3)
    weight = torch.randn(7, 5, dtype=torch.float64)
    folder = handmade(tmp_path, {"fc.lora_A.weight": down, "fc.lora_B.weight": up}, r=3)
    with open_checkpoint(folder, base=open_state_dict({"fc.weight": weight})) as opened:
        expected = weight + 2.0 * up.double() @ down.double()
        torch.testing.assert_close(opened.tensor("fc.weight"), expected, rtol=0, atol=1e-14)


def test_an_update_over_a_stored_table_starts_from_that_table(tmp_path: Path) -> None:
    """As PEFT saves embeddings that were resized: more rows than the base has."""
    table, down, up = torch.randn(9, 4), torch.randn(2, 9), torch.randn(4, 2)
    tensors = {
        "emb.base_layer.weight": table,
        "emb.lora_embedding_A": down,
        "emb.lora_embedding_B": up,
    }
    base = open_state_dict({"emb.weight": torch.randn(6, 4), "fc.weight": torch.randn(3, 4)})
    with open_checkpoint(handmade(tmp_path, tensors, r=2), base=base) as opened:
        assert opened.infos["emb.weight"].shape == (9, 4)
        torch.testing.assert_close(opened.tensor("emb.weight"), table + 3.0 * (up @ down).T)


def test_the_fingerprint_is_that_of_the_adapter_and_its_base(tmp_path: Path) -> None:
    model = bert()
    state = model.state_dict()
    config = {"target_modules": ["query"]}
    one = save_adapter(adapted(model, 1, **config), tmp_path / "one")
    two = save_adapter(adapted(model, 2, **config), tmp_path / "two")
    other = {name: value + 1.0 for name, value in state.items() if value.is_floating_point()}

    def of(folder: Path, base: dict[str, Tensor]) -> str:
        with open_checkpoint(folder, base=open_state_dict(base)) as opened:
            return fingerprint(opened)

    prefixed = {f"model.{name}": value for name, value in state.items()}
    assert of(one, state) == of(one, state) == of(one, prefixed)
    config_file = one / "adapter_config.json"
    found = {of(one, state), of(two, state), of(one, other), fingerprint(state)}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"lora_alpha": 7}))
    assert len({*found, of(one, state)}) == 5


def test_an_adapter_as_expert_says_how_it_is_taken(tmp_path: Path) -> None:
    model = bert()
    folder = save_adapter(adapted(model, 1, target_modules=["query"]), tmp_path / "adapter")
    file = save_base(model, tmp_path)
    with open_checkpoint(file) as base:
        expert = open_expert(folder, base=base)
        assert expert.notes == (
            f"{folder / 'adapter_model.safetensors'}: LoRA adapter of 2 weights: taken as {file} "
            "with B·A added, never factor by factor",
        )
        expert.close()
        assert base.tensor("classifier.bias").shape == (3,)  # the base is still open


def test_an_expert_folder_may_hold_an_adapter(tmp_path: Path) -> None:
    folder = handmade(tmp_path / "adapter", factors("fc"))
    info = ExpertInfo(weights="adapter_model.safetensors", frozen_parameters=("square.weight",))
    (folder / "expert.json").write_text(info.to_json())
    expert = open_expert(folder, base=open_state_dict(BASE))
    assert isinstance(expert.weights, AdapterCheckpoint)
    assert expert.info.frozen_parameters == ("square.weight",)
    expert.close()


def handmade(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    """Write an adapter by hand; the scaling is 6/r."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    prefixed = {f"base_model.model.{n}": v.contiguous() for n, v in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
    return folder


def factors(
    module: str, rank: int = 2, rows: int = 6, width: int = 4, **more: Tensor
) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": torch.randn(rank, width),
        f"{module}.lora_B.weight": torch.randn(rows, rank),
        **more,
    }


BASE = {
    "fc.weight": torch.randn(6, 4),
    "fc.bias": torch.randn(6),
    "square.weight": torch.ones(4, 4),
    "attention.in_proj_weight": torch.randn(12, 4),
    "attention.out_proj.weight": torch.randn(4, 4),
}


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (factors("gone"), {}, r"must have the weight of 'gone', which an adapter changes; got"),
        (
            factors("attention", rows=12) | factors("attention.base_layer.out_proj", rows=4),
            {},
            r"must have no adapter of nn\.MultiheadAttention; got one of 'attention'\. Releases",
        ),
        (factors("fc", width=5), {}, r"'.*fc\.lora_A\.weight' \[2, 5\] and .*multiply to the sh"),
        (factors("fc", rank=3), {}, r"'.*fc\.lora_A\.weight' must have the rank 2 that adapter_c"),
        (
            {"fc.lora_A.weight": torch.randn(2, 4), "fc.lora_B.weight": torch.randn(6, 3)},
            {},
            r"must multiply to the shape \[6, 4\] of tensor 'fc\.weight' in <memory>; got other",
        ),
        (
            {"fc.lora_A.weight": torch.randn(2, 4, 1, 1), "fc.lora_B.weight": torch.randn(6, 2)},
            {},
            r"must multiply to the shape",
        ),
        (
            factors("fc") | factors("square", rows=4),
            {"fan_in_fan_out": True},
            r"got 'fc', which does not, so that nothing tells which way round the square 'square'",
        ),
        (
            factors("fc") | {"fc.lora_B.bias": torch.randn(5)},
            {},
            r"'.*fc\.lora_B\.bias' must be added to a bias \[5\] of <memory>; got none named",
        ),
        (
            factors("square", rows=4) | {"square.lora_B.bias": torch.randn(4)},
            {},
            r"got none named 'square\.bias' of this shape",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, object], message: str
) -> None:
    folder = handmade(tmp_path / "adapter", tensors, **config)
    with pytest.raises(InputError, match=message):
        open_checkpoint(folder, base=open_state_dict(BASE))


def test_a_square_weight_is_turned_as_the_config_says(tmp_path: Path) -> None:
    tensors = factors("square", rows=4)
    product = 3.0 * tensors["square.lora_B.weight"] @ tensors["square.lora_A.weight"]
    for transposed in (False, True):
        folder = handmade(tmp_path / str(transposed), tensors, fan_in_fan_out=transposed)
        with open_checkpoint(folder, base=open_state_dict(BASE)) as opened:
            expected = BASE["square.weight"] + (product.T if transposed else product)
            torch.testing.assert_close(opened.tensor("square.weight"), expected)


def test_without_a_base_or_without_its_tensors_it_is_refused(tmp_path: Path) -> None:
    folder = handmade(tmp_path / "adapter", factors("fc"))
    message = "must hold the weights of a whole model; got a PEFT adapter, .* as base: and the"
    for path in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(InputError, match=message):
            open_expert(path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter: must hold adapter_model\.safetensors beside"):
        open_checkpoint(folder, base=open_state_dict(BASE))


def test_curvature_of_the_factors_is_refused_and_that_of_the_weights_taken(tmp_path: Path) -> None:
    folder = handmade(tmp_path / "adapter", factors("fc"))
    base = open_state_dict(BASE)
    file = folder / "hessian.safetensors"
    save_file({f"base_model.model.{n}": v**2 for n, v in factors("fc").items()}, file)
    with pytest.raises(InputError, match=r"hessian\.safetensors: must hold whole weights; got the"):
        open_expert(folder, base=base)
    save_file({name: value**2 for name, value in BASE.items()}, file)
    expert = open_expert(folder, base=base)
    assert expert.hessian is not None
    assert set(expert.hessian) == set(BASE)
    expert.close()


def test_a_refused_adapter_leaves_no_file_open(tmp_path: Path) -> None:
    folder = handmade(tmp_path / "adapter", factors("gone"))
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("the list of open files is Linux's")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        with pytest.raises(InputError):
            open_checkpoint(folder, base=open_state_dict(BASE))
    assert len(list(descriptors.iterdir())) == before


def test_a_folder_with_whole_weights_is_no_adapter(tmp_path: Path) -> None:
    folder = handmade(tmp_path / "adapter", factors("fc"))
    save_file(BASE, folder / "model.safetensors")
    with open_checkpoint(folder) as opened:
        assert set(opened) == set(BASE)
    assert set(load_file(folder / "model.safetensors")) == set(BASE)
