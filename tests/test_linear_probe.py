import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction.heads import install_heads
from lit_merge.correction.linear_probe import head_inputs, linear_probe
from lit_merge.correction.routing import TaskContext
from lit_merge.errors import InputError
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit


def blobs(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two classes on either side of zero, in features of very different scale, one constant."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    x = torch.randn(count, 3, generator=generator)
    x[:, 0] += 6.0 * labels - 3
    x[:, 2] = 1
    return x * torch.tensor([1e-3, 1e3, 1.0]) + 5, labels


def probe_model() -> nn.Sequential:
    """A backbone that keeps everything under a head that says always class 0."""
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    nn.init.zeros_(model[1].weight)
    return model


def test_a_useless_head_on_good_features_probes_well():
    x, labels = blobs(80, 0)
    test_x, test_labels = blobs(200, 1)
    train = list(zip(x.split(17), labels.split(17), strict=True))
    accuracy = linear_probe(probe_model(), "1", train, [(test_x, test_labels)])
    assert accuracy >= 0.98
    assert accuracy == linear_probe(probe_model(), "1", train[::-1], [(test_x, test_labels)])


def test_features_without_information_probe_at_chance():
    x, labels = blobs(80, 0)
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(3))
    test_x, test_labels = torch.randn(400, 3, generator=torch.manual_seed(4)), blobs(400, 0)[1]
    accuracy = linear_probe(probe_model(), "1", [(x, labels)], [(test_x, test_labels)])
    assert 0.4 < accuracy < 0.6


def test_accuracy_is_the_share_of_right_answers():
    x, labels = blobs(40, 0)
    flipped = labels.clone()
    flipped[:10] = 1 - flipped[:10]
    assert linear_probe(probe_model(), "1", [(x, labels)], [(x, flipped)]) == pytest.approx(0.75)


def test_regularisation_shrinks_the_classifier_towards_the_larger_class():
    x, labels = blobs(40, 0)
    x, labels = torch.cat([x, x[labels == 1]]), torch.cat([labels, labels[labels == 1]])
    strong = linear_probe(probe_model(), "1", [(x, labels)], [(x, labels)], regularisation=1e6)
    assert strong == pytest.approx(40 / 60)


def test_features_are_what_reaches_the_head_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    x, labels = blobs(6, 0)
    features, targets = head_inputs(model, "2", [(x[:4], labels[:4]), (x[4:], labels[4:])])
    torch.testing.assert_close(features, model[0](x).detach())
    assert torch.equal(targets, labels)
    assert model[1].training
    assert not model[2]._forward_pre_hooks


def test_heads_of_vits_berts_and_routed_models_are_probed():
    labels = torch.tensor([0, 1, 1])
    vit, inputs = tiny_vit(), images(3)
    expected = vit.forward_head(vit.forward_features(inputs), pre_logits=True)
    features, _ = head_inputs(vit, "head", [(inputs, labels)])
    torch.testing.assert_close(features, expected.detach())
    context = TaskContext()
    heads = {"a": {"head.weight": torch.ones(2, 32), "head.bias": torch.ones(2)}}
    install_heads(vit, heads, context, tasks=["a"])
    with context.using(0):
        routed, _ = head_inputs(vit, "head", [(inputs, labels)])
    torch.testing.assert_close(routed, features)
    bert, texts = tiny_bert(), padded_texts((3, 5, 2))
    features, _ = head_inputs(bert, "classifier", [(texts, labels)])
    torch.testing.assert_close(features, bert.bert(**texts).pooler_output.detach())


def test_inputs_given_by_keyword_are_read():
    model = nn.ModuleDict({"head": nn.Linear(3, 2)})
    x, labels = blobs(4, 0)
    features, _ = head_inputs(
        model, "head", [(x, labels)], forward=lambda m, inputs: m["head"](input=inputs)
    )
    assert torch.equal(features, x)


def test_heads_that_cannot_be_probed_are_refused_by_name():
    model, x, labels = tiny_conv_net(), images(2, channels=1), torch.tensor([0, 1])
    for head, match in (
        ("9", "head: must name modules of Sequential; got '9'"),
        ("3", r"head: '3' must take vectors \[batch, features\]; got \(2, 6, 12, 12\)"),
    ):
        with pytest.raises(InputError, match=match):
            head_inputs(model, head, [(x, labels)])
    with pytest.raises(InputError, match=r"'8' must run once .* 3 labels; got \[\(2, 8\)\]"):
        head_inputs(model, "8", [(x, torch.tensor([0, 1, 1]))])
    with pytest.raises(InputError, match=r"'8' must run once .*; got \[\]"):
        head_inputs(model, "8", [(x, labels)], forward=lambda m, inputs: inputs)
    with pytest.raises(InputError, match="head: the inputs of '8' must be finite"):
        head_inputs(model, "8", [(x / 0, labels)])
    assert not any(module._forward_pre_hooks for module in model)


def test_no_examples_and_single_classes_are_refused():
    x, labels = blobs(4, 0)
    with pytest.raises(InputError, match="batches: must hold at least one example; got none"):
        linear_probe(probe_model(), "1", [], [(x, labels)])
    with pytest.raises(InputError, match="train: must hold at least two classes; got only class 1"):
        linear_probe(probe_model(), "1", [(x, torch.ones(4))], [(x, labels)])
