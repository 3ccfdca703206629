from __future__ import annotations

import json

import torch

from lit_merge.methods import ParameterSlice
from lit_merge.streaming.findings import Findings


def test_the_traces_do_not_depend_on_how_the_slices_were_grouped() -> None:
    generator = torch.Generator().manual_seed(0)
    sums = (torch.rand(999, generator=generator, dtype=torch.float64) ** 9 * 1e9).tolist()
    whole = Findings(traces={"a": sums})
    for size in (7, 100, 333):
        total = Findings()
        for start in range(0, len(sums), size):
            part = Findings(traces={"a": sums[start : start + size]})
            total.add(Findings.from_json(json.loads(json.dumps(part.as_json()))))
        assert total.trace_of(["a"]) == whole.trace_of(["a"])


def test_the_trace_of_a_hessian_beyond_float32_is_finite() -> None:
    large = torch.tensor([3e38, 2e38])
    seen = Findings()
    seen.see(ParameterSlice("w", ("a",), (large,), hessians=(large,)))
    again = Findings.from_json(json.loads(json.dumps(seen.as_json())))
    assert again.trace_of(["a"]) == {"a": sum(large.tolist())}
