import pytest
import torch
from torch import Tensor, nn

from lit_merge.correction.forward import attention_mask_of, run_model
from lit_merge.correction.sites import Site, find_sites
from lit_merge.correction.statistics import (
    ChannelStatistics,
    from_tensors,
    gather_statistics,
    merge_moments,
    to_tensors,
    variance_by_site,
)
from lit_merge.errors import InputError
from tests.references import moments_by_loop
from tests.tiny_models import images, padded_texts, tiny_bert, tiny_conv_net, tiny_vit

HEAD = ("classifier", "head", "8")


def assert_same(one: ChannelStatistics, other: ChannelStatistics, tolerance: float = 1e-6) -> None:
    assert one.count == other.count
    torch.testing.assert_close(one.mean, other.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(one.variance, other.variance, rtol=tolerance, atol=tolerance)


def test_updates_in_parts_equal_the_loop_over_all_rows():
    values = 3 + torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    statistics = ChannelStatistics.empty(4)
    for part in torch.split(values, [1, 0, 30, 19]):
        statistics.update(part)
    count, mean, m2 = moments_by_loop(values)
    assert statistics.count == count
    torch.testing.assert_close(statistics.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.m2, m2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.std, (m2 / count).sqrt(), rtol=1e-12, atol=1e-12)


def test_blocks_smaller_than_a_batch_change_nothing(monkeypatch):
    values = torch.randn(37, 3, generator=torch.Generator().manual_seed(1))
    whole, blocks = ChannelStatistics.empty(3), ChannelStatistics.empty(3)
    whole.update(values)
    monkeypatch.setattr("lit_merge.correction.statistics._BLOCK", 12)
    blocks.update(values)
    assert_same(whole, blocks, 1e-12)


def test_a_small_variance_on_a_large_mean_survives():
    values = 1e6 + torch.randn(1000, 1, generator=torch.Generator().manual_seed(2)).double()
    statistics = ChannelStatistics.empty(1)
    for part in values.split(10):
        statistics.update(part)
    assert statistics.variance.item() == pytest.approx(values.var(correction=0).item(), rel=1e-9)


def test_merging_is_commutative_and_associative_and_returns_itself():
    generator = torch.Generator().manual_seed(3)

    def three() -> list[ChannelStatistics]:
        generator.manual_seed(3)
        made = [ChannelStatistics.empty(2) for _ in range(3)]
        for one, count in zip(made, (5, 1, 9), strict=True):
            one.update(torch.randn(count, 2, generator=generator))
        return made

    a, b, c = three()
    left = a.merge(b).merge(c)
    assert left is a
    a, b, c = three()
    assert_same(left, c.merge(b.merge(a)), 1e-12)
    assert_same(left, ChannelStatistics.empty(2).merge(left), 0)
    assert_same(left, left.merge(ChannelStatistics.empty(2)), 0)


def test_merging_nothing_with_nothing_is_nothing():
    zeros = torch.zeros(2)
    assert merge_moments(0, zeros, zeros, 0, zeros, zeros)[0] == 0
    assert repr(ChannelStatistics.empty(2)) == "ChannelStatistics(count=0, num_features=2)"


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(tiny_vit(), images(7)), (tiny_conv_net(), images(7, channels=1))],
    ids=["vit", "conv"],
)
def test_gathered_batches_equal_the_activations_of_one_pass(model, inputs):
    sites = find_sites(model, exclude=HEAD)
    outputs = {}
    handles = [
        model.get_submodule(site.name).register_forward_hook(
            lambda _, __, out, site=site: outputs.update({site: out})
        )
        for site in sites
    ]
    with torch.no_grad():
        model(inputs)
    for handle in handles:
        handle.remove()
    gathered = gather_statistics(model, inputs.split(3), sites)
    assert list(gathered) == [site.name for site in sites]
    for site, output in outputs.items():
        rows = output.movedim(site.channel_dim, -1).reshape(-1, site.num_features)
        assert_same(gathered[site.name], ChannelStatistics(*moments_by_loop(rows)), 1e-5)


def test_padding_does_not_count_whatever_stands_in_it():
    model = tiny_bert()
    sites = find_sites(model, exclude=HEAD)
    padded = gather_statistics(model, [padded_texts((7, 3, 5))], sites)
    other = gather_statistics(model, [padded_texts((7, 3, 5), pad_token=9)], sites)
    single = gather_statistics(
        model,
        [
            {key: value[row : row + 1, :length] for key, value in padded_texts((7, 3, 5)).items()}
            for row, length in enumerate((7, 3, 5))
        ],
        sites,
    )
    assert padded["bert.encoder.layer.0.attention.self.query"].count == 15
    assert padded["bert.pooler.dense"].count == 3
    for name, one in padded.items():
        assert_same(one, single[name], 1e-5)
        assert_same(one, other[name], 1e-5)


def test_the_mask_is_found_beside_labels_too_and_can_be_given():
    inputs = padded_texts((4, 2))
    assert attention_mask_of((inputs, torch.zeros(2))) is inputs["attention_mask"]
    assert attention_mask_of(torch.zeros(2, 3)) is None
    assert attention_mask_of({"input_ids": torch.zeros(2, 3)}) is None
    site = Site("bert.encoder.layer.0.output.dense", 16, -1)
    model = tiny_bert()
    everything = gather_statistics(model, [inputs], [site], mask=lambda batch: None)
    assert everything[site.name].count == 8


def test_a_mask_fits_flattened_tokens():
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2))
    inputs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    gathered = gather_statistics(model, [inputs], [Site("1", 2, -1)], mask=lambda batch: mask)
    assert gathered["1"].count == 4
    expected = model(inputs)[mask.flatten().bool()].detach()
    assert_same(gathered["1"], ChannelStatistics(*moments_by_loop(expected)), 1e-5)


def test_gathering_leaves_the_model_as_it_was():
    model = tiny_conv_net()
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gather_statistics(model, [images(2, channels=1)], find_sites(model))
    with pytest.raises(RuntimeError, match="channels"):
        gather_statistics(model, [images(2)], find_sites(model))
    assert [module.training for module in model] == [i != 1 for i in range(9)]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_is_run_by_the_given_forward():
    seen = []

    def forward(model: nn.Module, batch: tuple[torch.Tensor, int]) -> None:
        seen.append(batch[1])
        run_model(model, batch[0])

    model = tiny_conv_net()
    gather_statistics(model, [(images(1, channels=1), 5)], find_sites(model), forward=forward)
    assert seen == [5]


def test_calls_of_a_shared_module_are_pooled():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    inputs = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    first = layer(inputs).detach()
    second = layer(first.tanh()).detach()
    gathered = gather_statistics(model, [inputs], find_sites(model))["0"]
    assert_same(gathered, ChannelStatistics(*moments_by_loop(torch.cat([first, second]))), 1e-5)


def test_a_site_that_does_not_run_has_no_entry():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    gathered = gather_statistics(
        model, [torch.ones(3, 2)], find_sites(model), forward=lambda m, x: m["used"](x)
    )
    assert list(gathered) == ["used"]


def test_no_batches_are_refused():
    model = tiny_conv_net()
    with pytest.raises(InputError, match="batches: must run at least one of the 2 sites"):
        gather_statistics(model, [], find_sites(model))


def test_nan_activations_are_refused_by_site():
    model = tiny_conv_net()
    with torch.no_grad():
        model[4].weight[2] = torch.nan
    with pytest.raises(InputError, match=r"site '4'.*NaN or infinity in 1 of 8 channels"):
        gather_statistics(model, [images(2, channels=1)], find_sites(model))


def test_infinite_activations_are_refused_even_if_later_ones_are_finite():
    model = nn.Sequential(nn.Linear(1, 1))
    batches = [torch.tensor([[torch.inf]]), torch.ones(4, 1)]
    with pytest.raises(InputError, match="site '0': activations must be finite"):
        gather_statistics(model, batches, find_sites(model))


class _Named(nn.Module):
    """A network with a module that returns its output by name."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("7", nn.Identity())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output: dict[str, Tensor] = self.get_submodule("7")({"x": x})
        return output


def test_of_several_outputs_the_first_is_measured():
    attention = nn.Sequential(nn.MultiheadAttention(4, 1, batch_first=True)).eval()
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    found = gather_statistics(
        attention, [x], [Site("0", 4, -1)], forward=lambda m, x: m[0](x, x, x)
    )
    values = attention[0](x, x, x)[0].double().reshape(-1, 4)
    torch.testing.assert_close(found["0"].mean, values.mean(0))
    torch.testing.assert_close(found["0"].variance, values.var(0, correction=0))


def test_what_a_module_is_given_is_measured_also_by_keyword():
    layer = nn.Linear(4, 2)
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for forward in (lambda m, x: m[0](x), lambda m, x: m[0](input=x)):
        found = gather_statistics(
            nn.Sequential(layer), [x], [Site("0:input", 4, -1)], forward=forward
        )
        torch.testing.assert_close(found["0:input"].mean, x.double().mean(0))


def test_outputs_that_are_no_channel_tensors_are_refused_by_site():
    model = tiny_conv_net()
    inputs = images(2, channels=1)
    with pytest.raises(InputError, match=r"site '8': its output must have 5 channels on axis -1"):
        gather_statistics(model, [inputs], [Site("8", 5, -1)])
    with pytest.raises(InputError, match=r"site '7': its output must be a batch of tensors; got"):
        gather_statistics(_Named(), [inputs], [Site("7", 8, -1)])
    with pytest.raises(InputError, match=r"site '8:input': its input must have 5 channels on axis"):
        gather_statistics(model, [inputs], [Site("8:input", 5, -1)])
    with pytest.raises(InputError, match=r"sites: must name modules of Sequential; got '99'"):
        gather_statistics(model, [inputs], [Site("99", 5, -1)])


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_refused_with_the_way_out():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    inputs, padding = torch.randn(2, 3, 8), torch.tensor([[0, 0, 0], [0, 1, 1]]).bool()
    for enabled in (True, False):
        model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=enabled)

        def gather(model: nn.Module = model) -> dict[str, ChannelStatistics]:
            return gather_statistics(
                model,
                [inputs],
                find_sites(model),
                forward=lambda m, x: m(x, src_key_padding_mask=padding),
                mask=lambda x: ~padding,
            )

        if enabled:
            with pytest.raises(InputError, match=r"padded, not nested.*enable_nested_tensor=False"):
                gather()
        else:
            assert gather()["layers.0.linear1"].count == 4


def test_a_mask_of_four_axes_is_refused():
    with pytest.raises(InputError, match=r"attention_mask: must be \[batch, tokens\]; got \(1, 1"):
        attention_mask_of({"attention_mask": torch.ones(1, 1, 2, 2)})


def test_statistics_survive_the_way_through_tensors():
    model = tiny_conv_net()
    gathered = gather_statistics(model, [images(3, channels=1)], find_sites(model))
    tensors = to_tensors(gathered)
    assert tensors["1.count"].dtype == torch.int64
    assert sorted(tensors) == sorted(f"{s}.{p}" for s in "14" for p in ("count", "mean", "m2"))
    back = from_tensors(tensors)
    assert list(back) == ["1", "4"]
    for name, one in gathered.items():
        assert_same(one, back[name], 0)
    assert variance_by_site(back) == {
        name: pytest.approx(one.variance.mean().item()) for name, one in gathered.items()
    }


def test_broken_tensors_are_refused_by_file_and_site():
    whole = {"a.b.count": torch.tensor(3), "a.b.mean": torch.ones(2), "a.b.m2": torch.ones(2)}
    for change, match in (
        ({"a.b.m2": None}, "x.safetensors: site 'a.b' must have count, mean and m2; got no m2"),
        ({"a.b.m2": torch.ones(3)}, r"equally many means and m2; got shapes \(\), \(2,\) and \(3"),
        ({"a.b.m2": -torch.ones(2)}, "positive count, finite means and m2 ≥ 0; got count 3"),
        ({"a.b.mean": torch.ones(2) / 0}, "finite means"),
        ({"a.b.count": torch.tensor(0)}, "got count 0"),
        ({"a.b.std": torch.ones(2)}, "must end in .count, .mean or .m2; got 'a.b.std'"),
    ):
        tensors = {k: v for k, v in {**whole, **change}.items() if v is not None}
        with pytest.raises(InputError, match=match):
            from_tensors(tensors, source="x.safetensors")
