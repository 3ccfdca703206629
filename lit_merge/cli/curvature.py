"""``lit-merge curvature``: one pass that makes an expert folder of an existing checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule

from lit_merge.checkpoint_curvature import curvature_of_checkpoint
from lit_merge.cli.json_output import JsonResult, add_json, json_result
from lit_merge.cli.parsing import add_switch, instantiate, parse
from lit_merge.cli.training import make_trainer, quiet, training_parser
from lit_merge.curvature.quality import in_words
from lit_merge.expert.info import read_info

TRAINER = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
"""The command's own defaults for the Trainer: it leaves nothing behind but the expert folder."""

_TOLD = ("task", "estimator", "labels", "num_examples", "fingerprint")

_APART: frozenset[str | int] = frozenset(
    {"trainer", "module", "datamodule", "checkpoint", "output", "seed", "replace"}
)


def curvature_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = training_parser("curvature", "Measure a checkpoint's curvature.", defaults=TRAINER)
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)
    parser.add_argument("--checkpoint", type=str, required=True, help="The weights to measure.")
    parser.add_argument("--output", type=str, required=True, help="The expert folder to write.")
    parser.add_function_arguments(curvature_of_checkpoint, skip=set(_APART))
    add_switch(parser, "replace", "Replace an existing output, or the curvature in it.")
    add_json(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge curvature``.

    Raises:
        InputError: As :func:`lit_merge.checkpoint_curvature.curvature_of_checkpoint`, and for a
            configuration that does not fit.
    """
    quiet()
    parser = curvature_parser()
    options = instantiate(parser, parse(parser, argv))
    with json_result("curvature", asked=options.json) as result:
        _measure(options, result)
    return 0


def _measure(options: Namespace, result: JsonResult) -> None:
    trainer = make_trainer(options)
    settings = {
        name: options[name]
        for name in (
            *("checkpoint", "output", "base", "weights", "estimator", "labels", "samples"),
            *("reduction", "max_examples", "parameters", "gram", "kronecker", "sites"),
            *("max_activation_examples", "batch_size"),
            *("task", "save_every", "replace"),
        )
    }
    path = curvature_of_checkpoint(
        trainer, options.model, options.get("data"), seed=options.seed_everything, **settings
    )
    if not trainer.is_global_zero:
        return
    info = read_info(path / "expert.json")
    quality = info.details.get("curvature", {}).get("quality")
    if options["estimator"] == "none":
        quality = None
    if result.asked:
        told = {name: getattr(info, name) for name in _TOLD}
        result.show({**told, "quality": quality}, output=path)
        return
    print(f"expert: {path}")
    if quality is not None:
        print(f"curvature: {in_words(quality)}")
