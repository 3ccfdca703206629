"""The product's own stages, one after the other, each from the folder that the last one wrote."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from correction_cases import Case
from correction_models import build
from torch import Tensor, nn

from lit_merge import MergeModule, ParametersPolicy, export_task, open_expert
from lit_merge.align import ExpertGroup, align
from lit_merge.methods import Average, MergeMethod, TaskArithmetic

PER_STEP = 32
"""Images of each task in a training step."""


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: What was done.
        ratios: Test accuracy as per cent of the expert's, by task.
        seconds: CPU seconds that this stage took, without those before it.
        wall: The same in seconds of the clock.
        section: Where in the table it stands.
    """

    name: str
    ratios: Mapping[str, float]
    seconds: float = 0.0
    wall: float = 0.0
    section: str = ""

    @property
    def mean(self) -> float:
        """The mean over the tasks."""
        return sum(self.ratios.values()) / len(self.ratios)


class Clock:
    """Measures CPU seconds and seconds of the clock since it was made."""

    def __init__(self) -> None:
        self._begin = time.process_time(), time.perf_counter()
        self._spent: tuple[float, float] | None = None

    def read(self) -> tuple[float, float]:
        """Return both, up to now or to :meth:`stop`."""
        if self._spent is not None:
            return self._spent
        return time.process_time() - self._begin[0], time.perf_counter() - self._begin[1]

    def stop(self) -> None:
        """Stop the clock."""
        self._spent = self.read()


@dataclass
class Bench:
    """Runs stages on a case.

    Attributes:
        case: What is corrected.
        work: A folder for what the stages write.
        experts: The experts that are merged: those of the case, or aligned ones.
        origin: The base that they are merged from.
    """

    case: Case
    work: Path
    experts: dict[str, str] = field(init=False)
    origin: str = field(init=False)

    def __post_init__(self) -> None:
        """Begin with the experts as they were trained."""
        self.experts = {task: str(path) for task, path in self.case.experts.items()}
        self.origin = str(self.case.origin)

    def align(self) -> Clock:
        """Bring the experts' bases into the order of the first one's units; return the clock."""
        case, clock = self.case, Clock()
        groups = {
            path.parent.name: ExpertGroup(str(path.parent), {task: str(path)})
            for task, path in case.experts.items()
        }
        align(
            build(case.architecture, 10),
            groups,
            self.work / "aligned",
            tasks=dict(case.data(PER_STEP).tasks),
            seed=case.seed,
        )
        self.origin = str(self.work / "aligned" / "base")
        self.experts = {task: str(self.work / "aligned" / task) for task in case.experts}
        clock.stop()
        return clock

    def merge(self, method: MergeMethod, **options: Any) -> MergeModule:
        """Return a merge of the experts, not corrected yet."""
        base = None if isinstance(method, Average) else self.origin
        return self._module(experts=self.experts, base=base, method=method, **options)

    def unmerged(self, **options: Any) -> MergeModule:
        """Return the first base with the experts' heads, as a merge that adds nothing.

        Once the experts are aligned, their heads read this base's units: the stronger control.
        """
        return self._module(
            experts=self.experts,
            base=str(self.case.base),
            method=TaskArithmetic(scale=0.0),
            policy=ParametersPolicy(buffers="keep"),
            **options,
        )

    def resume(self, folder: Path, **options: Any) -> MergeModule:
        """Return the model of a corrected folder, to be learned further."""
        return self._module(experts=self.experts, merged=str(folder), **options)

    def run(self, name: str, module: MergeModule, *, steps: int = 0) -> Row:
        """Fit a module, closed form and so many steps, and return the row of its test."""
        clock = Clock()
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=self.case.data(PER_STEP * len(self.experts)))
        seconds, wall = clock.read()
        return Row(name, self.case.ratio(module.eval()), seconds, wall)

    def inference(self, folder: Path) -> tuple[float, float]:
        """Return what the correction costs at inference, in per cent: as it is, and folded."""
        module = self.resume(folder)
        module.configure_model()
        case, task = self.case, module.tasks[0]
        exported = self.work / f"{folder.name}-{task}"
        export_task(
            folder,
            task,
            exported,
            model=build(case.architecture, case.tasks[task].num_classes),
            examples=dict(case.data(PER_STEP).tasks),
            progress=False,
        )
        folded = build(case.architecture, case.tasks[task].num_classes)
        opened = open_expert(exported)
        folded.load_state_dict({name: opened.weights.tensor(name) for name in opened.weights})
        opened.close()
        inputs = case.tasks[task].test.inputs[:256]
        plain, own, exported_time = _times(
            [case.expert(task), _Alone(module), folded.eval()], inputs
        )
        return 100 * (own / plain - 1), 100 * (exported_time / plain - 1)

    def _module(self, **options: Any) -> MergeModule:
        torch.manual_seed(self.case.seed)
        return MergeModule(
            # Convolutions of few channels are faster in this order, at the same numbers.
            build(self.case.architecture, 10).to(memory_format=torch.channels_last),
            calibration_examples=len(next(iter(self.case.unlabelled.values()))),
            seed=self.case.seed,
            **options,
        )


class _Alone(nn.Module):
    """A merged module as the network of its first task."""

    def __init__(self, module: MergeModule) -> None:
        super().__init__()
        self.merged = module.network.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.merged(inputs, 0)  # type: ignore[no-any-return]


@torch.no_grad()
def _times(networks: list[nn.Module], inputs: Tensor, rounds: int = 15) -> list[float]:
    """Return the least time of each network; they take turns, so that all meet the same noise."""
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(rounds):
        for network, own in zip(networks, times, strict=True):
            begin = time.perf_counter()
            network(inputs)
            own.append(time.perf_counter() - begin)
    return [min(own[2:]) for own in times]


def quiet() -> None:
    """Turn off what Lightning says about every fit."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for text in (".*does not have many workers.*", ".*no `val_dataloader`.*", ".*`max_epochs`.*"):
        warnings.filterwarnings("ignore", message=text)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
