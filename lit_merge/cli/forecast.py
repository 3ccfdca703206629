"""``lit-merge forecast``: :func:`lit_merge.forecast.forecast_merge` with its arguments from YAML.

It takes the YAML of ``lit-merge merge`` as it is. What there concerns the writing is accepted and
left alone, the merge's output folder among it.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lit_merge.cli.json_output import add_json, json_result
from lit_merge.cli.parsing import (
    add_switch,
    command_parser,
    instantiate,
    is_first_process,
    parse,
)
from lit_merge.errors import InputError
from lit_merge.forecast import forecast_merge
from lit_merge.output import new_file, require_free_file
from lit_merge.report.forecast_plot import write_forecast_plot
from lit_merge.streaming import merge
from lit_merge.streaming.overrides import with_setting
from lit_merge.terminal import print_forecast

_OWN = {"base", "experts", "base_hessian"}
_SEVERAL = ("outputs", "sweep")  # what makes several merges of one
_PROGRAM = {"output", "plot", "replace", "json"}


def forecast_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser("forecast", "Forecast what a merge will cost each task, without data.")
    parser.add_argument("--base", type=str | None, help="What the experts were fine-tuned from.")
    parser.add_argument(
        "--experts",
        type=dict[str, str] | list[str],
        required=True,
        help="Expert folders or checkpoints by task name, or a list of them.",
    )
    parser.add_argument(
        "--base_hessian", type=str | None, help="The base's own Hessian: a file or folder."
    )
    parser.add_function_arguments(forecast_merge, skip={*_OWN, "progress"})
    parser.add_argument(
        "--output",
        type=str | None,
        help="The .json file to write. Anything else is taken for a merge's folder and left alone.",
    )
    parser.add_argument("--plot", type=str | None, help="The picture to write: .png, .svg or .pdf.")
    add_switch(parser, "replace", "Replace existing outputs.")
    add_json(parser)
    for name in (*_of_the_merge_only(), *_SEVERAL):
        parser.add_argument(f"--{name}", type=Any, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge forecast``.

    Raises:
        InputError: As :func:`lit_merge.forecast.forecast_merge`, for a configuration that does not
            fit it, and for an output that is there already.
    """
    parser = forecast_parser()
    options = instantiate(parser, parse(parser, argv))
    if not is_first_process():
        return 0
    for name in _SEVERAL:
        if options[name] is not None:
            raise InputError(
                f"{name}: must be left out of a forecast, which is of one method; got "
                f"{options[name]!r}. Give the method to forecast, and --{name} null."
            )
    output, plot = options.output, options.plot
    if output is not None and Path(output).suffix != ".json":
        output = None
    for path in (output, plot):
        if path is not None:
            require_free_file(path, replace=options.replace)
    if options.scale not in (None, "auto"):  # the best one is found in any case
        options.method = with_setting(options.method, "scale", options.scale, "scale")
    arguments = inspect.signature(forecast_merge).parameters
    with json_result("forecast", asked=options.json) as result:
        forecast = forecast_merge(
            **{key: value for key, value in options.as_dict().items() if key in arguments}
        )
        content = json.dumps(forecast.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        if output is not None:
            with new_file(output, replace=options.replace) as partial:
                partial.write_text(content + "\n", encoding="utf-8")
        if plot is not None:
            write_forecast_plot(plot, forecast, replace=options.replace)
        if result.asked:
            result.show({**forecast.as_dict(), "plot": plot}, output=output)
            return 0
    print_forecast(forecast)
    for called, path in (("forecast", output), ("plot", plot)):
        if path is not None:
            print(f"{called}: {path}")
    return 0


def _of_the_merge_only() -> list[str]:
    """Return the options of a merge that do not concern its forecast."""
    known = {*inspect.signature(forecast_merge).parameters, *_PROGRAM}
    return [name for name in inspect.signature(merge).parameters if name not in known]
