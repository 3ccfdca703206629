"""Packed masks against bits by hand, and the task's model against its formula entry by entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_merge.checkpoint import open_checkpoint, open_state_dict, save_tensors
from lit_merge.checkpoint.bit_masks import (
    MaskedCheckpoint,
    mask_info,
    pack_bits,
    scale_of,
    unpack_bits,
)
from lit_merge.checkpoint.tensor_source import TensorInfo
from lit_merge.errors import InputError

SHAPE = (5, 7)


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(SHAPE, generator=generator).to(dtype),
        "own": torch.randn(3, generator=generator).to(dtype),
    }


def a_mask() -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(9)) < 0.5


def masked(base: dict[str, Tensor], shared: dict[str, Tensor], scale: float) -> MaskedCheckpoint:
    masks = open_state_dict({"w": pack_bits(a_mask())}, path="masks.safetensors")
    return MaskedCheckpoint(
        open_state_dict(base, path="base"), open_state_dict(shared, path="shared"), masks, scale
    )


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1001])
def test_bits_are_packed_from_the_lowest_and_come_back(size: int) -> None:
    mask = torch.rand(size, generator=torch.Generator().manual_seed(size)) < 0.4
    packed = pack_bits(mask)
    bits = mask.tolist()
    expected = [
        sum(2**j for j, bit in enumerate(bits[i : i + 8]) if bit) for i in range(0, size, 8)
    ]
    assert packed.tolist() == expected
    assert mask_info(TensorInfo((size,), torch.float32)) == TensorInfo(
        tuple(packed.shape), torch.uint8
    )
    for start in range(0, size, 13):
        assert torch.equal(unpack_bits(packed, start, size), mask[start:])


def test_chunks_whose_start_is_a_multiple_of_eight_are_packed_on_their_own() -> None:
    mask = a_mask().flatten()
    chunks = [pack_bits(mask[start : start + 16]) for start in range(0, mask.numel(), 16)]
    assert torch.equal(torch.cat(chunks), pack_bits(mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scale_one_selects_bit_for_bit_in_any_range(dtype: torch.dtype) -> None:
    base, shared = state(1, dtype), state(2, dtype)
    model = masked(base, shared, 1.0)
    expected = torch.where(a_mask(), shared["w"], base["w"])
    assert model.infos["w"] == TensorInfo(SHAPE, dtype)
    assert torch.equal(model.tensor("w"), expected)
    for start in range(0, 35, 3):
        for stop in (start, start + 1, 35):
            assert torch.equal(model.read("w", start, stop), expected.flatten()[start:stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [0.3, 1.7, -1.0, 0.0])
def test_other_scales_go_that_far_from_the_base(scale: float, dtype: torch.dtype) -> None:
    base, shared = state(1, dtype), state(2, dtype)
    result = masked(base, shared, scale).tensor("w").flatten().tolist()
    for got, bit, b, s in zip(
        result,
        a_mask().flatten().tolist(),
        base["w"].flatten().tolist(),
        shared["w"].flatten().tolist(),
        strict=True,
    ):
        expected = b + scale * (s - b) if bit else b
        assert got == pytest.approx(expected, rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_base_of_a_wider_type_is_rounded_to_the_shared_model_s() -> None:
    base, shared = state(1, torch.float32), state(2, torch.bfloat16)
    result = masked(base, shared, 1.0).tensor("w")
    assert torch.equal(result, torch.where(a_mask(), shared["w"], base["w"].bfloat16()))


def test_tensors_without_a_mask_are_the_shared_ones() -> None:
    base, shared = state(1), state(2)
    del base["own"]
    assert torch.equal(masked(base, shared, 0.5).tensor("own"), shared["own"])


def test_masks_are_read_from_a_file_with_their_scale(tmp_path: Path) -> None:
    path = tmp_path / "svhn.safetensors"
    save_tensors(path, {"w": pack_bits(a_mask())}, {"scale": repr(0.1 + 0.2)})
    masks = open_checkpoint(path)
    assert scale_of(masks) == 0.1 + 0.2
    model = MaskedCheckpoint(open_state_dict(state(1)), open_state_dict(state(2)), masks, 1.0)
    assert torch.equal(model.tensor("w"), torch.where(a_mask(), state(2)["w"], state(1)["w"]))
    model.close()
    with pytest.raises(ValueError, match="is closed"):
        model.tensor("w")


@pytest.mark.parametrize("metadata", [{}, {"scale": "much"}, {"scale": "nan"}, {"scale": "1e39"}])
def test_masks_without_a_scale_are_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "svhn.safetensors"
    save_tensors(path, {"w": pack_bits(a_mask())}, metadata)
    with open_checkpoint(path) as masks, pytest.raises(InputError, match=r'svhn.*"scale" in its'):
        scale_of(masks)


@pytest.mark.parametrize(
    "bits", [torch.zeros(4, dtype=torch.uint8), torch.zeros(5), torch.zeros(5, 1).byte()]
)
def test_masks_of_another_length_are_refused(bits: Tensor) -> None:
    models = [open_state_dict(state(seed)) for seed in (1, 2)]
    masks = open_state_dict({"w": bits}, path="masks.safetensors")
    with pytest.raises(InputError, match=r"^masks\.safetensors: the mask of 'w' must be 5 bytes"):
        MaskedCheckpoint(*models, masks, 1.0)


@pytest.mark.parametrize("missing", ["base", "shared"])
def test_masks_of_tensors_that_are_not_there_are_refused(missing: str) -> None:
    states = {"base": state(1), "shared": state(2)}
    del states[missing]["w"]
    models = [open_state_dict(tensors, path=name) for name, tensors in states.items()]
    masks = open_state_dict({"w": pack_bits(a_mask())}, path="masks.safetensors")
    with pytest.raises(InputError, match=rf"tensors of {missing}; got one of 'w'"):
        MaskedCheckpoint(*models, masks, 1.0)


def test_a_base_of_another_shape_is_refused() -> None:
    base = open_state_dict({"w": torch.zeros(35)}, path="base")
    masks = open_state_dict({"w": pack_bits(a_mask())}, path="masks.safetensors")
    with pytest.raises(InputError, match=r"^base: tensor 'w' must have the shape \[5, 7\]"):
        MaskedCheckpoint(base, open_state_dict(state(2)), masks, 1.0)
