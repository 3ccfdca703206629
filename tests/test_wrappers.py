"""Names, sites and corrections of a model inside torch.compile and data parallelism."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.routing import TaskContext
from lit_merge.correction.site import Site
from lit_merge.correction.sites import find_sites
from lit_merge.correction.statistics import gather_statistics
from lit_merge.correction.tact import fit_tact
from lit_merge.correction.wrappers import bare, bare_module_at, named_bare_modules
from tests.processes import on_ranks
from tests.tiny_models import images, tiny_conv_net, tiny_vit


def partly_compiled() -> nn.Module:
    model: Any = tiny_vit()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1].mlp = torch.compile(model.blocks[1].mlp, backend="eager")
    return model


def test_names_are_those_of_the_bare_model() -> None:
    plain = tiny_vit()
    names = [name for name, _ in plain.named_modules()]
    for wrapped in (plain, torch.compile(plain), nn.DataParallel(plain), partly_compiled()):
        assert [name for name, _ in named_bare_modules(wrapped)] == names
    assert bare(nn.DataParallel(torch.compile(plain))) is plain


def test_modules_are_found_by_their_bare_names() -> None:
    model = partly_compiled()
    for name, module in named_bare_modules(model):
        assert bare_module_at(model, name) is module
        assert type(module).__name__ != "OptimizedModule"
    with pytest.raises(AttributeError):
        bare_module_at(model, "blocks.7")


def test_sites_of_wrapped_models_are_those_of_the_bare_one() -> None:
    for where in ("auto", "attention", "block", "final"):
        expected = find_sites(tiny_vit(), where=where, example_inputs=images(2))
        for wrapped in (
            torch.compile(tiny_vit(), backend="eager"),
            nn.DataParallel(tiny_vit()),
        ):
            assert find_sites(wrapped, where=where, example_inputs=images(2)) == expected


def corrected(model: nn.Module) -> tuple[nn.Module, Corrections, TaskContext]:
    sites = find_sites(
        model,
        where=["linear", "attention", "block", "final"],
        exclude=["head"],
        example_inputs=images(2),
    )
    assert {site.before for site in sites} == {True, False}
    context = TaskContext()
    corrections = Corrections(sites, 2, context=context)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in corrections.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    corrections.attach(model)
    return model, corrections, context


@pytest.mark.slow
def test_a_compiled_model_runs_with_its_corrections() -> None:
    torch.compiler.reset()
    model, corrections, context = corrected(tiny_vit())
    compiled = torch.compile(model, backend="aot_eager")
    ids = torch.tensor([0, 1, 1, 0])
    with context.using(ids):
        expected, found = model(images(4)), compiled(images(4))
    with corrections.disabled():
        bare_output = model(images(4))
    torch.testing.assert_close(found, expected)
    assert (found - bare_output).abs().max() > 0.1
    other = torch.tensor([1, 1, 0, 0])
    with context.using(other):  # the tasks are no constants of the compiled graph
        torch.testing.assert_close(compiled(images(4)), model(images(4)))
    found.square().sum().backward()
    assert all(p.grad is not None for p in corrections.parameters())


def test_a_compiled_model_is_fitted_and_measured_as_the_bare_one() -> None:
    torch.compiler.reset()
    results = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        model, context = tiny_conv_net(), TaskContext()
        wrapped = wrap(model)
        wrapped(images(2, channels=1))  # compiled before the hooks are there
        corrections = Corrections(find_sites(wrapped), 1, context=context)
        expert = gather_statistics(
            wrap(tiny_conv_net(1)), [images(4, channels=1)], corrections.sites
        )
        corrections.attach(wrapped)
        fit_tact(
            wrapped,
            corrections,
            context,
            batches={0: [images(4, channels=1)]},
            expert_statistics={0: expert},
        )
        results.append(corrections.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)
        assert not torch.equal(value, torch.ones_like(value))


def test_state_dicts_and_copies_go_between_wrapped_and_bare_models() -> None:
    model, corrections, context = corrected(tiny_vit())
    both = nn.ModuleDict({"model": model, "corrections": corrections})
    copied = copy.deepcopy(both)
    fresh, others, again = corrected(torch.compile(tiny_vit(), backend="eager"))
    others.load_state_dict(corrections.state_dict())
    with context.using(1), again.using(1):
        expected = model(images(3))
        torch.testing.assert_close(copied["model"](images(3)), expected)
        torch.testing.assert_close(bare(fresh)(images(3)), expected)
    assert not any("_orig_mod" in name for name in others.state_dict())


def test_sites_survive_json() -> None:
    sites = find_sites(tiny_vit(), where=["final", "blocks.0.*:input", "auto"])
    record = json.dumps([vars(site) for site in sites])
    assert tuple(Site(**entry) for entry in json.loads(record)) == sites


def _under_data_parallel(rank: int) -> list[float]:
    """Sums of outputs and of means at sites, of this rank's half of the examples."""
    model, corrections, context = corrected(tiny_vit())
    parallel = nn.parallel.DistributedDataParallel(model)
    inputs, ids = images(4), torch.tensor([0, 1, 1, 0])
    with torch.no_grad(), context.using(ids[2 * rank : 2 * rank + 2]):
        output = parallel(inputs[2 * rank : 2 * rank + 2])
        # Uneven numbers of batches: the wrapper would wait for the other rank.
        some = [inputs[2 * rank : 2 * rank + 2]] * (rank + 1)
        found = gather_statistics(parallel, some, corrections.sites)
    assert find_sites(parallel, where="final") == find_sites(model, where="final")
    return [*output.flatten().tolist(), *found["head:input"].mean.tolist()]


@pytest.mark.distributed
def test_data_parallel_ranks_run_and_measure_as_one_process_does(tmp_path: Path) -> None:
    found = on_ranks(_under_data_parallel, world_size=2, folder=tmp_path)
    model, corrections, context = corrected(tiny_vit())
    inputs, ids = images(4), torch.tensor([0, 1, 1, 0])
    with torch.no_grad(), context.using(ids):
        output = model(inputs)
    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        with context.using(ids[own]):
            statistics = gather_statistics(model, [inputs[own]], corrections.sites)
        expected = [*output[own].flatten().tolist(), *statistics["head:input"].mean.tolist()]
        torch.testing.assert_close(torch.tensor(found[rank]), torch.tensor(expected))
