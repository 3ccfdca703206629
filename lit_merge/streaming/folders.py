"""From opened inputs to finished folders: what :func:`lit_merge.merge` does with files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from lit_merge.checkpoint import TensorInfo, fingerprint, open_checkpoint
from lit_merge.checkpoint.bit_masks import mask_info
from lit_merge.errors import InputError
from lit_merge.expert.info import current_versions
from lit_merge.location import Location, locate
from lit_merge.methods import MergeMethod
from lit_merge.streaming.findings import Findings
from lit_merge.streaming.formats import convert
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.pieces import BATCH, CHUNK, PART, Part, parts_of, share_of
from lit_merge.streaming.plan import MergePlan, bytes_read
from lit_merge.streaming.progress import MergeProgress
from lit_merge.streaming.provenance import (
    copy_companions,
    expert_info,
    input_files,
    merge_record,
    method_settings,
    write_record,
)
from lit_merge.streaming.request import Output, Request
from lit_merge.streaming.result import MergeResult, notes_and_warnings
from lit_merge.streaming.shards import ShardedWriter, shards_of, write_index
from lit_merge.streaming.sinks import Sinks
from lit_merge.streaming.stream import Job, MergeStream
from lit_merge.streaming.unfinished import (
    Process,
    UnfinishedFolder,
    digest_of,
    unfinished_folder,
)

if TYPE_CHECKING:
    from typing_extensions import Self

HESSIAN = "hessian.safetensors"


def merge_into_folders(
    stream: MergeStream,
    outputs: Sequence[Output],
    request: Request,
    *,
    process: Process,
    shown: MergeProgress,
) -> list[MergeResult]:
    """Run a stream into one folder per merge.

    Args:
        stream: Of the outputs' plans, in their order.
        outputs: The merges.
        request: What was asked for.
        process: Which of the processes that share the work this one is.
        shown: Shows the progress.

    Returns:
        What was done; by any but the first process, only what that one has done.

    Raises:
        InputError: As :func:`lit_merge.merge`.
    """
    started = time.perf_counter()
    for output in outputs:
        _require_one_mask(output.plan)
    heads = carried_heads(stream.inputs, request, outputs)
    parts = parts_of(stream.pieces(), process.count)
    mine = share_of(parts, process.rank, process.count)
    results = []
    with ExitStack() as stack:
        folders = [
            stack.enter_context(
                unfinished_folder(
                    output.path,
                    digest_of(description(stream, output, request)),
                    replace=request.replace,
                    process=process,
                )
            )
            for output in outputs
        ]
        _write_parts(stream, folders, request, mine, shown)
        labels = [part.label for part in (parts if process.rank == 0 else mine)]
        if process.rank == 0 and process.count > 1:
            waiting = shown.start("waiting for the other processes", len(labels))
            for folder in folders:
                folder.wait_for(labels, waiting)
        for output, job, folder in zip(outputs, stream.jobs, folders, strict=True):
            seen = _recorded(stream.inputs, folder, labels)
            result = _result(stream.inputs, output, folder, seen, started)
            result = replace(result, notes=(*result.notes, *job.notes()))
            if process.rank == 0:
                result = _finish(stream.inputs, output, folder, request, result, heads)
            results.append(result)
    return results


def _write_parts(
    stream: MergeStream,
    folders: Sequence[UnfinishedFolder],
    request: Request,
    parts: Sequence[Part],
    shown: MergeProgress,
) -> None:
    """Write the parts that are not done yet, and record each that is."""
    missing = [part for part in parts if any(folder.done(part.label) is None for folder in folders)]
    if not missing:
        return
    stream.survey(lambda total: shown.start("reading ahead", total))
    advance = shown.start("merging", sum(_size(job.plan, missing, request) for job in stream.jobs))
    with ExitStack() as stack:
        writers = [
            stack.enter_context(_Writers(folder.path, job, stream.inputs.tasks, request))
            for job, folder in zip(stream.jobs, folders, strict=True)
        ]
        for part in missing:
            found = stream.run(part, [writer.sinks for writer in writers], advance=advance)
            for writer, folder, seen in zip(writers, folders, found, strict=True):
                writer.sync()  # what is said to be done must survive a power failure, too
                folder.mark_done(part.label, seen.as_json())


def _size(plan: MergePlan, parts: Sequence[Part], request: Request) -> int:
    """Return how many bytes the parts write of weights, heads and Hessian."""
    curved = hessian_infos(plan) if request.hessian else {}
    total = 0
    for piece in (piece for part in parts for piece in part.pieces):
        files = (plan.infos, curved) if piece.task is None else (plan.heads.get(piece.task, {}),)
        found = (infos[piece.name] for infos in files if piece.name in infos)
        total += piece.numel * sum(info.dtype.itemsize for info in found)
    return total


class _Writers:
    """The files of one merge."""

    def __init__(self, folder: Path, job: Job, tasks: Sequence[str], request: Request) -> None:
        plan = job.plan
        self._files: list[ShardedWriter] = []
        self._folder = folder
        self._open = ExitStack()
        with self._open:
            curved = hessian_infos(plan) if request.hessian else {}
            self.sinks = Sinks(
                model=self._writer(shards_of(plan.infos, request.shard_bytes)),
                heads={
                    task: self._writer({f"heads/{task}.safetensors": infos})
                    for task, infos in plan.heads.items()
                },
                hessian=self._writer({HESSIAN: curved}) if curved else None,
                masks={
                    task: self._writer(
                        {f"masks/{task}.safetensors": mask_infos(plan)}, {"scale": repr(scale)}
                    )
                    for task, scale in mask_scales(job, tasks).items()
                },
            )
            self._open = self._open.pop_all()

    def sync(self) -> None:
        """Let the disk have what was written."""
        for file in self._files:
            file.sync()

    def _writer(
        self,
        shards: Mapping[str, Mapping[str, TensorInfo]],
        metadata: Mapping[str, str] | None = None,
    ) -> ShardedWriter:
        for file in shards:
            (self._folder / file).parent.mkdir(exist_ok=True)
        writer = self._open.enter_context(ShardedWriter(self._folder, shards, metadata))
        self._files.append(writer)
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)


def hessian_infos(plan: MergePlan) -> dict[str, TensorInfo]:
    """Return the tensors for which the merge has a Hessian as an expert of the same base."""
    return {
        tensor.name: TensorInfo(tensor.info.shape, torch.float32)
        for tensor in plan.merged()
        if type(plan.methods[tensor.name]).hessian is not MergeMethod.hessian
    }


def mask_infos(plan: MergePlan) -> dict[str, TensorInfo]:
    """Return the packed masks of each task, a byte for eight elements."""
    return {
        tensor.name: mask_info(tensor.info)
        for tensor in plan.merged()
        if plan.methods[tensor.name].masks
    }


def mask_scales(job: Job, tasks: Sequence[str]) -> dict[str, float]:
    """Return what each task multiplies its masked task vector with; empty without masks."""
    for method in _masking(job.plan):
        return dict(zip(tasks, method.task_scales(job.fact(method), tasks), strict=True))
    return {}


def _require_one_mask(plan: MergePlan) -> None:
    masking = _masking(plan)
    if len(masking) > 1:
        names = " and ".join(type(method).__name__ for method in masking)
        raise InputError(
            f"overrides: must leave one method that gives masks; got {names}. Take the same one."
        )


def _masking(plan: MergePlan) -> list[MergeMethod]:
    return list({id(m): m for m in plan.methods.values() if m.masks}.values())


def description(stream: MergeStream, output: Output, request: Request) -> dict[str, Any]:
    """Return all that decides the bytes of a merge and the labels of its parts, as JSON."""
    plan, inputs = output.plan, stream.inputs
    return {
        "versions": current_versions(),
        "inputs": input_files(inputs),
        "fingerprints": [inputs.base_fingerprint, *inputs.fingerprints.values()],
        "tasks": inputs.tasks,
        "leaves": inputs.leaves,
        "whole": sorted(stream.whole),  # of other outputs too: they cut the pieces of this one
        "method": method_settings(output.method),
        "methods": {name: method_settings(method) for name, method in plan.methods.items()},
        "tensors": [(t.name, t.action, t.alias_of) for t in plan.tensors],
        "infos": {name: (info.shape, str(info.dtype)) for name, info in plan.infos.items()},
        "accumulate": request.accumulate,
        "hessian": request.hessian,
        "format": request.format,
        "shard_bytes": request.shard_bytes,
        "sizes": (CHUNK, BATCH, PART),
    }


def carried_heads(
    inputs: MergeInputs, request: Request, outputs: Sequence[Output]
) -> dict[str, Location]:
    """Return the heads that experts which are merges themselves bring along, by task.

    Raises:
        InputError: Two inputs have a head for one task.
    """
    found: dict[str, Location] = {}
    own = {task for output in outputs for task in output.plan.heads}
    for merge in inputs.merges:
        folder = locate(request.experts[merge]) / "heads"
        files: list[Location] = list(folder.iterdir()) if folder.is_dir() else []
        for file in sorted(files, key=lambda file: file.name):
            task = file.name.removesuffix(".safetensors")
            if task in found or task in own:
                other = found.get(task, f"the expert {task!r}")
                raise InputError(
                    f"{file}: must be the only head of its task; got another one in {other}. "
                    f"Remove one of the two, or call the expert otherwise."
                )
            found[task] = file
    return found


def _recorded(inputs: MergeInputs, folder: UnfinishedFolder, labels: Sequence[str]) -> Findings:
    """Return what was seen in parts that are done."""
    total = Findings.before(inputs)
    for label in labels:
        record = folder.done(label)
        assert record is not None, label
        total.add(Findings.from_json(record))
    return total


def _result(
    inputs: MergeInputs, output: Output, folder: UnfinishedFolder, seen: Findings, started: float
) -> MergeResult:
    traces = seen.trace_of(inputs.tasks)
    notes, alarms = notes_and_warnings(inputs, output.plan, seen, traces)
    return MergeResult(
        path=Path(output.path),
        record=output.plan.tensors,
        tasks=inputs.tasks,
        seconds=time.perf_counter() - started,
        traces=traces,
        notes=(*notes, *folder.notes),
        warnings=alarms,
        num_bytes=bytes_read(inputs, output.plan) + output.plan.num_bytes,
    )


def _finish(
    inputs: MergeInputs,
    output: Output,
    unfinished: UnfinishedFolder,
    request: Request,
    result: MergeResult,
    heads: Mapping[str, Location],
) -> MergeResult:
    """Write what stands beside the weights; return the result with what there is to note."""
    plan, folder = output.plan, unfinished.path
    shards = shards_of(plan.infos, request.shard_bytes)
    unfinished.keep_only((*shards, HESSIAN, "heads", "masks"))
    write_index(folder, shards)
    weights, notes = convert(folder, inputs, plan, request, before_removal=unfinished.forget)
    with open_checkpoint(folder, base=inputs.base) as merged:
        found = fingerprint(merged)
    if request.format == "safetensors":  # beside other forms they would promise what is not there
        copy_companions(request.base, folder, dtype=request.dtype)
    for task, file in heads.items():
        (folder / "heads").mkdir(exist_ok=True)
        (folder / "heads" / f"{task}.safetensors").write_bytes(file.read_bytes())
    if request.hessian and hessian_infos(plan):
        info = expert_info(inputs, plan, output.method, fingerprint=found, weights=weights)
        (folder / "expert.json").write_text(info.to_json(), encoding="utf-8")
    result = replace(result, notes=(*result.notes, *notes))
    record = merge_record(request, output, inputs, result, fingerprint=found, heads=heads)
    write_record(folder / "merge.json", record)
    return result
