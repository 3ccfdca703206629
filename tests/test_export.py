"""Plain models of a merged folder's tasks: loaded by the libraries that they are for."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import lit_merge
from lit_merge.checkpoint import fingerprint, open_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from lit_merge.export import export_task
from lit_merge.methods import EMR, Average, MergeMethod, TALLMasks, TaskArithmetic
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming import merge
from tests import tiny_adapters
from tests.merge_files import TASKS, save_base, save_expert, save_experts, weights

TALL = TALLMasks(threshold=0.4)


def tall_state(
    base: dict[str, Tensor], experts: dict[str, dict[str, Tensor]], task: str, head: str
) -> dict[str, Tensor]:
    """Return the masked model of a task in float64, with the expert's own head."""
    state = {}
    for name, start in base.items():
        own = experts[task][name]
        if name.startswith(head) or not own.dtype.is_floating_point:
            state[name] = own
            continue
        vectors = {t: e[name].double() - start.double() for t, e in experts.items()}
        total = torch.stack(list(vectors.values())).sum(0)
        used = vectors[task].abs() > 0.4 * (total - vectors[task]).abs()
        state[name] = (start.double() + total * used).to(start.dtype)
    return state


def merged_by(method: MergeMethod, folder: Path, **options: Any) -> Path:
    base, experts = save_base(folder), save_experts(folder)
    result = merge(base, experts, method, folder / "merged", progress=False, **options)
    return Path(result.path)


def bert(seed: int, labels: int = 3) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    names = {i: f"class-{seed}-{i}" for i in range(labels)}
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        id2label=names,
        label2id={name: i for i, name in names.items()},
    )
    model: nn.Module = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


TOKENS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(0))
LABELS = {"a": 3, "b": 5}


class Berts:
    """A base, two experts of other classes and their TALL masks, on disk."""

    def __init__(self, root: Path, *, backbone: bool = False) -> None:
        self.root = root
        base: Any = bert(0)
        base = base.bert if backbone else base
        base.save_pretrained(root / "base")
        self.models: dict[str, Any] = {}
        for seed, (task, labels) in enumerate(LABELS.items(), start=1):
            self.models[task] = bert(seed, labels)
            self.models[task].save_pretrained(root / task)
        (root / "a" / "vocab.txt").write_text("of the expert")
        self.states = {t: dict(model.state_dict()) for t, model in self.models.items()}
        self.base = {("bert." if backbone else "") + n: v for n, v in base.state_dict().items()}
        paths = {task: root / task for task in LABELS}
        merge(root / "base", paths, TALL, root / "merged", progress=False)

    def expected(self, task: str) -> Tensor:
        body = {n: v for n, v in self.base.items() if not n.startswith("classifier")}
        state = tall_state(body, self.states, task, "classifier")
        model = bert(9, LABELS[task])
        head = {n: v for n, v in self.states[task].items() if n.startswith("classifier")}
        model.load_state_dict({**state, **head})
        logits: Tensor = model(TOKENS).logits
        return logits


def logits_of(folder: Path) -> tuple[Tensor, Any]:
    from transformers import AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification
    model, found = auto.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    return model.eval()(TOKENS).logits, model.config


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backbone", [False, True], ids=["classifier", "backbone"])
def test_transformers_loads_the_masked_model_of_a_task(tmp_path: Path, backbone: bool) -> None:
    berts = Berts(tmp_path, backbone=backbone)
    for task in LABELS:
        result = export_task(tmp_path / "merged", task, tmp_path / f"{task}-out", progress=False)
        logits, config = logits_of(tmp_path / f"{task}-out")
        torch.testing.assert_close(logits, berts.expected(task), rtol=1e-4, atol=1e-5)
        assert config.id2label == berts.models[task].config.id2label
        assert result.notes == ()
        assert result.share is not None
        assert 0 < result.share < 1
    assert (tmp_path / "a-out" / "vocab.txt").read_text() == "of the expert"


@pytest.mark.filterwarnings("ignore")
def test_where_the_expert_is_gone_the_classes_are_numbered(tmp_path: Path) -> None:
    berts = Berts(tmp_path)
    expected = berts.expected("b")
    shutil.rmtree(tmp_path / "b")
    result = export_task(tmp_path / "merged", "b", tmp_path / "out", progress=False)
    logits, config = logits_of(tmp_path / "out")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert config.id2label == {i: f"LABEL_{i}" for i in range(5)}
    assert "config.json: is the base's with 5 classes" in result.notes[0]


@pytest.mark.filterwarnings("ignore")
def test_an_expert_that_was_trained_on_is_not_taken_for_the_one_that_was_merged(
    tmp_path: Path,
) -> None:
    Berts(tmp_path)
    shutil.rmtree(tmp_path / "b")
    other: Any = bert(7, 5)
    other.save_pretrained(tmp_path / "b")
    result = export_task(tmp_path / "merged", "b", tmp_path / "out", progress=False)
    assert "b: is no longer the expert that was merged" in result.notes[0]
    assert logits_of(tmp_path / "out")[1].id2label[0] == "LABEL_0"


@pytest.mark.filterwarnings("ignore")
def test_a_type_is_that_of_weights_and_configuration(tmp_path: Path) -> None:
    Berts(tmp_path)
    export_task(tmp_path / "merged", "a", tmp_path / "out", dtype="bfloat16", progress=False)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("gone", [False, True])
def test_timm_loads_the_masked_model_of_a_task(tmp_path: Path, gone: bool) -> None:
    def model(seed: int, classes: int) -> nn.Module:
        torch.manual_seed(seed)
        made: nn.Module = timm.create_model(
            "test_efficientnet", pretrained=False, num_classes=classes, in_chans=1
        )
        with torch.no_grad():
            for value in made.parameters():
                value.add_(0.1 * torch.randn_like(value))
        return made.eval()

    nets = {"base": model(0, 5), "a": model(1, 4), "b": model(2, 5)}
    for name, net in nets.items():
        save_for_hf(net, str(tmp_path / name), safe_serialization=True)
    paths = {task: tmp_path / task for task in "ab"}
    merge(tmp_path / "base", paths, TALL, tmp_path / "merged", progress=False)
    if gone:
        shutil.rmtree(tmp_path / "a")
    export_task(tmp_path / "merged", "a", tmp_path / "out", progress=False)
    states = {task: dict(nets[task].state_dict()) for task in "ab"}
    shared = load_file(tmp_path / "merged" / "model.safetensors")
    expected = tall_state(dict(nets["base"].state_dict()), states, "a", "classifier")
    # Buffers are averaged in any merge, and counters kept.
    expected |= {n: v for n, v in shared.items() if "running" in n or "tracked" in n}
    reference = model(0, 4)
    reference.load_state_dict(expected)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    assert loaded(x).shape == (2, 4)
    torch.testing.assert_close(loaded(x), reference(x), rtol=1e-4, atol=1e-4)


class Net(L.LightningModule):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(nn.Linear(4, width))
        self.head = nn.Linear(width, classes)


def save_net(path: Path, seed: int, classes: int) -> Net:
    torch.manual_seed(seed)
    net = Net(width=6, classes=classes)
    trainer = L.Trainer(
        max_epochs=0, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=path.parent,
    )  # fmt: skip
    trainer.strategy.connect(net)
    trainer.save_checkpoint(path)
    return net


@pytest.mark.filterwarnings("ignore")
def test_lightning_loads_the_model_of_a_task_with_the_experts_settings(tmp_path: Path) -> None:
    nets = {
        name: save_net(tmp_path / f"{name}.ckpt", seed, classes)
        for seed, (name, classes) in enumerate({"base": 3, "a": 4, "b": 3}.items())
    }
    paths = {task: tmp_path / f"{task}.ckpt" for task in "ab"}
    merge(tmp_path / "base.ckpt", paths, TALL, tmp_path / "merged", progress=False)
    result = export_task(
        tmp_path / "merged", "a", tmp_path / "out", format="lightning", progress=False
    )
    assert result.notes == ()
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["expert.json", "export.json", "model.ckpt"]
    loaded = Net.load_from_checkpoint(tmp_path / "out" / "model.ckpt", map_location="cpu")
    assert loaded.hparams["classes"] == 4
    states = {task: dict(nets[task].state_dict()) for task in "ab"}
    expected = tall_state(dict(nets["base"].state_dict()), states, "a", "head")
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    for path in paths.values():
        path.unlink()
    same = export_task(tmp_path / "merged", "b", tmp_path / "b", format="lightning", progress=False)
    assert same.notes == ()  # the base's settings fit this head
    wider = export_task(
        tmp_path / "merged", "a", tmp_path / "a", format="lightning", progress=False
    )
    assert wider.notes[0].startswith(f"{tmp_path / 'a' / 'model.ckpt'}: has no hyper-parameters")


@pytest.mark.parametrize("method", [Average(), EMR()], ids=["shared", "masked"])
def test_the_record_says_where_the_model_comes_from(tmp_path: Path, method: MergeMethod) -> None:
    folder = merged_by(method, tmp_path)
    result = export_task(folder, "dtd", tmp_path / "out", progress=False)
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    merged = json.loads((folder / "merge.json").read_text())
    with open_checkpoint(tmp_path / "out") as written:
        assert record["fingerprint"] == fingerprint(written)
        assert result.num_bytes == sum(info.nbytes for info in written.infos.values())
    assert record["task"] == result.task == "dtd"
    assert record["merged"]["fingerprint"] == merged["fingerprint"]
    assert record["merged"]["method"]["class_path"].endswith(type(method).__name__)
    assert record["expert"]["fingerprint"] == merged["experts"]["dtd"]["fingerprint"]
    assert sorted(record["head"]) == ["head.bias", "head.weight"]
    if isinstance(method, EMR):
        assert record["base"]["fingerprint"] == merged["base"]["fingerprint"]
        assert record["mask"]["share"] == result.share
        assert record["mask"]["scale"] != 1
    else:
        assert record["mask"] is record["base"] is result.share is None


def test_one_expert_alone_is_exported_bit_for_bit(tmp_path: Path) -> None:
    base, expert = save_base(tmp_path), save_expert(tmp_path, "svhn", 1, classes=4)
    merge(base, {"svhn": expert}, EMR(), tmp_path / "merged", progress=False)
    export_task(tmp_path / "merged", "svhn", tmp_path / "out", progress=False)
    found, state = load_file(tmp_path / "out" / "model.safetensors"), weights(1, classes=4)
    del state["norm.num_batches_tracked"]  # a counter, kept as in the base
    assert all(torch.equal(found[name], value) for name, value in state.items())


@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_was_written_as_an_adapter_is_exported_whole(tmp_path: Path) -> None:
    model = tiny_adapters.bert()
    base = tiny_adapters.save_base(model, tmp_path)
    adapters = {}
    for seed, task in enumerate(("one", "two"), start=1):
        adapted = tiny_adapters.adapted(model, seed, target_modules=["query", "dense"])
        adapters[task] = tiny_adapters.save_adapter(adapted, tmp_path / task)
    for name, form in (("whole", "safetensors"), ("small", "adapter")):
        merge(
            base,
            adapters,
            TaskArithmetic(0.5),
            tmp_path / name,
            format=form,  # type: ignore[arg-type]
            rank=8 if form == "adapter" else None,  # both of rank 4: nothing is lost
            policy=ParametersPolicy(heads="merge"),
            progress=False,
        )
    result = export_task(tmp_path / "small", "one", tmp_path / "out", progress=False)
    assert result.notes == ()
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    base.unlink()
    with pytest.raises(InputError, match=r"must be the base that .*merge\.json names; got no such"):
        export_task(tmp_path / "small", "one", tmp_path / "again", progress=False)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    folder = merged_by(Average(), tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"merged/config\.json: must"):
        export_task(folder, "svhn", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = merged_by(Average(), tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError):
        export_task(folder, "svhn", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    folder = merged_by(Average(), tmp_path)
    with pytest.raises(InputError, match=r"format: must be one of safetensors, lightning; got 'x'"):
        export_task(folder, "svhn", tmp_path / "out", format="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"dtype: must be one of .*; got 'int8'"):
        export_task(folder, "svhn", tmp_path / "out", dtype="int8")
    with pytest.raises(InputError, match=r"task: must be one of svhn, dtd"):
        export_task(folder, "cars", tmp_path / "out")
    export_task(folder, "svhn", tmp_path / "out", progress=False)
    with pytest.raises(InputError, match=r"out: must be empty or absent"):
        export_task(folder, "dtd", tmp_path / "out")
    export_task(folder, "dtd", tmp_path / "out", replace=True, progress=False)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["task"] == "dtd"


def test_an_exported_model_is_an_expert_of_the_same_base(tmp_path: Path) -> None:
    folder = merged_by(TALL, tmp_path)
    states, paths = {}, {}
    for task in TASKS:
        paths[task] = tmp_path / f"{task}-out"
        export_task(folder, task, paths[task], progress=False)
        states[task] = load_file(paths[task] / "model.safetensors")
        with closing(open_expert(paths[task])) as expert:
            assert expert.info.task == task
            assert set(expert.info.head_parameters) == {"head.weight", "head.bias"}
    again = merge(tmp_path / "base.safetensors", paths, Average(), tmp_path / "x", progress=False)
    assert again.tasks == TASKS
    found = load_file(tmp_path / "x" / "model.safetensors")["emb.weight"]
    expected = (states["svhn"]["emb.weight"] + states["dtd"]["emb.weight"]) / 2
    torch.testing.assert_close(found, expected)


def test_names_of_a_hugging_face_expert_are_those_of_head_and_tied_tensors(tmp_path: Path) -> None:
    def tied(seed: int, prefix: str) -> dict[str, Tensor]:
        state = weights(seed)
        state["lm.weight"] = state["emb.weight"].clone()
        return {f"{prefix}{name}": value for name, value in state.items()}

    save_file(tied(0, "net."), tmp_path / "base.safetensors")
    for seed, task in enumerate(TASKS, start=1):
        info = ExpertInfo(
            task=task,
            head_parameters=("head.weight", "head.bias"),
            tied_parameters=(("emb.weight", "lm.weight"),),
        )
        write_expert(tmp_path / task, weights=tied(seed, ""), info=info)
        (tmp_path / task / "config.json").write_text('{"model_type": "x"}')
    paths = {task: tmp_path / task for task in TASKS}
    merge(tmp_path / "base.safetensors", paths, EMR(), tmp_path / "merged", progress=False)
    export_task(tmp_path / "merged", "dtd", tmp_path / "out", progress=False)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tied(0, ""))
    with closing(open_expert(tmp_path / "out")) as expert:
        assert set(expert.info.head_parameters) == {"head.weight", "head.bias"}
        assert set(expert.info.tied_parameters[0]) == {"emb.weight", "lm.weight"}
    merge(tmp_path / "base.safetensors", {"dtd": tmp_path / "out"}, Average(), tmp_path / "again")


def test_the_function_is_part_of_the_library() -> None:
    assert lit_merge.export_task is export_task
