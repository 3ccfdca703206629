from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_merge.callbacks.expert_folder import describe, fingerprint_of, save_expert
from lit_merge.checkpoint import fingerprint
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from lit_merge.expert.sharded import write_sharded_expert
from lit_merge.sharding import local_part, sharded_as
from tests.processes import on_ranks
from tests.sharded_nets import LAYOUTS, processes_of, sharded_net, small_transformer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*use of fork.. may lead to deadlocks"),
]

INFO = ExpertInfo(task="t", estimator="exact", labels="sampled", num_examples=3)


def squares(model: nn.Module) -> dict[str, Tensor]:
    """Return a Hessian that is sharded like the model: the squares of its weights."""
    return {name: parameter.detach().square() for name, parameter in model.named_parameters()}


def statistics() -> dict[str, Tensor]:
    return {"head.count": torch.tensor(3), "head.mean": torch.ones(5), "head.m2": torch.ones(5)}


def contents_of(folder: Path) -> dict[str, Any]:
    expert = open_expert(folder)
    assert expert.hessian is not None
    assert expert.activations is not None
    groups = (expert.weights, expert.hessian, expert.activations)
    tensors = [{name: group.tensor(name).tolist() for name in group} for group in groups]
    return {"tensors": tensors, "info": expert.info.to_json()}


def _written(folder: Path, layout: str, rank: int) -> str:
    model = sharded_net(layout)
    write_sharded_expert(
        folder,
        weights=model.state_dict(),
        info=INFO,
        hessian=squares(model),
        activations=statistics() if rank == 0 else None,
    )
    return fingerprint_of(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_written_as_the_whole_would_be(tmp_path, layout: str) -> None:
    plain = small_transformer()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write_expert(
        whole,
        weights=plain.state_dict(),
        info=INFO,
        hessian=squares(plain),
        activations=statistics(),
    )
    size = processes_of(layout)
    found = on_ranks(partial(_written, parts, layout), world_size=size, folder=tmp_path)
    assert found == [fingerprint(plain.state_dict())] * size
    assert contents_of(parts) == contents_of(whole)
    assert sorted(path.name for path in parts.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )


def _joined(folder: Path, rank: int) -> None:
    model = nn.ModuleDict({"net": sharded_net("fsdp")})
    info = describe(model)
    common = {"module": model, "replace_folder": False}
    save_expert(folder, info=info, join=False, activations=statistics(), **common)
    save_expert(folder, info=INFO, join=True, hessian=squares(model), **common)


def test_curvature_is_added_to_a_folder_of_the_same_weights(tmp_path) -> None:
    folder = tmp_path / "expert"
    assert on_ranks(partial(_joined, folder), world_size=2, folder=tmp_path) == [None, None]
    expert = open_expert(folder)
    assert (expert.info.estimator, expert.info.num_examples) == ("exact", 3)
    assert expert.activations is not None
    assert expert.hessian is not None
    for name, value in squares(small_transformer()).items():
        assert torch.equal(expert.hessian.tensor(f"net.{name}"), value)


def _refused(folder: Path, case: str, rank: int) -> str:
    model = sharded_net("fsdp")
    hessian = squares(model)
    part = local_part(hessian["head.bias"]).clone()
    if case == "weights" and rank == 1:
        local_part(model.head.bias.detach())[0] = torch.nan
    if case in ("nan", "negative") and rank == 1:
        part[0] = torch.nan if case == "nan" else -1.0
    hessian["head.bias"] = sharded_as(part, model.head.bias)
    if case == "name":
        hessian["other"] = hessian["head.bias"]
    with pytest.raises(InputError) as caught:
        write_sharded_expert(folder, weights=model.state_dict(), info=INFO, hessian=hessian)
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("weights", "weights: tensor 'head.bias' must be finite"),
        ("nan", "hessian: tensor 'head.bias' must be finite"),
        ("negative", "hessian: tensor 'head.bias' must not be negative; got -1"),
        ("name", "got 'other', which is not there"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank_and_nothing_is_left(
    tmp_path, case: str, message: str
) -> None:
    folder = tmp_path / "experts" / "expert"
    first, second = on_ranks(partial(_refused, folder, case), world_size=2, folder=tmp_path)
    assert message in first
    assert second == f"rank 0: {first}"
    assert not list(tmp_path.glob("**/*expert*"))


def _taken(folder: Path, rank: int) -> str:
    model = sharded_net("fsdp")
    with pytest.raises(InputError) as caught:
        write_sharded_expert(folder, weights=model.state_dict(), info=INFO)
    return str(caught.value)


def test_a_folder_that_is_there_is_kept(tmp_path) -> None:
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "file").write_text("mine")
    first, second = on_ranks(partial(_taken, tmp_path / "expert"), world_size=2, folder=tmp_path)
    assert "expert" in first
    assert second == f"rank 0: {first}"
    assert [path.name for path in (tmp_path / "expert").iterdir()] == ["file"]
