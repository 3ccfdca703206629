"""Small inputs on which another library is wrong or fails, each checked when this is run.

    PYTHONPATH=<repository> PYTHON benchmarks/peers_inputs.py OUTPUT

PYTHON has the libraries. What is right is computed beside each input, in float64 or by hand, and
not by lit-merge; both sides are held against it. A library that has been mended is reported as
right.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peers_finding import Finding, found
from peers_fusion_bench import StateHolder
from peers_gradient_matching import merge_as_published
from torch import Tensor, nn

from lit_merge import merge_state_dicts, methods

State = dict[str, Tensor]


def findings() -> Iterator[Finding]:
    """Yield one finding for each input."""
    yield fisher_where_the_model_is_least_sure()
    yield wudi_with_a_frozen_tensor()
    yield from equal_experts()
    yield ties_keeping_everything()
    yield ties_with_a_counter()
    yield ties_with_tied_weights()
    yield average_of_a_counter()
    yield average_in_bfloat16()
    yield average_of_nan()
    yield reg_mean_without_one_input()
    yield gradient_matching_of_the_unseen()
    yield gradient_matching_beyond_the_precision()
    yield adapters_added_factor_by_factor()


class _Bias(nn.Module):
    """Logits that are a bias, whatever the input."""

    def __init__(self, bias: list[float]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"logits": self.bias.expand(len(x), 2), "loss": None})


class _Trainer:
    """What fisher_merging asks of a trainer: four examples, one at a time."""

    _train_batch_size = 1

    def get_train_dataloader(self) -> list[dict[str, Tensor]]:
        return [{"x": torch.zeros(1)}] * 4

    def _prepare_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs


def fisher_where_the_model_is_least_sure() -> Finding:
    """Two models of two logits; the first says 50 %, where the Fisher p(1−p) is largest."""
    from fusion_bench.method.fisher_merging.fisher_merging import fisher_merging

    models = [_Bias([0.0, 0.0]), _Bias([3.0, 0.0])]
    chances = [torch.softmax(model.bias.detach().double(), 0)[0] for model in models]
    fisher = torch.stack([p * (1 - p) for p in chances])  # of either logit
    biases = torch.stack([model.bias.detach().double() for model in models])
    right = (fisher[:, None] * biases).sum(0) / fisher.sum()

    def theirs() -> Tensor:
        trainers: list[Any] = [_Trainer(), _Trainer()]
        merged = fisher_merging(models, trainers, [], [4, 4], normalize_fisher_weight=False)
        return torch.as_tensor(merged["bias"])

    def ours() -> Tensor:
        from lit_merge.curvature import diagonal_hessian

        hessians = []
        for model in models:
            plain = nn.Linear(1, 2)
            with torch.no_grad():
                plain.weight.zero_()
                plain.bias.copy_(model.bias)
            batches = [(torch.zeros(4, 1), torch.zeros(4, dtype=torch.long))]
            result = diagonal_hessian(
                plain,
                batches,
                lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
                labels="expected",
            )
            hessians.append({"bias": result["bias"]})
        return merge_state_dicts(
            None,
            [{"bias": model.bias.detach()} for model in models],
            methods.FisherAverage(),
            hessians=hessians,
        )["bias"]

    given = "logits (0, 0) and (3, 0): Fisher of classes added up before the square"
    return found("fusion-bench fisher_merging", given, right, theirs, ours, 1e-3)


def wudi_with_a_frozen_tensor() -> Finding:
    """One expert did not move a matrix: its norm, by which is divided, is zero."""
    from fusion_bench.method.wudi.wudi import wudi_merging

    still, moved = torch.zeros(3, 3), 0.01 * torch.eye(3)

    def theirs() -> Tensor:
        merged = wudi_merging([{"w": still}, {"w": moved}], accelerator="cpu", iter_num=20)
        return torch.as_tensor(merged["w"])

    def ours() -> Tensor:
        method = methods.WUDI(solver="adam", steps=20)
        return merge_state_dicts({"w": still}, [{"w": still}, {"w": moved}], method)["w"]

    given = "a matrix that one of two experts did not train (0/0)"
    return found("fusion-bench wudi_merging", given, moved.double(), theirs, ours)


def equal_experts() -> Iterator[Finding]:
    """Two equal experts of rank one: what fills up the singular vectors must not count.

    Right is a multiple of the one direction there is; for TSV-M the task vector itself.
    """
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    vector, base = {"w": torch.ones(4, 4)}, {"w": torch.zeros(4, 4)}

    def direction(merged: Mapping[str, Tensor]) -> Tensor:
        return torch.as_tensor(merged["w"] / merged["w"].norm())

    right = torch.full((4, 4), 0.25, dtype=torch.float64)
    given = "two equal task vectors of rank 1, as adapters are; the direction of the merge"

    def tsv_m() -> Tensor:
        merge = TSVM_utils.compute_and_sum_svd_mem_reduction
        return direction(merge([vector, vector], accelerator="cpu"))

    yield found(
        "fusion-bench TSVM",
        given,
        right,
        tsv_m,
        lambda: direction(merge_state_dicts(base, [vector, vector], methods.TSVM())),
    )
    yield found(
        "fusion-bench iso_c",
        given,
        right,
        lambda: direction(iso_c([vector, vector], accelerator="cpu")),
        lambda: direction(merge_state_dicts(base, [vector, vector], methods.IsoC())),
    )


def _flat_ties(base: State, experts: list[State], density: float) -> State:
    from fusion_bench.method.ties_merging.ties_merging_utils import (
        state_dict_to_vector,
        ties_merging,
        vector_to_state_dict,
    )

    flat = torch.vstack([state_dict_to_vector(expert) for expert in experts])
    start = state_dict_to_vector(base)
    merged = ties_merging(flat - start, reset_thresh=density, merge_func="mean")
    return dict(vector_to_state_dict(start + merged, base))


def ties_keeping_everything() -> Finding:
    """TIES without trimming is a plain election."""
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor(v)} for v in ([1.0, -2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0])]
    return found(
        "fusion-bench ties_merging",
        "threshold 1.0, keep everything",
        torch.tensor([1.5, -2.0, 3.0, 4.0]),
        lambda: _flat_ties(base, experts, 1.0)["w"],
        lambda: merge_state_dicts(base, experts, methods.TIES(density=1.0))["w"],
    )


def ties_with_a_counter() -> Finding:
    """A counter of BatchNorm is no weight: it takes a place among the largest entries."""
    base = {"n": torch.tensor(0), "w": torch.zeros(8)}
    vector = torch.arange(1.0, 9.0) / 100
    experts = [{"n": torch.tensor(n), "w": vector} for n in (1000, 2000)]
    right = torch.cat([torch.tensor([0.0]), torch.where(vector >= 0.07, vector, 0.0)])

    def together(state: State) -> Tensor:
        return torch.cat([state["n"].reshape(1).float(), state["w"]])

    return found(
        "fusion-bench ties_merging",
        "an integer counter beside eight weights, density 0.2 (⌊0.2·8⌋ + 1 = 2 are kept)",
        right,
        lambda: together(_flat_ties(base, experts, 0.2)),
        lambda: together(
            merge_state_dicts(base, experts, methods.TIES(density=0.2, keep="floor+1"))
        ),
    )


def ties_with_tied_weights() -> Finding:
    """A tied tensor stands in the state dict twice and is one set of weights."""

    def model(embedding: Tensor, weight: Tensor) -> State:
        return {"embedding": embedding, "head": embedding, "w": weight}

    base = model(torch.zeros(8), torch.zeros(8))
    expert = model(torch.arange(1.0, 9.0), torch.arange(11.0, 19.0))
    # 16 weights at density 0.25: ⌊4⌋ + 1 = 5 are kept, all of them in w
    right = torch.where(torch.arange(8) >= 3, expert["w"], 0.0)
    return found(
        "fusion-bench ties_merging",
        "eight tied and eight other weights, density 0.25: the tied ones count twice",
        right,
        lambda: _flat_ties(base, [expert, expert], 0.25)["w"],
        lambda: merge_state_dicts(
            base, [expert, expert], methods.TIES(density=0.25, keep="floor+1")
        )["w"],
    )


def average_of_a_counter() -> Finding:
    """Integer buffers cannot be averaged; the first model's is kept."""
    from fusion_bench.method.simple_average import simple_average

    models = [{"w": torch.tensor([w]), "n": torch.tensor(n)} for w, n in ((1.0, 100), (2.0, 201))]
    return found(
        "fusion-bench simple_average",
        "an integer counter (BatchNorm's num_batches_tracked) beside a weight",
        torch.tensor([1.5]),
        lambda: simple_average(models)["w"],
        lambda: merge_state_dicts(None, models, methods.Average())["w"],
    )


def average_in_bfloat16() -> Finding:
    """Eight models in bf16; right is one rounding of the float64 mean."""
    from fusion_bench.method.simple_average import simple_average

    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1000, generator=generator).bfloat16() for _ in range(8)]
    exact = torch.stack([value.double() for value in values]).mean(0)
    models = [{"w": value} for value in values]

    def wrong_entries(merged: Tensor) -> Tensor:
        return (merged != exact.bfloat16()).sum().reshape(1)

    return found(
        "fusion-bench simple_average",
        "eight models in bf16; how many of 1000 entries are not the rounded mean",
        torch.tensor([0.0]),
        lambda: wrong_entries(simple_average(models)["w"]),
        lambda: wrong_entries(merge_state_dicts(None, models, methods.Average())["w"]),
        1.5,  # float32 sums of eight may round one entry the other way
    )


def average_of_nan() -> Finding:
    """A diverged expert: refused rather than merged."""
    from fusion_bench.method.task_arithmetic import task_arithmetic_merge

    base = {"w": torch.zeros(2)}
    experts = [{"w": torch.tensor([1.0, torch.nan])}, {"w": torch.ones(2)}]

    def theirs() -> Tensor:
        holders: list[Any] = [StateHolder(expert) for expert in experts]
        start: Any = StateHolder(base)
        return torch.as_tensor(task_arithmetic_merge(start, holders, 1.0).state["w"])

    return found(
        "fusion-bench task_arithmetic_merge",
        "NaN in one expert",
        "refused, with the tensor's name",
        theirs,
        lambda: merge_state_dicts(base, experts, methods.TaskArithmetic())["w"],
    )


def reg_mean_without_one_input() -> Finding:
    """An input that is always zero says nothing: right is the experts' mean there."""
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    weights = [torch.ones(1, 2), 3 * torch.ones(1, 2)]
    grams = [torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([3.0, 0.0]))]

    def theirs() -> Tensor:
        named = [{"l": gram} for gram in grams]
        return torch.as_tensor(
            merging_with_regmean_weights({"l.weight": weights}, named)["l.weight"]
        )

    def ours() -> Tensor:
        piece = methods.ParameterSlice("l.weight", ("a", "b"), tuple(weights), grams=tuple(grams))
        return methods.RegMean(off_diagonal=1.0)(piece)

    right = torch.tensor([[(1 * 1 + 3 * 3) / 4, 2.0]])
    given = "an input that is zero in all examples (a singular Gram)"
    return found("fusion-bench merging_with_regmean_weights", given, right, theirs, ours, 1e-3)


def gradient_matching_of_the_unseen() -> Finding:
    """A word that no training text held has no curvature; its vectors are added."""
    base, hessian = {"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 1.0])}
    experts = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 4.0])}]
    zero = {"w": torch.zeros(2)}
    return found(
        "authors' formula, gradient matching",
        "an entry with all Hessians zero, δ = 0 (the script's default)",
        torch.tensor([4.0, 3.0]),
        lambda: merge_as_published(base, experts, [hessian] * 2, zero, [1, 1], 1)["w"],
        lambda: merge_state_dicts(
            base, experts, methods.GradientMatching(damping=0.0), hessians=[hessian] * 2
        )["w"],
    )


def gradient_matching_beyond_the_precision() -> Finding:
    """More is taken out than is known: the Gaussian's precision is negative, there is no mean."""
    base, expert = {"w": torch.zeros(1)}, {"w": torch.ones(1)}
    own, prior = {"w": torch.tensor([1.0])}, {"w": torch.tensor([0.99])}
    return found(
        "authors' formula, gradient matching",
        "α = −1 with h = 1, h₀ = 0.99: the precision is −0.01",
        "refused, with the tensor's name",
        lambda: merge_as_published(base, [expert], [own], prior, [1], 1, scale=-1.0)["w"],
        lambda: merge_state_dicts(
            base, [expert], methods.GradientMatching(scale=-1.0), hessians=[own], base_hessian=prior
        )["w"],
    )


def adapters_added_factor_by_factor() -> Finding:
    """Two adapters of rank one; right is the sum of their ΔW = B·A."""
    from peft import LoraConfig, get_peft_model

    factors = {"a": ([[1.0, 0.0]], [[1.0], [0.0]]), "b": ([[0.0, 1.0]], [[0.0], [1.0]])}

    def theirs() -> Tensor:
        config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
        model: Any = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config, adapter_name="a")
        model.add_adapter("b", config)
        layer = model.base_model.model[0]
        with torch.no_grad():
            for name, (down, up) in factors.items():
                layer.lora_A[name].weight.copy_(torch.tensor(down))
                layer.lora_B[name].weight.copy_(torch.tensor(up))
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", combination_type="linear")
        merged = layer.lora_B["both"].weight @ layer.lora_A["both"].weight
        return torch.as_tensor(merged * layer.scaling["both"])

    def ours() -> Tensor:
        deltas = [{"w": torch.tensor(up) @ torch.tensor(down)} for down, up in factors.values()]
        return merge_state_dicts({"w": torch.zeros(2, 2)}, deltas, methods.TaskArithmetic())["w"]

    given = "two adapters of rank 1 with ΔW = diag(1, 0) and diag(0, 1)"
    peer = 'PEFT add_weighted_adapter, "linear"'
    return found(peer, given, torch.eye(2), theirs, ours)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found_all = []
    for finding in findings():
        print(f"small inputs: {finding.peer}", flush=True)
        found_all.append(asdict(finding))
    Path(sys.argv[1]).write_text(json.dumps(found_all, indent=1))


if __name__ == "__main__":
    main()
