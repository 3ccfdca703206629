from __future__ import annotations

import logging
import warnings

import pytest

from lit_merge.cli.parsing import instantiate, parse
from lit_merge.cli.training import (
    add_tasks,
    make_trainer,
    quiet,
    trainer_defaults,
    training_parser,
)
from lit_merge.errors import InputError

FABRIC = {
    "LT_CLI_USED": "1",
    "LT_ACCELERATOR": "cpu",
    "LT_STRATEGY": "ddp",
    "LT_DEVICES": "2",
    "LT_NUM_NODES": "1",
    "LT_PRECISION": "bf16-mixed",
}


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*FABRIC, "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_trainer_takes_what_fabric_run_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FABRIC.items():
        monkeypatch.setenv(name, value)
    parser = training_parser("test", "Test.", defaults={"max_steps": 7})
    options = parse(parser, [])
    assert options.trainer.strategy == "ddp"
    assert options.trainer.devices == 2
    assert options.trainer.num_nodes == 1
    assert options.trainer.precision == "bf16-mixed"
    assert options.trainer.max_steps == 7
    assert int(parse(parser, ["--trainer.devices", "1"]).trainer.devices) == 1


def test_lists_of_devices_stay_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv("LT_DEVICES", "0,1")
    assert trainer_defaults() == {"devices": "0,1"}


def test_without_fabric_run_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LT_DEVICES", "2")
    assert trainer_defaults() == {}


def test_several_processes_that_would_not_know_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = training_parser("test", "Test.", defaults={"logger": False})
    options = instantiate(parser, parse(parser, ["--trainer.accelerator", "cpu"]))
    assert make_trainer(options).world_size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=r"got 2 processes for a Trainer of 1.*--trainer.devices 2"
    ):
        make_trainer(options)


def test_tasks_that_are_none_are_refused() -> None:
    parser = training_parser("test", "Test.", defaults={})
    add_tasks(parser)
    with pytest.raises(InputError, match="tasks"):
        parse(parser, ["--tasks", "/none.yaml"])
    with pytest.raises(InputError, match="tasks"):
        parse(parser, [])


def test_quiet_hides_advertisements_and_keeps_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    with warnings.catch_warnings():
        quiet()
        warnings.warn("The 'train_dataloader' does not have many workers", stacklevel=1)
        with pytest.raises(UserWarning, match="something else"):
            warnings.warn("something else", UserWarning, stacklevel=1)
    with caplog.at_level(logging.INFO, logger=logger.name):
        logger.info("💡 Tip: buy more")
        logger.info("GPU available: False")
    assert [record.getMessage() for record in caplog.records] == ["GPU available: False"]
