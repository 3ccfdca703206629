"""``lit-merge demo``: the whole way on real handwritten digits, in minutes and without downloads.

The demo is a recipe, ``demo.yaml`` beside this file, run as ``lit-merge run`` runs any: each step
is an ordinary ``lit-merge`` command with a YAML file of its own, which can be read, changed and run
again by hand.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from lit_merge.errors import InputError
from lit_merge.recipe.progress import is_run_folder

RECIPE: dict[str, Any] = yaml.safe_load(
    resources.files("lit_merge").joinpath("demo.yaml").read_text(encoding="utf-8")
)
"""Variables and steps."""


def _prepare(run: Path, *, replace: bool) -> None:
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        if not replace:
            raise InputError(
                f"{run}: must be a new or empty folder; got one with files. "
                "Give another --output, or --replace to do the demo again."
            )
        if not is_run_folder(run):
            raise InputError(
                f"{run}: --replace takes only the folder of an earlier demo; got another. "
                "Give another --output."
            )
        shutil.rmtree(run)


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge demo``.

    Returns:
        The exit status: that of the first step that fails, or 0.

    Raises:
        InputError: If the output folder is in use.
    """
    parser = argparse.ArgumentParser(
        prog="lit-merge demo",
        description="Train, merge, correct, evaluate and report on real digits, without downloads.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write")
    parser.add_argument("--replace", action="store_true", help="replace an earlier demo's folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of every training")
    parser.add_argument("--steps", type=int, default=150, help="steps of the learned correction")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(list(argv))
    _prepare(options.output, replace=options.replace)

    from lit_merge.cli.json_output import json_result
    from lit_merge.cli.run import run_recipe

    given = {"output": str(options.output), "seed": options.seed, "steps": options.steps}
    with json_result("demo", asked=options.json) as result:
        ran = run_recipe(RECIPE["steps"], {**RECIPE["variables"], **given})
        if result.asked:
            ran.show(result)
        elif ran.status == 0:
            print(f"Open {options.output / 'report.html'}")
    return ran.status
