from __future__ import annotations

import torch

from lit_merge.checkpoint import TensorInfo
from lit_merge.merged.task_config import num_classes_of, with_classes


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {n.replace("__", "."): TensorInfo(s, torch.float32) for n, s in shapes.items()}


def test_a_head_of_the_shared_shapes_fits_as_it_is() -> None:
    shared = infos(classifier__weight=(3, 8), classifier__bias=(3,), norm__weight=(8,))
    assert num_classes_of(shared, shared) == (None, False)


def test_the_rows_that_differ_are_the_classes() -> None:
    shared = infos(head__dense__weight=(8, 8), last__weight=(3, 8), last__bias=(3,))
    head = infos(head__dense__weight=(8, 8), last__weight=(10, 8), last__bias=(10,))
    assert num_classes_of(head, shared) == (10, True)


def test_a_head_that_the_shared_model_lacks_is_known_by_its_name() -> None:
    head = infos(
        classifier__dense__weight=(8, 8),
        classifier__out_proj__weight=(10, 8),
        classifier__out_proj__bias=(10,),
    )
    assert num_classes_of(head, infos(body__weight=(8, 8))) == (10, True)


def test_what_cannot_be_told_is_said() -> None:
    assert num_classes_of(infos(top__weight=(10, 8)), infos(body__weight=(8, 8))) == (None, True)
    two = infos(a__head__weight=(10, 8), b__head__weight=(4, 8))
    assert num_classes_of(two, {}) == (None, True)
    assert num_classes_of(infos(scale=()), {}) == (None, True)


def test_transformers_keep_names_that_fit_and_number_others() -> None:
    config = {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}, "x": 1}
    assert with_classes(config, 2) == config
    made = with_classes(config, 3)
    assert made["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert made["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert made["x"] == 1
    assert config["id2label"] == {"0": "cat", "1": "dog"}
    assert with_classes({"x": 1}, 2) == {"x": 1}  # two is what transformers assumes


def test_timm_configurations_are_kept_where_they_fit_and_lose_names_that_do_not() -> None:
    inner = {"num_classes": 2, "label_names": ["cat", "dog"], "mean": [0.5]}
    config = {"architecture": "x", "num_classes": 2, "label_names": ["cat", "dog"]}
    assert with_classes({**config, "pretrained_cfg": inner}, 2) == {
        **config,
        "pretrained_cfg": inner,
    }
    arguments = {"num_classes": 2, "in_chans": 1}
    assert with_classes({**config, "pretrained_cfg": inner, "model_args": arguments}, 5) == {
        "architecture": "x",
        "num_classes": 5,
        "pretrained_cfg": {"num_classes": 5, "mean": [0.5]},
        "model_args": {"num_classes": 5, "in_chans": 1},
    }
