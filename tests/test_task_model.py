"""One task's model in a merged folder, against what the papers' formulas give entry by entry."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, write_expert
from lit_merge.merged.folder import CorrectionRecord, write_corrected
from lit_merge.merged.task_model import open_task_models
from lit_merge.methods import EMR, Average, MergeMethod, TALLMasks
from lit_merge.streaming import merge
from tests.merge_files import MERGED, TASKS, save_base, save_expert, weights

SEEDS = dict(zip(TASKS, (1, 2), strict=True))
CLASSES = {"svhn": 3, "dtd": 5}


def save_all(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Write a base and experts whose heads have different widths."""
    experts = {t: save_expert(folder, t, SEEDS[t], classes=CLASSES[t]) for t in TASKS}
    return save_base(folder), experts


def merged_by(method: MergeMethod, folder: Path) -> Path:
    base, experts = save_all(folder)
    return Path(merge(base, experts, method, folder / "merged", progress=False).path)


def numbers(state: dict[str, Tensor], name: str) -> list[float]:
    return state[name].double().flatten().tolist()


def tall_model(task: str, threshold: float, scale: float) -> dict[str, list[float]]:
    """Return θ₀ + m_t ⊙ τ, one Python number after the other."""
    base, experts = weights(0), {t: weights(SEEDS[t]) for t in TASKS}
    model = {}
    for name in MERGED:
        entries = []
        columns = zip(
            numbers(base, name), *(numbers(e, name) for e in experts.values()), strict=True
        )
        for start, *ends in columns:
            vectors = dict(zip(TASKS, (end - start for end in ends), strict=True))
            total = scale * sum(vectors.values())
            own = vectors[task]
            used = abs(own) > threshold * abs(total - own)
            entries.append(start + total if used else start)
        model[name] = entries
    return model


def emr_model(task: str) -> tuple[dict[str, list[float]], float]:
    """Return θ₀ + λ_t m_t ⊙ τ and λ_t, one Python number after the other."""
    base, experts = weights(0), {t: weights(SEEDS[t]) for t in TASKS}
    unified: dict[str, list[float]] = {}
    mask: dict[str, list[bool]] = {}
    own_mean = masked_mean = 0.0
    for name in MERGED:
        columns = zip(
            numbers(base, name), *(numbers(e, name) for e in experts.values()), strict=True
        )
        unified[name], mask[name] = [], []
        own_sum = masked_sum = 0.0
        for start, *ends in columns:
            vectors = dict(zip(TASKS, (end - start for end in ends), strict=True))
            sign = 1.0 if sum(vectors.values()) > 0 else -1.0
            elected = sign * max((sign * v for v in vectors.values() if v * sign > 0), default=0.0)
            unified[name].append(elected)
            mask[name].append(vectors[task] * elected > 0)
            own_sum += abs(vectors[task])
            masked_sum += abs(elected) if mask[name][-1] else 0.0
        own_mean += own_sum / len(unified[name])
        masked_mean += masked_sum / len(unified[name])
    factor = own_mean / masked_mean
    model = {
        name: [
            start + factor * vector * used
            for start, vector, used in zip(
                numbers(base, name), unified[name], mask[name], strict=True
            )
        ]
        for name in MERGED
    }
    return model, factor


@pytest.mark.parametrize("task", TASKS)
def test_tall_masks_give_each_task_its_entries_of_the_sum(tmp_path: Path, task: str) -> None:
    folder = merged_by(TALLMasks(threshold=0.6, scale=0.5), tmp_path)
    expected = tall_model(task, threshold=0.6, scale=0.5)
    with open_task_models(folder) as models:
        model = models.model(task)
        for name in MERGED:
            found = model.tensor(name).double().flatten()
            torch.testing.assert_close(
                found, torch.tensor(expected[name], dtype=torch.float64), rtol=1e-5, atol=1e-6
            )
        used = [e != b for n in MERGED for e, b in zip(expected[n], numbers(weights(0), n))]  # noqa: B905
        assert models.mask_share(task) == pytest.approx(sum(used) / len(used))
        assert model.scale == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_emr_gives_each_task_its_signs_and_its_scale(tmp_path: Path, task: str) -> None:
    folder = merged_by(EMR(), tmp_path)
    expected, factor = emr_model(task)
    with open_task_models(folder) as models:
        model = models.model(task)
        assert model.scale == pytest.approx(factor, rel=1e-5)
        for name in MERGED:
            found = model.tensor(name).double().flatten()
            torch.testing.assert_close(
                found, torch.tensor(expected[name], dtype=torch.float64), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("method", [Average(), TALLMasks()], ids=["shared", "masked"])
def test_the_head_is_the_experts_whatever_its_width(tmp_path: Path, method: MergeMethod) -> None:
    folder = merged_by(method, tmp_path)
    with open_task_models(folder) as models:
        assert models.parts.tasks == TASKS
        for task in TASKS:
            expert = weights(SEEDS[task], classes=CLASSES[task])
            model = models.model(task)
            assert set(model) == set(expert)
            for name in ("head.weight", "head.bias"):
                assert model.infos[name].shape == expert[name].shape
                assert torch.equal(model.tensor(name), expert[name])


def test_without_masks_the_body_is_the_merge_and_the_base_may_be_gone(tmp_path: Path) -> None:
    folder = merged_by(Average(), tmp_path)
    (tmp_path / "base.safetensors").unlink()
    shared = load_file(folder / "model.safetensors")
    with open_task_models(folder) as models:
        model = models.model("dtd")
        assert all(torch.equal(model.tensor(name), shared[name]) for name in MERGED)
        assert models.mask_share("dtd") is None


def test_any_chunk_is_that_part_of_the_whole(tmp_path: Path) -> None:
    folder = merged_by(EMR(), tmp_path)
    with open_task_models(folder) as models:
        model = models.model("svhn")
        whole = model.tensor("emb.weight").flatten()
        for start, stop in ((0, 44), (3, 17), (8, 9), (43, 44)):
            assert torch.equal(model.read("emb.weight", start, stop), whole[start:stop])


def test_a_type_is_that_of_floating_tensors_only(tmp_path: Path) -> None:
    folder = merged_by(EMR(), tmp_path)
    with open_task_models(folder) as models:
        plain, half = models.model("svhn"), models.model("svhn", dtype=torch.bfloat16)
        assert half.infos["norm.num_batches_tracked"].dtype == torch.int64
        for name in ("linear.weight", "head.weight", "norm.running_mean"):
            assert torch.equal(half.tensor(name), plain.tensor(name).bfloat16())


def test_a_value_that_the_type_does_not_hold_is_named(tmp_path: Path) -> None:
    changes = {"linear.bias": torch.full((6,), 1e6)}
    experts = {t: save_expert(tmp_path, t, s, changes=changes) for t, s in SEEDS.items()}
    merge(save_base(tmp_path), experts, Average(), tmp_path / "merged", progress=False)
    with open_task_models(tmp_path / "merged") as models:
        model = models.model("svhn", dtype=torch.float16)
        with pytest.raises(InputError, match=r"'linear\.bias' must fit float16; got .* 1e\+06"):
            model.tensor("linear.bias")


def test_tensors_that_are_tied_are_masked_alike(tmp_path: Path) -> None:
    def tied(seed: int) -> dict[str, Tensor]:
        state = weights(seed)
        return {**state, "lm.decoder.weight": state["emb.weight"].clone()}

    save_file(tied(0), tmp_path / "base.safetensors")
    info = {"tied_parameters": (("emb.weight", "lm.decoder.weight"),)}
    for task, seed in SEEDS.items():
        heads = ("head.weight", "head.bias")
        named = ExpertInfo(task=task, head_parameters=heads, **info)  # type: ignore[arg-type]
        write_expert(tmp_path / task, weights=tied(seed), info=named)
    experts = {task: tmp_path / task for task in TASKS}
    merge(tmp_path / "base.safetensors", experts, EMR(), tmp_path / "out", progress=False)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert [t["name"] for t in record["tensors"] if t["alias_of"]] == ["lm.decoder.weight"]
    with open_task_models(tmp_path / "out") as models:
        model = models.model("dtd")
        embedding, decoder = model.tensor("emb.weight"), model.tensor("lm.decoder.weight")
        assert torch.equal(embedding, decoder)
        assert not torch.equal(
            embedding, load_file(tmp_path / "out/model.safetensors")["emb.weight"]
        )


def test_a_threshold_of_zero_uses_every_weight(tmp_path: Path) -> None:
    folder = merged_by(TALLMasks(threshold=0.0), tmp_path)
    with open_task_models(folder) as models:
        assert math.isclose(models.mask_share("svhn") or 0, 1.0)


def test_a_scale_that_leaves_the_type_is_named(tmp_path: Path) -> None:
    folder = merged_by(EMR(), tmp_path)
    masks = folder / "masks" / "svhn.safetensors"
    save_file(load_file(masks), masks, {"scale": "3e38"})
    with (
        open_task_models(folder) as models,
        pytest.raises(
            InputError, match=r"'linear\.bias' must fit float32; got .* scaled by 3e\+38"
        ),
    ):
        models.model("svhn").tensor("linear.bias")


@pytest.mark.parametrize("options", [{"shard_bytes": 200}, {"format": "lightning"}])
@pytest.mark.filterwarnings("ignore")
def test_every_form_of_a_merge_gives_the_same_models(
    tmp_path: Path, options: dict[str, object]
) -> None:
    base, experts = save_all(tmp_path)
    for name, more in (("plain", {}), ("other", options)):
        merge(base, experts, EMR(), tmp_path / name, progress=False, **more)  # type: ignore[arg-type]
    with (
        open_task_models(tmp_path / "plain") as plain,
        open_task_models(tmp_path / "other") as other,
    ):
        for task in TASKS:
            left, right = plain.model(task), other.model(task)
            assert set(left) == set(right)
            assert all(torch.equal(left.tensor(name), right.tensor(name)) for name in left)


def test_a_base_that_has_moved_is_named_by_the_user(tmp_path: Path) -> None:
    folder = merged_by(TALLMasks(), tmp_path)
    with open_task_models(folder) as models:
        before = models.model("svhn").tensor("emb.weight")
    (tmp_path / "base.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(InputError, match=r"must be the base that .*merge\.json names; got no such"):
        open_task_models(folder).__enter__()
    with open_task_models(folder, base=tmp_path / "moved.safetensors") as models:
        assert torch.equal(models.model("svhn").tensor("emb.weight"), before)


@pytest.mark.parametrize("method", [Average(), TALLMasks()], ids=["shared", "masked"])
def test_another_base_is_refused(tmp_path: Path, method: MergeMethod) -> None:
    folder = merged_by(method, tmp_path)
    save_file(weights(7), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"other\.safetensors: must be the base that .* names"):
        open_task_models(folder, base=tmp_path / "other.safetensors").__enter__()


def test_a_record_without_base_is_refused(tmp_path: Path) -> None:
    folder = merged_by(TALLMasks(), tmp_path)
    file = folder / "merge.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base": None}))
    with pytest.raises(InputError, match=r"merge\.json: must name the base and its fingerprint"):
        open_task_models(folder).__enter__()


def test_weights_that_the_record_does_not_name_are_refused(tmp_path: Path) -> None:
    folder = merged_by(Average(), tmp_path)
    save_file(weights(9), folder / "model.safetensors")
    with pytest.raises(InputError, match=r"must hold the weights that merge\.json names"):
        open_task_models(folder).__enter__()


@pytest.mark.parametrize("method", [TALLMasks(), EMR()])
def test_a_folder_that_has_lost_its_masks_is_refused(tmp_path: Path, method: MergeMethod) -> None:
    folder = merged_by(method, tmp_path)
    (folder / "masks" / "dtd.safetensors").unlink()
    with pytest.raises(InputError, match=r"masks: must hold the mask of every task; .* 'dtd'"):
        open_task_models(folder).__enter__()
    shutil.rmtree(folder / "masks")
    with pytest.raises(InputError, match=r"masks: must hold the mask of every task, as the merge"):
        open_task_models(folder).__enter__()


def test_a_folder_that_has_lost_its_heads_is_refused(tmp_path: Path) -> None:
    folder = merged_by(Average(), tmp_path)
    shutil.rmtree(folder / "heads")
    with (
        open_task_models(folder) as models,
        pytest.raises(
            InputError, match=r"must lie beside the head of task 'svhn'; got none for 'head\.bias'"
        ),
    ):
        models.model("svhn")


def test_an_unknown_task_is_answered_with_the_nearest(tmp_path: Path) -> None:
    folder = merged_by(Average(), tmp_path)
    with open_task_models(folder) as models:
        with pytest.raises(InputError, match=r"svhn, dtd.*; got 'svnh'\. Did you mean \"svhn\"\?"):
            models.model("svnh")
        with pytest.raises(InputError, match=r"got '../x'\. Name one of them"):
            models.model("../x")


def test_a_corrected_folder_is_refused(tmp_path: Path) -> None:
    record = CorrectionRecord(("a",), (2,), (), "RescaleShift", calibrated=True)
    write_corrected(
        tmp_path / "out", weights={"w": torch.ones(2)}, heads={}, corrections={}, record=record
    )
    with pytest.raises(InputError, match=r"must be a merge without corrections; got a corrected"):
        open_task_models(tmp_path / "out").__enter__()


def test_a_merge_of_merges_has_the_heads_of_all_tasks(tmp_path: Path) -> None:
    base, experts = save_all(tmp_path)
    merge(base, experts, Average(), tmp_path / "both", progress=False)
    third = save_expert(tmp_path, "cars", 3, classes=4)
    inputs = {"both": tmp_path / "both", "cars": third}
    merge(base, inputs, Average(), tmp_path / "all", progress=False)
    with open_task_models(tmp_path / "all") as models:
        assert set(models.parts.tasks) == {"svhn", "dtd", "cars"}
        for task, seed in (*SEEDS.items(), ("cars", 3)):
            head = weights(seed, classes=CLASSES.get(task, 4))["head.weight"]
            assert torch.equal(models.model(task).tensor("head.weight"), head)
