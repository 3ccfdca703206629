"""Options of the learned fit that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from lit_merge.errors import InputError
from lit_merge.merged.fit_settings import FitSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": "some"}, "trainable: must be one of scale_shift, all; got 'some'"),
        ({"heads": "new"}, "heads: must be one of fixed, refit; got 'new'"),
        ({"coefficients": "task"}, "coefficients: must be one of none, layer; got 'task'"),
        ({"batch_norm_mode": "eval"}, "batch_norm_mode: must be one of auto, train, freeze"),
        ({"batch_norm_mode": "train"}, 'batch_norm_mode: must go with trainable: "all"'),
        (
            {"batch_norm_mode": "train", "trainable": "all", "elastic": 1.0},
            'batch_norm_mode: must not be "train" with elastic',
        ),
        ({"weights_lr": 0.0}, "weights_lr: must be positive and finite; got 0.0"),
        ({"feature_weight": -1.0}, "feature_weight: must be at least 0 and finite; got -1.0"),
        ({"mixup": -1.0}, "mixup: must be at least 0 and finite; got -1.0"),
        (
            {"mixup": 1.0, "teacher": "labels"},
            'mixup: must go with teacher: "experts", whose answers',
        ),
        ({"elastic": float("inf")}, "elastic: must be at least 0 and finite; got inf"),
        ({"surgery_rank": -1}, "surgery_rank: must be at least 0; got -1"),
        ({"holdout_every": 0}, "holdout_every: must be at least 1; got 0"),
        ({"patience": -2}, "patience: must be at least 0; got -2"),
        ({"holdout": 1.0}, r"holdout: must be a share in \[0, 1\); got 1.0"),
        ({"elastic": 1.0}, 'elastic: must go with trainable: "all"'),
        ({"patience": 2, "holdout": 0.0}, "patience: must go with a held-out part"),
        (
            {"feature_weight": 1.0, "teacher": "labels"},
            'feature_weight: must go with teacher: "experts"',
        ),
    ],
)
def test_options_out_of_range_or_without_their_partner_are_named(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        FitSettings(**options)


def test_batch_norm_is_trained_with_free_weights_alone() -> None:
    assert FitSettings(trainable="all").trains_batch_norm
    assert FitSettings(trainable="all", batch_norm_mode="train").trains_batch_norm
    assert not FitSettings().trains_batch_norm
    assert not FitSettings(trainable="all", elastic=1.0).trains_batch_norm
    assert not FitSettings(trainable="all", batch_norm_mode="freeze").trains_batch_norm
