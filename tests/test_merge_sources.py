"""A merge gives the same bytes wherever, and in whatever form, its inputs are."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from torch import Tensor

import lit_merge
from lit_merge.checkpoint import StateDict, save_tensors
from lit_merge.checkpoint.dcp_writer import write_distributed
from lit_merge.checkpoint.lightning_writer import write_lightning_checkpoint
from lit_merge.expert import ExpertInfo, write_expert

METHOD = lit_merge.TaskArithmetic(scale=0.3)


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "body.0.weight": torch.randn(33, 40, generator=generator),
        "body.0.bias": torch.randn(33, generator=generator).bfloat16(),
    }


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("local")
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        save_tensors(folder / f"{name}.safetensors", state(seed))
    return merged(
        folder / "base.safetensors",
        {"a": folder / "a.safetensors", "b": folder / "b.safetensors"},
        folder / "out",
    )


def merged(base: object, experts: dict[str, object], output: Path) -> bytes:
    lit_merge.merge(base, experts, method=METHOD, output=output, progress=False)  # type: ignore[arg-type]
    return (output / "model.safetensors").read_bytes()


@pytest.fixture
def bucket() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield "memory://bucket"
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_from_distributed_checkpoints(tmp_path: Path, wanted: bytes) -> None:
    for name, seed, key in (("base", 0, None), ("a", 1, "model"), ("b", 2, "state_dict")):
        write_distributed(tmp_path / name, StateDict(state(seed)), key=key)
    experts = {"a": tmp_path / "a", "b": tmp_path / "b"}
    assert merged(tmp_path / "base", experts, tmp_path / "out") == wanted


def test_from_lightning_checkpoints(tmp_path: Path, wanted: bytes) -> None:
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        named = {f"model.{n}": value for n, value in state(seed).items()}
        write_lightning_checkpoint(
            tmp_path / f"{name}.ckpt", StateDict(named if seed else state(seed))
        )
    experts = {"a": tmp_path / "a.ckpt", "b": tmp_path / "b.ckpt"}
    assert merged(tmp_path / "base.ckpt", experts, tmp_path / "out") == wanted


def test_from_urls(tmp_path: Path, bucket: str, wanted: bytes) -> None:
    files = fsspec.filesystem("memory")
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        write_expert(tmp_path / name, weights=state(seed), info=ExpertInfo(task=name))
        files.put(str(tmp_path / name), f"{bucket}/{name}", recursive=True)
    experts = {"a": f"{bucket}/a", "b": f"{bucket}/b/model.safetensors"}
    assert merged(f"{bucket}/base", experts, tmp_path / "out") == wanted
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert "memory://bucket/a" in json.dumps(record)


def test_curvature_is_read_from_a_url(tmp_path: Path, bucket: str) -> None:
    files = fsspec.filesystem("memory")
    experts: dict[str, dict[str, str | Path]] = {"near": {}, "far": {}}
    for name, seed in (("a", 1), ("b", 2)):
        hessian = {n: value.float() ** 2 for n, value in state(seed + 5).items()}
        info = ExpertInfo(task=name, num_examples=3, estimator="exact")
        write_expert(tmp_path / name, weights=state(seed), hessian=hessian, info=info)
        files.put(str(tmp_path / name), f"{bucket}/{name}", recursive=True)
        experts["near"][name], experts["far"][name] = tmp_path / name, f"{bucket}/{name}"
    save_tensors(tmp_path / "base.safetensors", state(0))
    found = []
    for where in ("near", "far"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lit_merge.merge(
                tmp_path / "base.safetensors",
                experts[where],
                method=lit_merge.GradientMatching(),
                output=tmp_path / where,
                progress=False,
            )
        found.append((tmp_path / where / "model.safetensors").read_bytes())
    assert found[0] == found[1]
