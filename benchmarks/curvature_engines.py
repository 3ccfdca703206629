"""Ways to Σ_n (∂ℓ_n/∂θ)² over a batch: ours, plain loops, and other libraries.

An engine is prepared once for a case (a library may change its model) and then called with
batches. Other libraries are used as their documentation says, on models that are functions of one
tensor and a loss that is a module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from curvature_cases import Case, Pair, mean_loss, squares_by_loop
from torch import Tensor, nn

from lit_merge.curvature import FisherBesideTraining, PerExampleFisher

Run = Callable[[Pair], dict[str, Tensor]]
"""Gives the sums over a batch, by parameter name."""

CHUNK = 8  # examples whose gradients vmap holds at a time; more is not faster and takes memory


def floor(case: Case) -> Run:
    """Plain forward and backward; the gradient of the mean loss, no curvature."""

    def run(batch: Pair) -> dict[str, Tensor]:
        case.model.zero_grad()
        mean_loss(case.model, batch).backward()
        return {}

    return run


def ours(case: Case) -> Run:
    """The exact pass; its probe runs with the first batch."""
    fisher = PerExampleFisher(case.model, mean_loss, labels="observed")

    def run(batch: Pair) -> dict[str, Tensor]:
        fisher.update(batch)
        return {}

    return run


def ours_once(case: Case, batch: Pair) -> dict[str, Tensor]:
    """The sums of the exact pass over one batch."""
    fisher = PerExampleFisher(case.model, mean_loss, labels="observed")
    fisher.update(batch)
    return fisher.sums()


def beside(case: Case) -> Run:
    """The same beside the ordinary forward and backward of a training step."""
    estimator = FisherBesideTraining(case.model)

    def run(batch: Pair) -> dict[str, Tensor]:
        _step_with(estimator, case, batch)
        return {}

    return run


def beside_once(case: Case, batch: Pair) -> dict[str, Tensor]:
    """The sums from beside one training step."""
    estimator = FisherBesideTraining(case.model)
    _step_with(estimator, case, batch)
    return estimator.sums()


def _step_with(estimator: FisherBesideTraining, case: Case, batch: Pair) -> None:
    case.model.zero_grad()
    estimator.start(batch)
    loss = mean_loss(case.model, batch)
    estimator.end_forward()
    loss.backward()
    estimator.stop()


def loop(case: Case) -> Run:
    """A forward and a backward for each example."""
    return lambda batch: squares_by_loop(case, batch)


def vmap(case: Case) -> Run:
    """Vectorised per-example gradients of torch.func, a few examples at a time."""
    parameters = {name: p.detach() for name, p in case.parameters().items()}

    def loss(weights: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        scores = torch.func.functional_call(case.model, weights, (inputs[None],))
        return nn.functional.cross_entropy(scores, target[None])

    per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run(batch: Pair) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for inputs, targets in zip(batch[0].split(CHUNK), batch[1].split(CHUNK), strict=True):
            for name, gradients in per_example(parameters, inputs, targets).items():
                sums[name] += gradients.square().sum(0)
        return sums

    return run


def backpack(case: Case) -> Run:
    """BackPACK's SumGradSquared."""
    import backpack
    from backpack.extensions import SumGradSquared

    for module in case.model.modules():
        if hasattr(module, "inplace"):  # its hooks do not allow it
            module.inplace = False
    model = backpack.extend(case.model)
    criterion = backpack.extend(nn.CrossEntropyLoss())

    def run(batch: Pair) -> dict[str, Tensor]:
        model.zero_grad()
        with backpack.backpack(SumGradSquared()):
            criterion(model(batch[0]), batch[1]).backward()
        backpack.memory_cleanup(model)
        size = len(batch[1])  # its squares are of ∇ℓ_n / B
        return {
            name: vars(parameter).pop("sum_grad_squared") * size**2
            for name, parameter in case.parameters().items()
            if hasattr(parameter, "sum_grad_squared")
        }

    return run


def opacus(case: Case) -> Run:
    """The GradSampleModule of Opacus."""
    from opacus import GradSampleModule

    model = GradSampleModule(case.model.train())  # its hooks do nothing in eval mode

    def run(batch: Pair) -> dict[str, Tensor]:
        mean_loss(model, batch).backward()
        sums = {
            name: parameter.grad_sample.square().sum(0)
            for name, parameter in case.parameters().items()
            if getattr(parameter, "grad_sample", None) is not None
        }
        model.zero_grad()
        return sums

    return run


class _ClassesLast(nn.Module):
    """A model whose scores have the classes in the last dimension."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the scores [B, T, K]."""
        scores: Tensor = self.model(inputs)
        return scores.transpose(1, 2).contiguous()


def laplace(backend: str) -> Callable[[Case], Run]:
    """Return the engine of laplace-torch with one of its empirical Fisher backends."""

    def prepare(case: Case) -> Run:
        from laplace import curvature

        asdl = backend.startswith("Asdl")  # flattens scores whose classes are in the last dimension
        model = _ClassesLast(case.model) if asdl and case.batch[1].dim() > 1 else case.model
        interface = getattr(curvature, backend)(model, "classification")

        def run(batch: Pair) -> dict[str, Tensor]:
            case.model.zero_grad()
            _, diagonal = interface.diag(batch[0], batch[1])
            terms = batch[1][0].numel()  # it sums over the terms of an example
            return _cut(diagonal / terms**2, case)

        return run

    return prepare


def curvlinops(case: Case) -> Run:
    """Hutchinson's estimate by curvlinops from one vector: no exact diagonal is to be had."""
    from curvlinops import EFLinearOperator, hutchinson_diag

    parameters = case.parameters()

    def run(batch: Pair) -> dict[str, Tensor]:
        operator = EFLinearOperator(
            case.model,
            nn.CrossEntropyLoss(reduction="sum"),
            list(parameters.values()),
            [batch],
            check_deterministic=False,
        )
        terms = batch[1][0].numel()
        return _cut(hutchinson_diag(operator, 1) / terms**2, case)

    return run


def _cut(flat: Tensor, case: Case) -> dict[str, Tensor]:
    """Cut a vector over all parameters into tensors."""
    parameters = case.parameters()
    pieces = flat.detach().split([p.numel() for p in parameters.values()])
    return {
        name: piece.view_as(parameter)
        for (name, parameter), piece in zip(parameters.items(), pieces, strict=True)
    }


ENGINES: dict[str, Callable[[Case], Run]] = {
    "forward + backward": floor,
    "lit-merge": ours,
    "lit-merge beside training": beside,
    "loop, batch 1": loop,
    "torch.func vmap(grad)": vmap,
    "BackPACK SumGradSquared": backpack,
    "Opacus GradSampleModule": opacus,
    "laplace CurvlinopsEF": laplace("CurvlinopsEF"),
    "laplace AsdlEF": laplace("AsdlEF"),
    "curvlinops EF, Hutchinson": curvlinops,
}
