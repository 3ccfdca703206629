"""All that an expert folder holds, permuted; the oracle measures it on the permuted network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_merge import InputError
from lit_merge.alignment.expert_folder import ExpertTensors, permuted_expert, read_tensors
from lit_merge.alignment.symmetry import PermutedAxis, PermutedSite, Symmetry
from lit_merge.checkpoint import open_state_dict
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import gather_statistics, to_tensors
from lit_merge.expert import ExpertInfo, open_expert, write_expert
from tests.hand_symmetries import moved, plain, random_permutations

CONVS = ("0.weight", "2.weight")
IMAGES = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(5))

SYMMETRIES = (
    Symmetry(
        "one",
        5,
        (
            PermutedAxis("0.weight", 0, plain(5)),
            PermutedAxis("0.bias", 0, plain(5)),
            PermutedAxis("2.weight", 1, plain(5)),
        ),
        (PermutedSite("0", -3, plain(5)), PermutedSite("1", -3, plain(5))),
    ),
    Symmetry(
        "two",
        4,
        (
            PermutedAxis("2.weight", 0, plain(4)),
            PermutedAxis("2.bias", 0, plain(4)),
            PermutedAxis("5.weight", 1, torch.arange(16).reshape(4, 4)),
        ),
        (PermutedSite("2", -3, plain(4)),),
    ),
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )


def grams(model: nn.Sequential) -> dict[str, Tensor]:
    """Return Σ x xᵀ of the patches that each convolution multiplies."""
    found, values = {}, IMAGES
    with torch.no_grad():
        for name, module in model.named_children():
            if isinstance(module, nn.Conv2d):
                patches = nn.functional.unfold(values, 3).transpose(1, 2).flatten(0, 1)
                found[f"{name}.weight"] = patches.T @ patches
            values = module(values)
    return found


def output_grams(model: nn.Sequential) -> dict[str, Tensor]:
    found, values = {}, IMAGES
    with torch.no_grad():
        for name, module in model.named_children():
            values = module(values)
            if isinstance(module, nn.Conv2d):
                rows = values.transpose(1, 3).flatten(0, 2)
                found[f"{name}.weight"] = rows.T @ rows
    return found


def kronecker(model: nn.Sequential) -> dict[str, Tensor]:
    inputs, outputs = grams(model), output_grams(model)
    return {f"{n}.input": inputs[n] for n in CONVS} | {f"{n}.output": outputs[n] for n in CONVS}


def statistics(model: nn.Sequential) -> dict[str, Tensor]:
    return to_tensors(gather_statistics(model, [IMAGES], find_sites(model, where=("0", "2"))))


def permuted(path: Path, permutations: dict[str, Tensor], prefix: str = "") -> ExpertTensors:
    model = net()

    def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: value for name, value in tensors.items()}

    write_expert(
        path,
        weights=named(model.state_dict()),
        info=ExpertInfo(),
        hessian=named({name: p.detach().square() for name, p in model.named_parameters()}),
        activations=named(statistics(model)),
        gram=named(grams(model)),
        kronecker=named(kronecker(model)),
    )
    expert = open_expert(path)
    try:
        return permuted_expert(
            expert,
            SYMMETRIES,
            permutations,
            parameters=model.state_dict(),
            modules=[name for name, _ in model.named_modules()],
        )
    finally:
        expert.close()


@pytest.mark.parametrize("prefix", ["", "model."])
def test_everything_is_what_the_permuted_network_gives(tmp_path: Path, prefix: str) -> None:
    permutations = random_permutations(SYMMETRIES, 1)
    found = permuted(tmp_path / "expert", permutations, prefix)
    other = net()
    other.load_state_dict(moved(net().state_dict(), SYMMETRIES, permutations))
    with torch.no_grad():
        torch.testing.assert_close(other(IMAGES), net()(IMAGES))
    expected = {
        "weights": other.state_dict(),
        "hessian": {name: p.detach().square() for name, p in other.named_parameters()},
        "activations": statistics(other),
        "gram": grams(other),
        "kronecker": kronecker(other),
    }
    for kind, tensors in expected.items():
        values = getattr(found, kind)
        assert set(values) == {prefix + name for name in tensors}
        for name, value in tensors.items():
            torch.testing.assert_close(
                values[prefix + name], value, atol=1e-4, rtol=1e-5, check_dtype=False
            )
    assert not torch.equal(found.weights[prefix + "2.weight"], net().state_dict()["2.weight"])


def test_what_an_expert_lacks_stays_absent(tmp_path: Path) -> None:
    write_expert(tmp_path / "bare", weights=net().state_dict(), info=ExpertInfo())
    expert = open_expert(tmp_path / "bare")
    found = permuted_expert(
        expert, SYMMETRIES, random_permutations(SYMMETRIES, 0), parameters=(), modules=()
    )
    assert (found.hessian, found.activations, found.gram, found.kronecker) == (None,) * 4
    expert.close()


def test_nan_is_named() -> None:
    state = {"w": torch.ones(3), "v": torch.tensor([1.0, torch.inf])}
    with pytest.raises(InputError, match=r"model\.pt: tensor 'v' must be finite; got NaN"):
        read_tensors(open_state_dict(state, path="model.pt"))
