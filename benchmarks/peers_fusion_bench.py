"""fusion-bench's functions, called as its own algorithms call them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers_cases import Case, Inputs, State
from torch import Tensor

VERSION = "0.2.33"
MATRICES = "encoder.*"  # the singular vectors of 30,522 × 384 take minutes on one thread
ONE_LAYER = "encoder.layer.5.attention.*"


class StateHolder:
    """As much of a module as its task arithmetic touches."""

    def __init__(self, state: State) -> None:
        self.state = state

    def state_dict(self, keep_vars: bool = False) -> State:
        """Return the tensors."""
        return self.state

    def load_state_dict(self, state: State) -> None:
        """Take new tensors."""
        self.state = dict(state)


def simple_average(inputs: Inputs) -> State:
    from fusion_bench.method.simple_average import simple_average as average

    return dict(average(inputs.experts))


def task_arithmetic(inputs: Inputs) -> State:
    from fusion_bench.method.task_arithmetic import task_arithmetic_merge

    experts = [StateHolder(expert) for expert in inputs.experts]
    return dict(task_arithmetic_merge(StateHolder(inputs.base), experts, 1.0).state)


def ties(merge_func: str, scale: float) -> Callable[[Inputs], State]:
    """Return TIES with its way to put the agreeing entries together: "sum" or "mean"."""

    def call(inputs: Inputs) -> State:
        from fusion_bench.method.ties_merging.ties_merging_utils import (
            state_dict_to_vector,
            ties_merging,
            vector_to_state_dict,
        )

        flat = torch.vstack([state_dict_to_vector(expert) for expert in inputs.experts])
        base = state_dict_to_vector(inputs.base)
        merged = ties_merging(flat - base, reset_thresh=0.2, merge_func=merge_func)
        return dict(vector_to_state_dict(base + scale * merged, inputs.base))

    return call


def fisher(inputs: Inputs) -> State:
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    count = len(inputs.experts)
    return dict(
        merging_with_fisher_weights(
            {name: [expert[name] for expert in inputs.experts] for name in inputs.base},
            inputs.hessians,
            torch.ones(count) / count,
            normalize_fisher_weight=True,
            minimal_fisher_weight=1e-6,
        )
    )


def reg_mean(inputs: Inputs) -> State:
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    return dict(
        merging_with_regmean_weights(
            {name: [expert[name] for expert in inputs.experts] for name in inputs.base},
            [{n.removesuffix(".weight"): g for n, g in gram.items()} for gram in inputs.grams],
            reduce_non_diagonal_ratio=0.95,
        )
    )


def iso_c(inputs: Inputs) -> State:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c as merge

    return _added(inputs, merge(inputs.task_vectors(), accelerator="cpu"))


def tsv_m(inputs: Inputs) -> State:
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    merge = TSVM_utils.compute_and_sum_svd_mem_reduction
    return _added(inputs, merge(inputs.task_vectors(), accelerator="cpu"))


def wudi(inputs: Inputs) -> State:
    from fusion_bench.method.wudi.wudi import wudi_merging

    return _added(inputs, wudi_merging(inputs.task_vectors(), accelerator="cpu", iter_num=50))


def _added(inputs: Inputs, vector: dict[str, Tensor]) -> State:
    return {name: (inputs.base[name] + vector[name]).detach() for name in inputs.base}


def cases() -> tuple[Case, ...]:
    """Return its functions beside ours."""
    peer = f"fusion-bench {VERSION}"
    return (
        Case(peer, "simple_average", simple_average, "Average", rounds=3),
        Case(peer, "task_arithmetic_merge, 1.0", task_arithmetic, "TaskArithmetic", rounds=3),
        Case(
            peer,
            "ties_merging, 0.2, mean, scale 1",
            ties("mean", 1.0),
            "TIES",
            {"density": 0.2, "keep": "floor+1"},
        ),
        Case(
            peer,
            "ties_merging, 0.2, sum, scale 0.3 (its defaults)",
            ties("sum", 0.3),
            "TIES",
            {"density": 0.2, "keep": "floor+1", "divide": "none", "scale": 0.3},
        ),
        Case(
            peer,
            "merging_with_fisher_weights",
            fisher,
            "FisherAverage",
            {"floor_mode": "added", "normalize": "norm"},
            reads="hessian",
        ),
        Case(
            peer,
            "merging_with_regmean_weights, 0.95",
            reg_mean,
            "RegMean",
            {"off_diagonal": 0.95, "ridge": 0.0},
            reads="gram",
        ),
        Case(peer, "TSVM, encoder", tsv_m, "TSVM", tensors=(MATRICES,)),
        Case(peer, "iso_c, encoder", iso_c, "IsoC", tensors=(MATRICES,)),
        Case(
            peer,
            "wudi_merging, 50 steps, one attention layer",
            wudi,
            "WUDI",
            {"solver": "adam", "steps": 50, "others": "mean"},
            tensors=(ONE_LAYER,),
        ),
    )
