"""Exports of corrected folders: run by timm, transformers and torch where there is no lit_merge."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lit_merge.export.corrected as corrected_export
from lit_merge.correction.folding import Folding, largest_difference
from lit_merge.errors import InputError
from lit_merge.export import export_task
from lit_merge.export.multi_task import export_multi_task
from lit_merge.export.proof import import_file
from lit_merge.tasks import DatasetTask
from tests.corrected_folders import CLASSES, logits_of, save_corrected, tiny_gpt2
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit

OUTSIDE = """
import importlib.util, json, sys
sys.modules["lit_merge"] = None
import torch
from pathlib import Path

def build(case):
    if case["library"] == "transformers":
        from transformers import AutoModelForSequenceClassification
        model, found = AutoModelForSequenceClassification.from_pretrained(
            case["folder"], output_loading_info=True
        )
        assert not any(found.values()), found
        return model
    if case["library"] == "timm":
        import timm
        return timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=2,
            num_classes=case["classes"], checkpoint_path=case["folder"] + "/model.safetensors",
        )
    from safetensors.torch import load_file
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, case["classes"]),
    )
    model.load_state_dict(load_file(case["folder"] + "/model.safetensors"))
    return model

outputs = {}
for key, case in json.loads(Path(sys.argv[1]).read_text()).items():
    model = build(case).eval()
    code = Path(case["folder"]) / "correction.py"
    if code.exists():
        spec = importlib.util.spec_from_file_location("correction", code)
        correction = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(correction)
        correction.apply(model, Path(case["folder"]) / "corrections.safetensors")
    inputs = torch.load(case["inputs"])
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    outputs[key] = (getattr(output, "logits", output), hooks)
assert not any(name.startswith("lit_merge.") for name in sys.modules)
torch.save(outputs, sys.argv[2])
"""


def conv_net() -> nn.Module:
    model = tiny_conv_net()
    model.example_input_array = images(4, 0, 1)  # type: ignore[assignment] # as Lightning has it
    return model


TEXTS = padded_texts((7, 3, 5))
MODELS: dict[str, tuple[str, Callable[[], nn.Module], Any]] = {
    "conv": ("torch", conv_net, images(4, 5, 1)),
    "vit": ("timm", tiny_vit, images(4, 5)),
    "bert": ("transformers", tiny_bert, TEXTS),
    "gpt2": ("transformers", tiny_gpt2, TEXTS),
}
# All kinds of sites, and how many of them stay between the layers.
SITES: dict[str, tuple[str | list[str], int]] = {
    "conv all": (["linear", "norm", "0", "3"], 0),
    "conv inputs": (["0:input", "3:input"], 1),  # the first one pads
    "vit auto": ("auto", 0),
    "vit all": ("*", 0),
    "vit context": (["auto", "blocks.*.attn.proj:input"], 0),
    "bert auto": ("auto", 0),
    "bert all": ("*", 0),
    "gpt2 auto": ("auto", 0),
    "gpt2 all": ("*", 0),
}


@dataclass(frozen=True)
class Case:
    folder: Path
    expected: Tensor
    found: Tensor
    hooks: int
    record: dict[str, Any]
    error: float | None


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Every case, corrected, exported, and run by the libraries alone in another process."""
    root = tmp_path_factory.mktemp("exports")
    listed, known = {}, {}
    for key, (where, _) in SITES.items():
        name = key.split()[0]
        library, make, inputs = MODELS[name]
        model: Any = make()
        experts = {}
        if library == "transformers":
            expert = root / f"{name} expert"
            experts = {"dtd": expert}
            if not expert.exists():
                other: Any = make()
                labels = {i: f"class-{i}" for i in range(CLASSES["dtd"])}
                other.config.id2label = labels
                head = "classifier" if name == "bert" else "score"
                old = getattr(other, head)
                setattr(other, head, nn.Linear(old.in_features, 5, bias=old.bias is not None))
                other.save_pretrained(expert)
        folder = root / key
        network = save_corrected(model, where, folder / "corrected", experts=experts)
        out = folder / "out"
        result = export_task(folder / "corrected", "dtd", out, model=model, progress=False)
        torch.save(inputs, folder / "inputs.pt")
        listed[key] = {
            "folder": str(out),
            "library": library,
            "classes": CLASSES["dtd"],
            "inputs": str(folder / "inputs.pt"),
        }
        known[key] = (out, logits_of(network, inputs, "dtd"), result.error)
    (root / "cases.json").write_text(json.dumps(listed))
    (root / "outside.py").write_text(OUTSIDE)
    files = [str(root / name) for name in ("outside.py", "cases.json", "outputs.pt")]
    done = subprocess.run(
        [sys.executable, "-I", *files], check=False, capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    outputs = torch.load(root / "outputs.pt")
    return {
        key: Case(
            out, expected, *outputs[key],
            json.loads((out / "export.json").read_text())["correction"], error,
        )
        for key, (out, expected, error) in known.items()
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", SITES)
def test_an_exported_model_is_the_corrected_one_without_lit_merge(
    cases: dict[str, Case], key: str
) -> None:
    case, left = cases[key], SITES[key][1]
    assert largest_difference(case.found, case.expected) <= 1e-5
    assert case.error is not None
    assert case.error <= 1e-5
    assert case.record["error"] == case.error
    assert len(case.record["left"]) == left
    assert case.hooks == left  # folding costs nothing when the model runs
    assert (case.folder / "correction.py").exists() == bool(left)


def test_configuration_and_labels_are_the_experts(cases: dict[str, Case]) -> None:
    config = json.loads((cases["bert auto"].folder / "config.json").read_text())
    assert config["id2label"]["4"] == "class-4"


def rms_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.GELU(), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 4)
    ).eval()


def points(task: str) -> DatasetTask:
    torch.manual_seed(len(task))
    examples = [(torch.randn(6), 0) for _ in range(12)]
    return DatasetTask(examples, num_classes=CLASSES[task])


POINTS = {task: points(task) for task in CLASSES}


def test_what_cannot_be_folded_is_named_and_comes_as_a_file(tmp_path: Path) -> None:
    model = rms_net()
    network = save_corrected(model, ["0", "2", "3"], tmp_path / "c")
    result = export_task(
        tmp_path / "c", "dtd", tmp_path / "o", model=model, examples=POINTS, progress=False
    )
    record = json.loads((tmp_path / "o" / "export.json").read_text())["correction"]
    assert record["folded"] == ["2"]
    assert record["left"] == dict.fromkeys("03", "it has no bias for the shift")
    assert record["inputs"] == "given"
    assert record["examples"] == 8
    assert "2 of 3 sites cannot be folded and need correction.py: 0 (it has no" in result.notes[0]
    plain = nn.Sequential(*list(rms_net())[:-1], nn.Linear(8, 5))
    plain.load_state_dict(load_file(tmp_path / "o" / "model.safetensors"))
    script = (
        "import sys; sys.modules['lit_merge'] = None; sys.path.insert(0, '.')\n"
        "import torch, correction; from torch import nn\n"
        "plain = torch.load('../plain.pt', weights_only=False)\n"
        "correction.apply(plain, 'corrections.safetensors')\n"
        "torch.save(plain(torch.load('../inputs.pt')), '../found.pt')\n"
    )
    inputs = torch.randn(7, 6)
    torch.save(plain, tmp_path / "plain.pt")
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path / "o")
    found = torch.load(tmp_path / "found.pt")
    torch.testing.assert_close(found.detach(), logits_of(network, inputs, "dtd"))


def test_representation_surgery_comes_as_a_file(tmp_path: Path) -> None:
    model = tiny_vit()
    network = save_corrected(model, "auto", tmp_path / "c", surgery_rank=2)
    result = export_task(tmp_path / "c", "dtd", tmp_path / "o", model=model, progress=False)
    assert result.error is not None
    assert result.error <= 1e-5
    record = json.loads((tmp_path / "o" / "export.json").read_text())["correction"]
    assert record["left"] == {"head:input": "representation surgery is not linear"}
    plain = tiny_vit(1)
    plain.head = nn.Linear(32, CLASSES["dtd"])
    plain.load_state_dict(load_file(tmp_path / "o" / "model.safetensors"))
    inputs = images(3)
    expected = logits_of(network, inputs, "dtd")
    with torch.no_grad():
        assert largest_difference(plain(inputs), expected) > 1e-2
        import_file(tmp_path / "o" / "correction.py").apply(
            plain, tmp_path / "o" / "corrections.safetensors"
        )
        assert largest_difference(plain(inputs), expected) <= 1e-5
    with pytest.raises(InputError, match=r"head:input \(representation surgery"):
        export_task(
            tmp_path / "c", "dtd", tmp_path / "p", model=model, fold="require", progress=False
        )
    one = export_multi_task(tmp_path / "c", tmp_path / "m", model=model)
    assert one.error is not None
    assert one.error <= 1e-5


def test_scales_alone_fold_without_a_bias(tmp_path: Path) -> None:
    model = rms_net()
    save_corrected(model, ["0", "2", "3"], tmp_path / "c", shifts=False)
    export_task(
        tmp_path / "c", "dtd", tmp_path / "o", model=model, examples=POINTS, fold="require",
        progress=False,
    )  # fmt: skip
    assert not (tmp_path / "o" / "correction.py").exists()


def test_low_precision_is_written_after_the_proof(tmp_path: Path) -> None:
    model = tiny_vit()
    save_corrected(model, "auto", tmp_path / "c", dtype=torch.bfloat16)
    result = export_task(tmp_path / "c", "dtd", tmp_path / "half", model=model, progress=False)
    assert result.error is not None
    assert result.error < 1e-5
    assert load_file(tmp_path / "half" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16
    whole = export_task(
        tmp_path / "c", "dtd", tmp_path / "whole", model=model, dtype="float32", progress=False
    )
    assert not whole.notes
    precise = load_file(tmp_path / "whole" / "model.safetensors")
    for name, value in load_file(tmp_path / "half" / "model.safetensors").items():
        assert torch.equal(value, precise[name].to(value.dtype)), name
    noted = export_task(
        tmp_path / "c", "dtd", tmp_path / "f16", model=model, dtype="float16", progress=False
    )
    assert "before they were rounded to float16" in noted.notes[0]


def test_a_model_of_half_precision_is_proved_in_float32(tmp_path: Path) -> None:
    model = tiny_vit().bfloat16()
    save_corrected(model, "auto", tmp_path / "c")
    result = export_task(tmp_path / "c", "dtd", tmp_path / "o", model=model, progress=False)
    assert result.error is not None
    assert result.error < 1e-5


def test_a_lightning_checkpoint_holds_the_same_weights(tmp_path: Path) -> None:
    model = tiny_vit()
    save_corrected(model, "auto", tmp_path / "c")
    for format in ("safetensors", "lightning"):
        export_task(
            tmp_path / "c", "dtd", tmp_path / format, model=model, format=format, progress=False
        )
    left = load_file(tmp_path / "safetensors" / "model.safetensors")
    right = torch.load(tmp_path / "lightning" / "model.ckpt", weights_only=True)["state_dict"]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_an_inexact_export_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rms_net()
    save_corrected(model, ["2", "3"], tmp_path / "c", shifts=False)
    fold = corrected_export.fold_corrections

    def wrong(*args: Any) -> Folding:
        folding = fold(*args)
        with torch.no_grad():
            folding.network.get_parameter("3.weight")[1] += 1e-3
        return folding

    monkeypatch.setattr(corrected_export, "fold_corrections", wrong)
    with pytest.raises(InputError, match=r"within 1e-05 of the largest; got .* with site '3' the"):
        export_task(
            tmp_path / "c", "dtd", tmp_path / "o", model=model, examples=POINTS, progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, r"model: must be given for .*; got none.*--model CLASS"),
        ({"examples": None}, "examples: must be given for the proof, as nothing tells what Sequ"),
        ({"examples": {"svhn": POINTS["svhn"]}}, "examples: must have the task 'dtd'; got svhn"),
        ({"fold": "require"}, r"fold: every site must fold .*; got 0 \(it has no bias"),
        ({"fold": "never"}, "fold: must be one of possible, require; got 'never'"),
        ({"format": "onnx"}, "format: must be one of safetensors, lightning; got 'onnx'"),
        ({"task": "dtdd"}, "got 'dtdd'. Did you mean \"dtd\""),
        ({"base": "base"}, "base: must be left out for"),
        ({"examples": {"dtd": DatasetTask(num_classes=5)}}, "must have examples for the proof"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_is_said_and_nothing_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = rms_net()
    save_corrected(model, ["0", "2", "3"], tmp_path / "c")
    given = {"task": "dtd", "model": model, "examples": POINTS} | options
    with pytest.raises(InputError, match=message):
        export_task(tmp_path / "c", output=tmp_path / "o", progress=False, **given)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_value_that_does_not_fit_the_type_is_an_error(tmp_path: Path) -> None:
    model = rms_net()
    with torch.no_grad():
        model.get_parameter("2.weight").mul_(1e6)
    save_corrected(model, ["2"], tmp_path / "c", shifts=False)
    with pytest.raises(InputError, match=r"dtype: tensor '2.weight' must fit float16"):
        export_task(
            tmp_path / "c", "dtd", tmp_path / "o", model=model, examples=POINTS, dtype="float16",
            progress=False,
        )  # fmt: skip
    with pytest.raises(InputError, match=r"dtype: tensor 'shared/2.weight' must fit float16"):
        export_multi_task(
            tmp_path / "c", tmp_path / "o", model=model, examples=POINTS, dtype="float16"
        )


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_inputs_are_made_up_where_the_network_tells_what_it_takes(
    tmp_path: Path, name: str
) -> None:
    _, make, _ = MODELS[name]
    model = make()
    save_corrected(model, "auto", tmp_path / "c")
    export_task(tmp_path / "c", "svhn", tmp_path / "o", model=model, progress=False)
    record = json.loads((tmp_path / "o" / "export.json").read_text())["correction"]
    assert record["inputs"] == "made up"
    assert record["examples"] == 8
