from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_merge.checkpoint import fingerprint, open_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, add_to_expert, open_expert, write_expert
from lit_merge.inspection import inspect_path


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 4, 3)
        self.head = nn.Linear(4, 2)


def weights() -> dict[str, Tensor]:
    return Net().state_dict()


def matrix(size: int, seed: int = 0) -> Tensor:
    rows = torch.randn(size + 3, size, generator=torch.Generator().manual_seed(seed))
    product = rows.mT @ rows
    return (product + product.mT) / 2


def gram() -> dict[str, Tensor]:
    return {"conv.weight": matrix(6), "head.weight": matrix(4)}


def kronecker() -> dict[str, Tensor]:
    return {"head.weight.input": matrix(4), "head.weight.output": matrix(2)}


def written(path: Path) -> Path:
    return write_expert(
        path, weights=weights(), info=ExpertInfo(), gram=gram(), kronecker=kronecker()
    )


def test_matrices_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    expert = open_expert(written(tmp_path))
    assert expert.notes == ()
    for opened, given in ((expert.gram, gram()), (expert.kronecker, kronecker())):
        assert opened is not None
        assert set(opened) == set(given)
        for name, value in given.items():
            assert torch.equal(opened.tensor(name), value)
    expert.close()
    for opened in (expert.gram, expert.kronecker):
        assert opened is not None
        with pytest.raises(ValueError, match="is closed"):
            opened.tensor(next(iter(opened)))


def test_files_say_whose_they_are_and_are_float32(tmp_path: Path) -> None:
    wide = {name: value.double() for name, value in gram().items()}
    write_expert(tmp_path, weights=weights(), info=ExpertInfo(), gram=wide, kronecker=kronecker())
    for name in ("gram.safetensors", "kronecker.safetensors"):
        with safe_open(str(tmp_path / name), framework="pt") as opened:
            assert opened.metadata() == {"fingerprint": fingerprint(weights()), "reduction": "sum"}
        assert {v.dtype for v in load_file(str(tmp_path / name)).values()} == {torch.float32}


def test_matrices_are_added_to_the_same_weights(tmp_path: Path) -> None:
    path = write_expert(tmp_path / "expert", weights=weights(), info=ExpertInfo(task="a"))
    mine = fingerprint(weights())
    add_to_expert(path, weights_fingerprint=mine, gram=gram())
    add_to_expert(path, weights_fingerprint=mine, kronecker=kronecker())
    expert = open_expert(path)
    assert expert.gram is not None
    assert expert.kronecker is not None
    with pytest.raises(InputError, match="belongs to other weights"):
        add_to_expert(path, weights_fingerprint="0" * 64, gram=gram())


@pytest.mark.parametrize("name", ["gram.safetensors", "kronecker.safetensors"])
def test_matrices_of_other_weights_are_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path)
    for other in ("gram.safetensors", "kronecker.safetensors"):
        if other != name:
            (path / other).unlink()
    changed = {key: value + 1 for key, value in weights().items()}
    save_file(changed, str(path / "model.safetensors"))
    mine, theirs = fingerprint(weights())[:8], fingerprint(changed)[:8]
    message = rf"{name}: belongs to weights {mine}…, but .* is {theirs}…\. Gather it again on these"
    with pytest.raises(InputError, match=message):
        open_expert(path)
    (path / "expert.json").unlink()  # the file itself knows, too
    with pytest.raises(InputError, match=message):
        open_expert(path)


@pytest.mark.parametrize("prefix", ["model.", "net.backbone."])
def test_names_follow_those_of_the_weights_up_to_a_prefix(tmp_path: Path, prefix: str) -> None:
    save_file(weights(), str(tmp_path / "model.safetensors"))
    for name, tensors in (("gram", gram()), ("kronecker", kronecker())):
        prefixed = {prefix + key: value for key, value in tensors.items()}
        save_file(prefixed, str(tmp_path / f"{name}.safetensors"))
    expert = open_expert(tmp_path)
    assert expert.gram is not None
    assert expert.kronecker is not None
    assert set(expert.gram) == set(gram())
    assert set(expert.kronecker) == set(kronecker())
    assert torch.equal(expert.kronecker.tensor("head.weight.output"), matrix(2))
    notes = [note.rpartition("/")[2] for note in expert.notes]
    assert notes == [
        f"{name}.safetensors: no expert.json: curvature taken as it is"
        for name in ("gram", "kronecker")
    ]


def test_names_are_stored_without_what_wrappers_add(tmp_path: Path) -> None:
    def wrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"model._orig_mod.{name}": value for name, value in tensors.items()}

    write_expert(
        tmp_path,
        weights=wrapped(weights()),
        info=ExpertInfo(),
        gram=wrapped(gram()),
        kronecker=wrapped(kronecker()),
    )
    expert = open_expert(tmp_path)
    assert expert.gram is not None
    assert expert.kronecker is not None
    assert set(expert.gram) == {f"model.{name}" for name in gram()}
    assert set(expert.kronecker) == {f"model.{name}" for name in kronecker()}


GRAM_HEADERS: list[tuple[dict[str, Tensor], str]] = [
    ({"other.weight": matrix(4)}, "got 'other.weight', whose weight is not there"),
    ({"head.bias": matrix(2)}, r"'head.bias' must belong to a weight of two .* shape \[2\]"),
    ({"head.weight": matrix(2)}, r"'head.weight' must have the shape \[4, 4\].*got \[2, 2\]"),
    ({"conv.weight": matrix(2)}, r"'conv.weight' must have the shape \[6, 6\].*got \[2, 2\]"),
    ({"head.weight": torch.ones(4, 4).int()}, "must be of a floating type; got torch.int32"),
]
KRONECKER_HEADERS: list[tuple[dict[str, Tensor], str]] = [
    ({"conv.weight.input": matrix(6)}, "'conv.weight.input' without 'conv.weight.output'"),
    ({"conv.weight": matrix(6)}, "of each weight; got 'conv.weight'"),
    ({"head.weight.input": matrix(2)}, r"'head.weight.input' must have the shape \[4, 4\]"),
    ({"head.weight.output": matrix(4)}, r"'head.weight.output' must have the shape \[2, 2\]"),
    (
        {"other.input": matrix(4), "other.output": matrix(2)},
        "got 'other.input', whose weight is not there",
    ),
]
VALUES: list[tuple[str, dict[str, Tensor], str]] = [
    (
        "gram",
        {"head.weight": torch.full((4, 4), torch.nan)},
        "gram: tensor 'head.weight' must be f",
    ),
    (
        "gram",
        {"head.weight": matrix(4).double() * 1e39},
        "gram: tensor 'head.weight' must be finite in float32.*Give matrices that float32 can hold",
    ),
    (
        "gram",
        {"head.weight": matrix(4) + torch.tensor([0.0, 1.0, 0.0, 0.0])},
        "gram: tensor 'head.weight' must be symmetric; got entries 1 apart",
    ),
    (
        "gram",
        {"head.weight": torch.diag(torch.tensor([1.0, 2.0, -0.5, 1.0]))},
        "gram: tensor 'head.weight' must not be negative on its diagonal; got -0.5",
    ),
    (
        "kronecker",
        {"head.weight.output": -matrix(2)},
        "kronecker: tensor 'head.weight.output' must not be negative on its diagonal",
    ),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *(("gram", *case) for case in GRAM_HEADERS),
        *(("kronecker", *case) for case in KRONECKER_HEADERS),
    ],
)
def test_what_does_not_fit_is_refused_by_its_header(
    tmp_path: Path, kind: str, change: dict[str, Tensor], message: str
) -> None:
    given = {**(gram() if kind == "gram" else kronecker()), **change}
    artifact: dict[str, Any] = {kind: given}
    with pytest.raises(InputError, match=f"{kind}: .*{message}"):
        write_expert(tmp_path / "x", weights=weights(), info=ExpertInfo(), **artifact)
    assert list(tmp_path.iterdir()) == []
    save_file(weights(), str(tmp_path / "model.safetensors"))
    save_file(given, str(tmp_path / f"{kind}.safetensors"))
    with pytest.raises(InputError, match=rf"{kind}\.safetensors: .*{message}"):
        open_expert(tmp_path)


@pytest.mark.parametrize(("kind", "change", "message"), VALUES)
def test_what_cannot_be_used_is_never_written(
    tmp_path: Path, kind: str, change: dict[str, Tensor], message: str
) -> None:
    artifact: dict[str, Any] = {kind: {**(gram() if kind == "gram" else kronecker()), **change}}
    with pytest.raises(InputError, match=message):
        write_expert(tmp_path / "x", weights=weights(), info=ExpertInfo(), **artifact)
    assert list(tmp_path.iterdir()) == []


def test_matrices_are_not_taken_for_weights(tmp_path: Path) -> None:
    save_file(weights(), str(tmp_path / "epoch-3.safetensors"))
    save_file(gram(), str(tmp_path / "gram.safetensors"))
    save_file(kronecker(), str(tmp_path / "kronecker.safetensors"))
    assert set(open_checkpoint(tmp_path)) == set(weights())
    assert open_expert(tmp_path).gram is not None


def test_an_inspection_counts_them(tmp_path: Path) -> None:
    parts = {part.name: part for part in inspect_path(written(tmp_path)).parts}
    assert list(parts) == ["weights", "gram", "kronecker"]
    assert (parts["gram"].num_tensors, parts["gram"].num_elements) == (2, 36 + 16)
    assert parts["kronecker"].file == "kronecker.safetensors"
