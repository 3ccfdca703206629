"""What TSV-M, the isotropic methods and WUDI do alike, above all with what is no matrix."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.methods import ParameterSlice, TaskArithmetic
from lit_merge.methods.iso import IsoC, IsoCTS
from lit_merge.methods.matrix_method import MatrixMethod
from lit_merge.methods.tsv_m import TSVM
from lit_merge.methods.wudi import WUDI

METHODS = [TSVM(), IsoC(), IsoCTS(), WUDI(), WUDI(solver="adam", learning_rate=0.01)]


def slice_of(*shape: int, dtype: torch.dtype = torch.float64) -> ParameterSlice:
    generator = torch.Generator().manual_seed(3)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tasks = ("svhn", "dtd", "mnist")
    return ParameterSlice("w", tasks, tuple(normal() for _ in tasks), normal())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_merged_task_vector_is_scaled(method: MatrixMethod) -> None:
    p = slice_of(8, 6)
    base = p.require_base()
    once = method(p) - base
    assert float(once.norm()) > 1
    thrice = dataclasses.replace(method, scale=-3.0)(p) - base
    torch.testing.assert_close(thrice, -3.0 * once)


@pytest.mark.parametrize("shape", [(), (7,), (4, 3, 2), (4, 3, 2, 2), (0, 3), (0,)])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_other_tensors_take_the_mean_the_sum_or_nothing(
    method: MatrixMethod, shape: tuple[int, ...]
) -> None:
    p = slice_of(*shape)
    choices: list[tuple[Literal["mean", "sum", "base"], float]]
    choices = [("mean", 0.5 / 3), ("sum", 0.5), ("base", 0.0)]
    for others, each in choices:
        merged = dataclasses.replace(method, scale=0.5, others=others)(p)
        torch.testing.assert_close(merged, TaskArithmetic(each)(p))
        assert merged.data_ptr() != p.require_base().data_ptr() or not merged.numel()


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_convolutions_can_count_as_matrices(method: MatrixMethod) -> None:
    p = slice_of(6, 2, 2, 2)
    flat = dataclasses.replace(
        p, base=p.require_base().view(6, 8), experts=tuple(e.view(6, 8) for e in p.experts)
    )
    merged = dataclasses.replace(method, convolutions="matrix")(p)
    assert torch.equal(merged, method(flat).view(6, 2, 2, 2))


def test_by_default_other_tensors_are_as_the_authors_leave_them() -> None:
    p = slice_of(7)
    for method in (TSVM(), IsoC(), IsoCTS()):
        torch.testing.assert_close(method(p), TaskArithmetic(1 / 3)(p))
    assert torch.equal(WUDI()(p), p.require_base())


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_computed_in_float64_and_rounded_once(
    method: MatrixMethod, dtype: torch.dtype
) -> None:
    p = slice_of(8, 6, dtype=torch.float32)
    wide = dataclasses.replace(
        p, base=p.require_base().double(), experts=tuple(e.double() for e in p.experts)
    )
    narrow = method(p)
    assert narrow.dtype == torch.float32
    assert torch.equal(narrow, method(wide).float())


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_must_be_finite(method: MatrixMethod, value: float) -> None:
    p = slice_of(8, 6)
    name = type(method).__name__
    p.experts[1][2, 3] = value
    with pytest.raises(InputError, match=rf"^w: must be finite for {name}.* the expert 'dtd'\."):
        method(p)
    p.require_base()[0, 0] = value
    with pytest.raises(InputError, match=rf"^w: must be finite for {name}.* the base\."):
        method(p)


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match=r"^TSVM\.scale: must be a finite number; got nan"):
        TSVM(scale=float("nan"))
    with pytest.raises(InputError, match=r"^IsoC\.others: must be one of .* got 'median'"):
        IsoC(others="median")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^WUDI\.convolutions: must be one of .* got 'flat'"):
        WUDI(convolutions="flat")  # type: ignore[arg-type]
