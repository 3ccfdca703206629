import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction.corrections import Corrections
from lit_merge.correction.heads import install_heads
from lit_merge.correction.rescale import RescaleShift
from lit_merge.correction.routing import TaskContext, TaskRouter
from lit_merge.correction.sites import Site, find_sites
from lit_merge.errors import InputError
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit

TASKS = ("a", "b", "c")
IDS = torch.tensor([2, 0, 1, 2, 0])


def linear_heads(widths: tuple[int, ...] = (3, 5, 2), inputs: int = 4) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {task: nn.Linear(inputs, width) for task, width in zip(TASKS, widths, strict=True)}


def scrambled(corrections: Corrections) -> Corrections:
    """Corrections that are no longer the identity."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in corrections.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return corrections


def corrected(model: nn.Module, context: TaskContext, **options: object) -> Corrections:
    corrections = Corrections(find_sites(model, **options), 3, context=context)
    corrections.attach(model)
    return corrections


def logits(out: object) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


# --- TaskContext ---


def test_contexts_nest_and_end():
    context = TaskContext()
    with context.using(IDS):
        with context.using(torch.tensor([1])):
            assert context.present == (1,)
        assert torch.equal(context.task_ids, IDS)
        assert context.present == (0, 1, 2)
    assert context.present == ()
    with pytest.raises(InputError, match="task_ids: per-task heads and corrections must know"):
        context.task_ids  # noqa: B018 - the access raises


def test_a_context_ends_with_an_error_too():
    context = TaskContext()
    with pytest.raises(RuntimeError, match="inside"), context.using(IDS):
        raise RuntimeError("inside")
    with pytest.raises(InputError, match="outside of"):
        context.ids_for(torch.ones(1, 1), where="here")


def test_entries_of_an_example_stand_next_to_each_other():
    context = TaskContext()
    with context.using(torch.tensor([1, 0])):
        assert context.ids_for(torch.ones(6, 1), where="x").tolist() == [1, 1, 1, 0, 0, 0]
    with context.using(2):
        assert context.ids_for(torch.ones(4, 1), where="x").tolist() == [2, 2, 2, 2]


def test_activations_that_are_no_multiple_of_the_examples_are_refused():
    context = TaskContext()
    with context.using(IDS), pytest.raises(InputError, match=r"site 'x': axis 0 must be the 5"):
        context.ids_for(torch.ones(7, 2), where="site 'x'")


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        (torch.tensor([0.5]), r"must be integers \[batch\]; got torch.float32"),
        (torch.tensor([True]), "must be integers"),
        (torch.zeros(2, 2, dtype=torch.long), r"got torch.int64 \(2, 2\)"),
        (torch.tensor([-1, 0]), r"must be non-negative and at least one; got \[-1, 0\]"),
        (torch.tensor([], dtype=torch.long), r"at least one; got \[\]"),
    ],
)
def test_ids_that_are_none_are_refused(ids, match):
    with pytest.raises(InputError, match=match), TaskContext().using(ids):
        raise AssertionError("not reached")


# --- TaskRouter ---


def test_every_example_gets_its_own_heads_output_padded_with_minus_infinity():
    heads, context = linear_heads(), TaskContext()
    router = TaskRouter(heads, tasks=TASKS, context=context)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with context.using(IDS):
        out = router(x)
    assert out.shape == (5, 5)
    for row, number in enumerate(IDS):
        expected = heads[TASKS[number]](x[row])
        torch.testing.assert_close(out[row, : len(expected)], expected)
        assert (out[row, len(expected) :] == -torch.inf).all()


def test_the_width_does_not_depend_on_the_tasks_in_the_batch():
    context = TaskContext()
    router = TaskRouter(linear_heads(), tasks=TASKS, context=context)
    with torch.no_grad():
        for task in range(3):
            with context.using(task):
                assert router(torch.ones(2, 4)).shape == (2, 5)


def test_heads_that_do_not_tell_their_width_are_padded_to_the_widest_in_the_batch():
    context = TaskContext()
    heads = {task: nn.Sequential(head) for task, head in linear_heads().items()}
    router = TaskRouter(heads, tasks=TASKS, context=context)
    with torch.no_grad(), context.using(torch.tensor([0, 2])):
        assert router(torch.ones(2, 4)).shape == (2, 3)


def test_only_tasks_that_are_present_run_without_gradients():
    ran = []
    heads = linear_heads()
    for task, head in heads.items():
        head.register_forward_hook(lambda _, args, __, task=task: ran.append((task, len(args[0]))))
    context = TaskContext()
    router = TaskRouter(heads, tasks=TASKS, context=context)
    with torch.no_grad(), context.using(torch.tensor([2, 0, 2])):
        router(torch.ones(3, 4))
    assert ran == [("a", 1), ("c", 2)]


def test_every_trainable_head_takes_part_in_every_step():
    context = TaskContext()
    router = TaskRouter(linear_heads(), tasks=TASKS, context=context)
    for ids in (torch.tensor([1, 1]), torch.tensor([1, 0])):
        router.zero_grad()
        with context.using(ids):
            out = router(torch.ones(2, 4))
        nn.functional.cross_entropy(out, torch.zeros(2, dtype=torch.long)).backward()
        assert all(parameter.grad is not None for parameter in router.parameters())
        assert all(parameter.grad.isfinite().all() for parameter in router.parameters())
        assert router.heads["b"].weight.grad.abs().sum() > 0
        assert router.heads["c"].weight.grad.abs().sum() == 0


def test_heads_of_convolutions_are_padded_on_their_channels():
    context = TaskContext()
    heads = {"a": nn.Conv2d(4, 2, 1), "b": nn.Conv2d(4, 3, 1)}
    router = TaskRouter(heads, tasks=("a", "b"), context=context)
    x = torch.ones(2, 4, 5, 5)
    with context.using(torch.tensor([1, 0])):
        out = router(x)
    assert out.shape == (2, 3, 5, 5)
    torch.testing.assert_close(out[1, :2], heads["a"](x[1:])[0])
    assert (out[1, 2] == -torch.inf).all()


def test_tokens_of_an_example_go_through_its_head():
    heads, context = linear_heads(), TaskContext()
    router = TaskRouter(heads, tasks=TASKS, context=context)
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    with context.using(torch.tensor([2, 0])):
        out = router(x)
    torch.testing.assert_close(out[1, :, :2], heads["c"](x[1]))
    torch.testing.assert_close(out[3, :, :3], heads["a"](x[3]))


def test_a_chain_of_heads_with_hidden_layers_of_different_width_works():
    context = TaskContext()
    first = {"a": nn.Linear(4, 6), "b": nn.Linear(4, 3)}
    second = {"a": nn.Linear(6, 2), "b": nn.Linear(3, 5)}
    model = nn.Sequential(
        TaskRouter(first, tasks=("a", "b"), context=context),
        nn.GELU(),
        TaskRouter(second, tasks=("a", "b"), context=context),
    )
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with context.using(torch.tensor([1, 0, 1])):
        out = model(x)
    for row, task in enumerate("bab"):
        expected = second[task](nn.functional.gelu(first[task](x[row])))
        torch.testing.assert_close(out[row, : len(expected)], expected)
    nn.functional.cross_entropy(out, torch.zeros(3, dtype=torch.long)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_routers_refuse_wrong_tasks():
    heads = linear_heads()
    for tasks in (("a", "b"), ("a", "b", "d"), ()):
        with pytest.raises(InputError, match="heads: must have one module for each of the tasks"):
            TaskRouter(heads, tasks=tasks, context=TaskContext())
    context = TaskContext()
    router = TaskRouter(heads, tasks=TASKS, context=context)
    with context.using(3), pytest.raises(InputError, match="below the number of tasks, 3; got 3"):
        router(torch.ones(1, 4))
    with pytest.raises(InputError, match="task_ids: per-task heads"):
        router(torch.ones(1, 4))


def test_task_names_with_dots_are_stored_and_impossible_ones_refused():
    router = TaskRouter({"v1.0": nn.Linear(1, 1)}, tasks=["v1.0"], context=TaskContext())
    assert sorted(router.state_dict()) == ["heads.v1/0.bias", "heads.v1/0.weight"]
    for names in (("keys",), ("a.b", "a/b")):
        with pytest.raises(InputError, match="tasks: names must be unique, not empty and none"):
            TaskRouter(
                {name: nn.Linear(1, 1) for name in names}, tasks=names, context=TaskContext()
            )


# --- install_heads ---


def vit_heads(widths: tuple[int, ...] = (5, 7, 3)) -> dict[str, dict[str, Tensor]]:
    return {
        task: {"head.weight": head.weight.detach(), "head.bias": head.bias.detach()}
        for task, head in linear_heads(widths, inputs=32).items()
    }


def test_installed_heads_equal_one_model_per_task():
    model, context, inputs = tiny_vit(), TaskContext(), images(5)
    heads = vit_heads()
    features = model.forward_head(model.forward_features(inputs), pre_logits=True)
    assert install_heads(model, heads, context, tasks=TASKS) == ("head",)
    with context.using(IDS):
        out = model(inputs)
    for row, number in enumerate(IDS):
        tensors = heads[TASKS[number]]
        expected = features[row] @ tensors["head.weight"].T + tensors["head.bias"]
        torch.testing.assert_close(out[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)
    assert [head.out_features for head in model.head.heads.values()] == [5, 7, 3]


def test_heads_of_bert_are_routed_inside_its_own_forward():
    model, context, inputs = tiny_bert(), TaskContext(), padded_texts((6, 4, 5))
    torch.manual_seed(0)
    heads = {
        task: {"classifier.weight": torch.randn(width, 16), "classifier.bias": torch.randn(width)}
        for task, width in (("a", 2), ("b", 4))
    }
    pooled = model.bert(**inputs).pooler_output
    install_heads(model, heads, context, tasks=("b", "a"))
    with context.using(torch.tensor([1, 0, 1])):
        out = model(**inputs).logits
    for row, task in enumerate("aba"):
        tensors = heads[task]
        expected = pooled[row] @ tensors["classifier.weight"].T + tensors["classifier.bias"]
        torch.testing.assert_close(out[row, : len(expected)], expected, rtol=1e-5, atol=1e-5)


def test_installed_heads_are_copies():
    model, heads = tiny_vit(), vit_heads()
    install_heads(model, heads, TaskContext(), tasks=TASKS)
    heads["a"]["head.bias"].fill_(99)
    assert (model.head.heads["a"].bias < 99).all()


def test_installed_heads_keep_dtype_and_frozenness():
    model = tiny_vit().bfloat16()
    model.head.weight.requires_grad_(False)
    install_heads(model, vit_heads(), TaskContext(), tasks=TASKS)
    layer = model.head.heads["b"]
    assert layer.weight.dtype == torch.bfloat16
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_norms_with_buffers_convolutions_and_embeddings_can_be_heads():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3))
    model.add_module("embed", nn.Embedding(4, 3))
    model.add_module("norm", nn.LayerNorm(3))
    model.add_module("plain", nn.BatchNorm1d(3, affine=False))

    def tensors(width: int) -> dict[str, Tensor]:
        return {
            "0.weight": torch.ones(width, 2, 1),
            "0.bias": torch.zeros(width),
            "1.weight": torch.ones(width),
            "1.bias": torch.ones(width),
            "1.running_mean": torch.full((width,), 2.0),
            "1.running_var": torch.ones(width),
            "embed.weight": torch.ones(6, width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.ones(width),
            "plain.running_mean": torch.ones(width),
            "plain.running_var": torch.ones(width),
        }

    replaced = install_heads(model, {"a": tensors(3), "b": tensors(4)}, TaskContext(), tasks="ab")
    assert replaced == ("0", "1", "embed", "norm", "plain")
    conv, norm = model[0].heads["b"], model[1].heads["b"]
    assert (conv.out_channels, conv.in_channels, norm.num_features) == (4, 2, 4)
    assert norm.running_mean.tolist() == [2, 2, 2, 2]
    assert norm.num_batches_tracked.item() == 0
    embed = model.embed.heads["b"]
    assert (embed.num_embeddings, embed.embedding_dim) == (6, 4)
    assert model.norm.heads["b"].normalized_shape == (4,)
    assert model.plain.heads["b"].num_features == 4
    assert model.eval()[:2][0].heads["b"](torch.ones(1, 2, 5)).shape == (1, 4, 5)


def test_a_conv_1d_of_transformers_takes_another_width():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(3, 2))
    tensors = {"0.weight": torch.ones(2, 5), "0.bias": torch.zeros(5)}
    install_heads(model, {"a": tensors}, TaskContext(), tasks=["a"])
    assert model[0].heads["a"](torch.ones(1, 2)).tolist() == [[2.0] * 5]


def test_no_own_tensors_replace_nothing():
    assert install_heads(tiny_vit(), {"a": {}, "b": {}}, TaskContext(), tasks=("a", "b")) == ()


def test_bad_heads_are_refused_by_task_and_tensor_and_leave_the_model():
    model = tiny_vit()
    good = vit_heads()

    def attempt(**changes: dict[str, Tensor]) -> None:
        install_heads(model, {**good, **changes}, TaskContext(), tasks=TASKS)

    bias = good["b"]["head.bias"]
    for b, match in (
        ({"head.bias": bias}, "task 'b' must have its own 'head.weight'"),
        ({**good["b"], "head.bias": bias[:2]}, "'head' of task 'b': 'bias' must have 7 entries"),
        ({**good["b"], "head.bias": bias[None]}, "'bias' must be torch.float32 with 1 axes; got"),
        ({**good["b"], "head.bias": bias.long()}, "got torch.int64"),
    ):
        with pytest.raises(InputError, match=match):
            attempt(b=b)
    with pytest.raises(InputError, match=r"each of the tasks \['a', 'b', 'c'\]; got"):
        attempt(d=good["a"])
    for name, match in (
        ("heed.bias", r"must be in VisionTransformer.*'heed.bias'. Near it are \['head.bias'"),
        ("cls_token", "must be a tensor of a layer without layers inside; got 'cls_token'"),
    ):
        with pytest.raises(InputError, match=match):
            install_heads(model, {"a": {name: bias}}, TaskContext(), tasks=["a"])
    assert isinstance(model.head, nn.Linear)


def test_a_layer_of_unknown_kind_must_keep_its_size():
    model = nn.Sequential(nn.PReLU(3))
    same = {"0.weight": torch.ones(3)}
    wider = {"0.weight": torch.ones(4)}
    with pytest.raises(InputError, match=r"'0' of task 'b': a PReLU must keep its size; got"):
        install_heads(model, {"a": same, "b": wider}, TaskContext(), tasks=("a", "b"))
    assert install_heads(model, {"a": same, "b": same}, TaskContext(), tasks=("a", "b")) == ("0",)


# --- Corrections ---


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (tiny_vit(), {"x": images(5)}),
        (tiny_conv_net(), {"input": images(5, channels=1)}),
        (tiny_bert(), padded_texts((7, 3, 5, 6, 2))),
    ],
    ids=["vit", "conv", "bert"],
)
def test_corrections_begin_as_the_identity_and_mixed_batches_equal_single_tasks(model, inputs):
    context = TaskContext()
    with torch.no_grad():
        plain = logits(model(**inputs))
        corrections = corrected(model, context)
        with context.using(IDS):
            assert torch.equal(logits(model(**inputs)), plain)
            scrambled(corrections)
            mixed = logits(model(**inputs))
        for row, number in enumerate(IDS.tolist()):
            with context.using(number):
                single = logits(
                    model(**{key: value[row : row + 1] for key, value in inputs.items()})
                )
            torch.testing.assert_close(mixed[row : row + 1], single, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(mixed, plain, atol=1e-2)
        with corrections.disabled():
            assert torch.equal(logits(model(**inputs)), plain)
        corrections.detach()
        assert not corrections.attached
        assert torch.equal(logits(model(**inputs)), plain)


def test_a_corrected_layer_is_its_output_scaled_and_shifted():
    context = TaskContext()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
    x = images(2, channels=1)
    raw = model[0](x).detach()
    corrections = scrambled(corrected(model, context))
    with context.using(torch.tensor([2, 0])):
        out = model(x)
    weight, bias = corrections.at("0").weight, corrections.at("0").bias
    for row, task in enumerate((2, 0)):
        expected = raw[row] * weight[task][:, None, None] + bias[task][:, None, None]
        torch.testing.assert_close(out[row], expected.relu())


def test_parameters_are_named_after_their_sites():
    corrections = Corrections((Site("blocks.0.fc", 4, -1),), 2, context=TaskContext())
    assert {name: tuple(p.shape) for name, p in corrections.named_parameters()} == {
        "blocks/0/fc.weight": (2, 4),
        "blocks/0/fc.bias": (2, 4),
    }
    assert isinstance(corrections.at(Site("blocks.0.fc", 4, -1)), RescaleShift)


def test_state_dicts_round_trip():
    model, context, inputs = tiny_conv_net(), TaskContext(), images(5, channels=1)
    corrections = scrambled(corrected(model, context))
    with context.using(IDS):
        expected = model(inputs)
    state = {name: value.clone() for name, value in corrections.state_dict().items()}
    scrambled(corrections)
    corrections.load_state_dict(state)
    with context.using(IDS):
        assert torch.equal(model(inputs), expected)


class Both(nn.Module):
    """A model with its corrections and heads, as a LightningModule holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.context = TaskContext()
        self.model = tiny_conv_net()
        heads = {task: {"8.weight": torch.randn(4, 8), "8.bias": torch.randn(4)} for task in TASKS}
        install_heads(self.model, heads, self.context, tasks=TASKS)
        self.corrections = corrected(self.model, self.context, exclude=["8"])

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        with self.context.using(ids):
            return self.model(x)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_and_pickles_are_corrected_by_their_own_corrections(way):
    torch.manual_seed(0)
    both, inputs = Both(), images(5, channels=1)
    scrambled(both.corrections)
    before = both(inputs, IDS)
    twin = way(both)
    assert twin.corrections.attached
    assert torch.equal(twin(inputs, IDS), before)
    scrambled(twin.corrections)
    assert not torch.allclose(twin(inputs, IDS), before)
    assert torch.equal(both(inputs, IDS), before)
    twin.corrections.detach()
    assert both.corrections.attached


def test_a_copied_model_runs_in_the_same_context():
    model, context, inputs = tiny_conv_net(), TaskContext(), images(5, channels=1)
    scrambled(corrected(model, context))
    twin = copy.deepcopy(model)
    with context.using(IDS):
        assert torch.equal(twin(inputs), model(inputs))


def test_corrections_copied_alone_are_attached_to_nothing():
    model = tiny_conv_net()
    corrections = corrected(model, TaskContext())
    assert not copy.deepcopy(corrections).attached
    assert corrections.attached


def test_corrections_train_while_the_model_is_frozen():
    model, context = tiny_conv_net().requires_grad_(False), TaskContext()
    corrections = corrected(model, context)
    with context.using(IDS):
        model(images(5, channels=1)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in corrections.parameters())


def test_corrections_outside_of_a_context_are_refused():
    model = tiny_conv_net()
    corrected(model, TaskContext())
    with pytest.raises(InputError, match=r"outside of `with context.using\(task_ids\)`"):
        model(images(1, channels=1))


def test_outputs_that_are_not_per_example_are_refused_by_site():
    context = TaskContext()
    model = nn.Sequential(nn.Linear(2, 2))
    corrected(model, context)
    with context.using(IDS), pytest.raises(InputError, match="site '0': axis 0 must be the 5"):
        model(torch.ones(1, 3, 2))


def test_corrections_attach_once_and_to_models_that_have_the_sites():
    model = tiny_conv_net()
    corrections = corrected(model, TaskContext())
    with pytest.raises(InputError, match="must be attached to one model at a time"):
        corrections.attach(tiny_conv_net())
    corrections.detach()
    with pytest.raises(InputError, match="sites: must name modules of Sequential; got '1'"):
        corrections.attach(nn.Sequential(nn.ReLU()))
    assert not corrections.attached
    corrections.attach(model)
    assert corrections.attached


def test_a_site_that_cannot_be_named_is_refused():
    with pytest.raises(InputError, match=r"sites: names must be unique.*got 'forward'"):
        Corrections((Site("forward", 2, -1),), 2, context=TaskContext())
