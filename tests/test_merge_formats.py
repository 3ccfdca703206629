"""The forms in which a merge is written, each taken by what it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_merge.checkpoint import open_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert, write_expert
from lit_merge.expert.info import ExpertInfo
from lit_merge.methods import Average, GradientMatching, TaskArithmetic
from lit_merge.streaming import merge
from tests import tiny_adapters
from tests.merge_files import hessian, save_base, save_experts


class Net(L.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Linear(width, 2)


def lightning_experts(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Net]]:
    nets = {}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        nets[name] = Net(width=5)
        trainer = L.Trainer(
            max_epochs=0, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.strategy.connect(nets[name])
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return folder / "base.ckpt", {n: folder / f"{n}.ckpt" for n in "ab"}, nets


@pytest.mark.filterwarnings("ignore")
def test_lightning_loads_what_was_merged(tmp_path: Path) -> None:
    base, experts, nets = lightning_experts(tmp_path)
    result = merge(base, experts, Average(), tmp_path / "out", format="lightning")
    files = sorted(file.name for file in Path(result.path).iterdir())
    assert files == ["merge.json", "model.ckpt"]
    loaded = Net.load_from_checkpoint(tmp_path / "out" / "model.ckpt", map_location="cpu")
    assert loaded.hparams["width"] == 5
    expected = (nets["a"].model.weight + nets["b"].model.weight) / 2
    torch.testing.assert_close(loaded.model.weight, expected)
    again = merge(base, {"m": tmp_path / "out", "a": experts["a"]}, Average(), tmp_path / "again")
    assert load_file(Path(again.path) / "model.safetensors")["model.weight"].shape == (2, 5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_load_into_a_state_dict(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    base, experts = save_base(tmp_path), save_experts(tmp_path)
    plain = merge(base, experts, GradientMatching(), tmp_path / "plain")
    made = merge(base, experts, GradientMatching(), tmp_path / "out", format="distributed")
    expected = load_file(Path(plain.path) / "model.safetensors")
    state: dict[str, Any] = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(state, checkpoint_id=str(made.path), no_dist=True)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    opened = open_expert(made.path)  # with its Hessian: an expert again
    assert opened.hessian is not None
    opened.close()


def test_several_shards_become_one_file_of_another_form(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    plain = merge(base, experts, Average(), tmp_path / "plain")
    made = merge(base, experts, Average(), tmp_path / "out", format="lightning", shard_bytes=100)
    assert not list(Path(made.path).glob("model*.safetensors*"))
    with open_checkpoint(made.path) as left, open_checkpoint(plain.path) as right:
        assert all(torch.equal(left.tensor(name), right.tensor(name)) for name in right)


def test_forms_that_cannot_be_written_are_refused_first(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    with pytest.raises(InputError, match=r"^rank: must come with format: adapter; got 8"):
        merge(base, experts, Average(), tmp_path / "out", rank=8)
    with pytest.raises(InputError, match=r"^format: must have an expert that is an adapter"):
        merge(base, experts, Average(), tmp_path / "out", format="adapter")
    with pytest.raises(InputError, match=r"^format: must have a base to write an adapter of"):
        merge(None, experts, Average(), tmp_path / "out", format="adapter")
    assert not (tmp_path / "out").exists()


def test_remote_folders_are_read_and_written(tmp_path: Path) -> None:
    import fsspec

    base, experts = save_base(tmp_path), save_experts(tmp_path)
    files = fsspec.filesystem("memory")
    files.put(str(base), "/bucket/base.safetensors")
    for task, path in experts.items():
        files.put(f"{path}/", f"/bucket/{task}/", recursive=True)
    local = merge(base, experts, GradientMatching(), tmp_path / "local")
    remote = merge(
        "memory://bucket/base.safetensors",
        {task: f"memory://bucket/{task}" for task in experts},
        GradientMatching(),
        "memory://bucket/merged",
    )
    assert str(remote.path) == "memory://bucket/merged"
    for file in ("model.safetensors", "hessian.safetensors", "heads/dtd.safetensors"):
        assert files.cat(f"/bucket/merged/{file}") == (Path(local.path) / file).read_bytes()
    with pytest.raises(InputError, match=r"memory://bucket/merged: must be empty or absent"):
        merge(base, experts, Average(), "memory://bucket/merged")
    files.rm("/bucket", recursive=True)


def linear_experts(folder: Path) -> tuple[Path, dict[str, Path], dict[str, Tensor]]:
    """Write experts of one linear layer with the Grams of their inputs."""
    generator = torch.Generator().manual_seed(3)
    base = {"weight": torch.randn(4, 6, generator=generator), "bias": torch.zeros(4)}
    save_file(base, folder / "base.safetensors")
    grams, paths = {}, {}
    for task in "ab":
        inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64)
        grams[task] = inputs.T @ inputs
        state = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in base.items()}
        paths[task] = write_expert(
            folder / task,
            weights=state,
            info=ExpertInfo(task=task, num_examples=40),
            hessian={n: v.abs() for n, v in hessian(state, 0).items()},
            gram={"weight": grams[task].float()},
        )
    return folder / "base.safetensors", paths, grams


def test_reg_mean_reads_the_grams_of_expert_folders(tmp_path: Path) -> None:
    from lit_merge.methods import RegMean

    base, experts, grams = linear_experts(tmp_path)
    result = merge(base, experts, RegMean(off_diagonal=1.0, ridge=0.0), tmp_path / "out")
    made = load_file(Path(result.path) / "model.safetensors")
    weights = {t: load_file(p / "model.safetensors") for t, p in experts.items()}
    right = sum(grams[t] @ weights[t]["weight"].double().T for t in "ab")
    expected = torch.linalg.solve(grams["a"] + grams["b"], right).T
    torch.testing.assert_close(made["weight"].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made["bias"], (weights["a"]["bias"] + weights["b"]["bias"]) / 2)


def test_experts_without_grams_are_refused(tmp_path: Path) -> None:
    from lit_merge.methods import RegMean

    base, experts = save_base(tmp_path), save_experts(tmp_path)
    with pytest.raises(InputError, match=r"svhn.*must have Gram matrices .*--gram true"):
        merge(base, experts, RegMean(), tmp_path / "out")


def test_tasks_masks_give_each_task_its_model(tmp_path: Path) -> None:
    from lit_merge.checkpoint.bit_masks import MaskedCheckpoint
    from lit_merge.methods import TALLMasks

    base, experts = save_base(tmp_path), save_experts(tmp_path)
    result = merge(base, experts, TALLMasks(), tmp_path / "out")
    masks = {file.stem for file in (Path(result.path) / "masks").iterdir()}
    assert masks == set(experts)
    start = load_file(base)
    shared = load_file(Path(result.path) / "model.safetensors")
    for task, path in experts.items():
        with (
            open_checkpoint(base) as opened,
            open_checkpoint(Path(result.path) / "model.safetensors") as merged,
            open_checkpoint(Path(result.path) / "masks" / f"{task}.safetensors") as mask,
        ):
            model = MaskedCheckpoint(opened, merged, mask, float(mask.metadata["scale"]))
            made = model.tensor("linear.weight")
        expert = load_file(path / "model.safetensors")["linear.weight"]
        origin, both = start["linear.weight"], shared["linear.weight"]
        keep = (expert - origin).abs() > 0.4 * (both - expert).abs()
        assert torch.equal(made, torch.where(keep, both, origin))


@pytest.mark.parametrize("rank", [8, None])
def test_adapters_become_one_adapter_that_peft_loads(tmp_path: Path, rank: int | None) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_adapters.bert()
    file = tiny_adapters.save_base(model, tmp_path)
    config = {"target_modules": ["query", "dense"]}
    adapters = {
        task: tiny_adapters.save_adapter(
            tiny_adapters.adapted(model, seed, **config), tmp_path / task
        )
        for seed, task in enumerate(("one", "two"), start=1)
    }
    method = TaskArithmetic(0.5)
    whole = merge(file, adapters, method, tmp_path / "whole")
    made = merge(file, adapters, method, tmp_path / "out", format="adapter", rank=rank)
    (error,) = [float(note.split("error of ")[1].split(" ")[0]) for note in made.notes[-1:]]
    loaded = peft.PeftModel.from_pretrained(model, str(made.path)).merge_and_unload().state_dict()
    expected = load_file(Path(whole.path) / "model.safetensors")
    start = load_file(file)
    changed = [name for name, v in expected.items() if not torch.equal(v, start[name])]
    missed = sum(float((loaded[n] - expected[n]).square().sum()) for n in changed)
    moved = sum(float((expected[n] - start[n]).square().sum()) for n in changed)
    # Two of rank 4 have rank 8 together; cut to 4, something is lost, and how much is said.
    assert (missed / moved) ** 0.5 == pytest.approx(error / 100, rel=5e-3, abs=1e-5)
    assert (error < 1e-2) == (rank == 8)
    assert not (Path(made.path) / "expert.json").exists()


def test_a_merge_with_masks_is_no_expert(tmp_path: Path) -> None:
    from lit_merge.methods import EMR

    base, experts = save_base(tmp_path), save_experts(tmp_path)
    masked = merge(base, experts, EMR(), tmp_path / "masked")
    with pytest.raises(InputError, match=r"masked: must be one model .*\"lit-merge export"):
        merge(base, {"m": masked.path, "x": experts["svhn"]}, Average(), tmp_path / "out")


def test_a_single_expert_at_scale_one_comes_back_in_every_form(tmp_path: Path) -> None:
    base, experts = save_base(tmp_path), save_experts(tmp_path)
    one = {"svhn": experts["svhn"]}
    for form in ("safetensors", "lightning", "distributed"):
        result = merge(base, one, TaskArithmetic(1.0), tmp_path / form, format=form)  # type: ignore[arg-type]
        expert = load_file(experts["svhn"] / "model.safetensors")
        with open_checkpoint(result.path) as made:
            assert torch.equal(made.tensor("linear.weight"), expert["linear.weight"])
