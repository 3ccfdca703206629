"""Merging from files to folders, in constant memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lit_merge.errors import InputError
from lit_merge.location import is_remote
from lit_merge.methods import GradientMatching, MergeMethod
from lit_merge.parameters import ParametersPolicy
from lit_merge.streaming.destinations import local_folders, require_outputs
from lit_merge.streaming.dry_run import PlanReport, report_plans
from lit_merge.streaming.folders import merge_into_folders
from lit_merge.streaming.formats import require_format
from lit_merge.streaming.inputs import MergeInputs
from lit_merge.streaming.open_inputs import open_inputs, tasks_of
from lit_merge.streaming.overrides import Override, with_setting
from lit_merge.streaming.plan import plan_merge
from lit_merge.streaming.progress import MergeProgress, merge_progress
from lit_merge.streaming.request import DTYPES, Format, Number, Output, Request, dtype_of
from lit_merge.streaming.result import MergeResult, warn
from lit_merge.streaming.shards import SHARD_BYTES
from lit_merge.streaming.stream import MergeStream
from lit_merge.streaming.unfinished import Process
from lit_merge.upload import upload_folder


def merge(
    base: str | Path | None,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    method: MergeMethod = GradientMatching(),  # noqa: B008 - frozen
    output: str | Path = "merged",
    *,
    scale: float | dict[str, float] | Literal["auto"] | None = None,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    overrides: Mapping[str, Override] | None = None,
    base_hessian: str | Path | None = None,
    dtype: str | None = None,
    accumulate: Number = "float32",
    hessian: bool = True,
    format: Format = "safetensors",
    rank: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str = "cpu",
    threads: int | None = None,
    replace: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Merge experts, from files to a folder, in memory that does not grow with the model.

    The folder holds ``model.safetensors`` under the base's names (or shards with an index),
    ``heads/<task>.safetensors`` with the tensors that each task keeps of its own, ``merge.json``
    (:mod:`lit_merge.streaming.provenance`), and what a Hugging Face base has beside its weights.
    Methods that merge Gaussians add ``hessian.safetensors`` and ``expert.json``: the result is an
    expert again, and merges compose. Methods that give a model per task add
    ``masks/<task>.safetensors``. The folder appears whole or not at all; a merge that was killed
    goes on where it was when it is called again.

    Under a launcher of several processes (torchrun, srun), each writes its share, and all of them
    end when the folder is finished. The bytes are those of one process; for methods that take whole
    tensors apart (singular values), those of one with as many threads of torch.

    Args:
        base: What the experts were fine-tuned from: a checkpoint file, an expert folder or a
            Hugging Face folder. None only for methods that do not need it.
        experts: Expert folders or checkpoints by task name, or a list of them, named by their
            paths.
        method: How to merge.
        output: The folder to write; a URL (``s3://…``) gets it when it is finished.
        scale: The method's scale, instead of the one in its own settings; "auto" for the one at
            which the experts' curvature expects the least loss (:mod:`lit_merge.forecast`), which
            is a first guess and needs their Hessians.
        policy: What is done with heads, embeddings, buffers and tensors that rules name.
        overrides: Another method, scale or action for the tensors that a pattern fits
            (``encoder.layer.0.*``); the first that fits decides.
        base_hessian: The base's own Hessian: a file, or a folder with one. None for an isotropic
            prior.
        dtype: The floating type to write ("float32", "bfloat16", "float16", "float64"); None to
            keep the base's, tensor by tensor.
        accumulate: The type to compute in; tensors of float64 are computed in float64 anyway.
        hessian: Whether to write the result's own Hessian, for methods that have one: four bytes
            per merged weight, for merging the result again.
        format: How to write the weights: "safetensors" (as transformers reads them), "lightning"
            (``model.ckpt``), "distributed" (torch.distributed.checkpoint) or "adapter" (a PEFT LoRA
            adapter of the base).
        rank: Of an adapter that is written; None for the experts' own.
        shard_bytes: The most that one file of weights holds.
        device: Where to compute: "cpu", or "cuda" to send the pieces through a GPU.
        threads: How many pieces are computed at once; None for one per core.
        replace: Whether a folder that exists may be replaced.
        progress: Whether to show progress on the standard error.

    Raises:
        InputError: An input is missing, damaged or does not fit the others, or the output is not
            free; as far as headers tell, before data is read.
    """
    (result,) = merge_all(
        base,
        experts,
        {output: method},
        scale=scale,
        policy=policy,
        overrides=overrides,
        base_hessian=base_hessian,
        dtype=dtype,
        accumulate=accumulate,
        hessian=hessian,
        format=format,
        rank=rank,
        shard_bytes=shard_bytes,
        device=device,
        threads=threads,
        replace=replace,
        progress=progress,
    )
    return result


def merge_all(
    base: str | Path | None,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    outputs: Mapping[str | Path, MergeMethod],
    *,
    scale: float | dict[str, float] | Literal["auto"] | None = None,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    overrides: Mapping[str, Override] | None = None,
    base_hessian: str | Path | None = None,
    dtype: str | None = None,
    accumulate: Number = "float32",
    hessian: bool = True,
    format: Format = "safetensors",
    rank: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    device: str = "cpu",
    threads: int | None = None,
    replace: bool = False,
    progress: bool = True,
) -> list[MergeResult]:
    """Merge the same experts in several ways, reading them once.

    Args:
        base: As for :func:`merge`.
        experts: As for :func:`merge`.
        outputs: The method by the folder to write.
        scale: As for :func:`merge`; for all of them.
        policy: As for :func:`merge`.
        overrides: As for :func:`merge`; for all of them.
        base_hessian: As for :func:`merge`.
        dtype: As for :func:`merge`.
        accumulate: As for :func:`merge`.
        hessian: As for :func:`merge`.
        format: As for :func:`merge`.
        rank: As for :func:`merge`.
        shard_bytes: As for :func:`merge`.
        device: As for :func:`merge`.
        threads: As for :func:`merge`.
        replace: As for :func:`merge`.
        progress: As for :func:`merge`.

    Returns:
        What was done, in the outputs' order.

    Raises:
        InputError: As for :func:`merge`.
    """
    request = _request(
        base=base,
        experts=experts,
        base_hessian=base_hessian,
        policy=policy,
        overrides=overrides,
        dtype=dtype,
        accumulate=accumulate,
        hessian=hessian,
        format=format,
        rank=rank,
        shard_bytes=shard_bytes,
        replace=replace,
    )
    process = Process.from_environment()
    where = _device(device)
    require_outputs(outputs, request, process)
    with (
        open_inputs(base, request.experts, base_hessian) as inputs,
        local_folders(outputs) as places,
        merge_progress(shown=progress and process.rank == 0) as shown,
    ):
        here: dict[str | Path, MergeMethod] = {
            places[output]: method for output, method in outputs.items()
        }
        merges = _planned(inputs, here, request, scale, shown)
        stream = _stream(inputs, merges, request, where, threads)
        results = merge_into_folders(stream, merges, request, process=process, shown=shown)
        for index, output in enumerate(outputs):
            if is_remote(output):
                upload_folder(places[output], output, replace=replace)
                results[index] = dataclasses.replace(results[index], path=output)
    if process.rank == 0:  # the others have seen their share only
        warn([alarm for result in results for alarm in result.warnings])
    return results


def plan_all(
    base: str | Path | None,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    outputs: Mapping[str | Path, MergeMethod],
    *,
    scale: float | dict[str, float] | Literal["auto"] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    **options: Any,
) -> list[PlanReport]:
    """Check the inputs of :func:`merge_all`, and say what it would do; nothing is written.

    Args:
        base: As for :func:`merge`.
        experts: As for :func:`merge`.
        outputs: As for :func:`merge_all`.
        scale: As for :func:`merge`.
        device: As for :func:`merge`.
        threads: As for :func:`merge`.
        options: The other options of :func:`merge`.

    Raises:
        InputError: As for :func:`merge`.
    """
    request = _request(base=base, experts=experts, **options)
    where = _device(device)
    require_outputs(outputs, request, Process())
    with (
        open_inputs(base, request.experts, request.base_hessian) as inputs,
        merge_progress(shown=False) as shown,
    ):
        merges = _planned(inputs, outputs, request, scale, shown)
        return report_plans(_stream(inputs, merges, request, where, threads), merges, request)


def _request(
    *,
    base: str | Path | None,
    experts: Mapping[str, str | Path] | Sequence[str | Path],
    base_hessian: str | Path | None = None,
    policy: ParametersPolicy = ParametersPolicy(),  # noqa: B008 - frozen
    overrides: Mapping[str, Override] | None = None,
    dtype: str | None = None,
    accumulate: Number = "float32",
    hessian: bool = True,
    format: Format = "safetensors",
    rank: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> Request:
    dtype_of(dtype)
    if format == "adapter":  # rounded to the base's type, the update would not be of low rank
        dtype, hessian = dtype or "float32", False
    return Request(
        base=base,
        experts=tasks_of(experts),
        base_hessian=base_hessian,
        policy=policy,
        overrides=dict(overrides or {}),
        dtype=dtype,
        accumulate=accumulate,
        replace=replace,
        hessian=hessian,
        format=format,
        rank=rank,
        shard_bytes=shard_bytes,
    )


def _planned(
    inputs: MergeInputs,
    outputs: Mapping[str | Path, MergeMethod],
    request: Request,
    scale: float | dict[str, float] | Literal["auto"] | None,
    shown: MergeProgress,
) -> list[Output]:
    require_format(inputs, request)
    planned = []
    for path, given in outputs.items():
        method, notes = _scaled(inputs, given, request, scale, shown)
        plan = plan_merge(
            inputs,
            method,
            policy=request.policy,
            dtype=dtype_of(request.dtype),
            overrides=request.overrides,
        )
        plan = dataclasses.replace(plan, notes=(*plan.notes, *notes))
        planned.append(Output(path, method, plan))
    return planned


def _scaled(
    inputs: MergeInputs,
    method: MergeMethod,
    request: Request,
    scale: float | dict[str, float] | Literal["auto"] | None,
    shown: MergeProgress,
) -> tuple[MergeMethod, tuple[str, ...]]:
    """Return a method with the scale that was asked for, and what to note of it."""
    if scale is None:
        return method, ()
    if scale != "auto":
        return with_setting(method, "scale", scale, "scale"), ()
    from lit_merge.forecast import at_best_scale  # which imports this package

    chosen, found = at_best_scale(
        inputs, method, policy=request.policy, overrides=request.overrides, start=shown.start
    )
    note = f"the scale {found:.4g} is where the experts' curvature expects the least loss: a guess"
    return chosen, (note,)


def _stream(
    inputs: MergeInputs,
    merges: Sequence[Output],
    request: Request,
    device: torch.device,
    threads: int | None,
) -> MergeStream:
    return MergeStream(
        inputs,
        [merge.plan for merge in merges],
        threads=threads,
        device=device,
        accumulate=DTYPES[request.accumulate],
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise InputError(
            f'device: must be one that torch can use here; got {name!r} ({reason}). Use "cpu".'
        ) from error
    return device
