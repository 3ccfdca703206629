"""``lit-merge inspect``: what files and folders hold, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_merge.cli.json_output import add_json, json_result
from lit_merge.cli.parsing import add_switch, command_parser, parse
from lit_merge.streaming.progress import MergeProgress, merge_progress


def main(argv: Sequence[str]) -> int:
    """Run ``lit-merge inspect``.

    Raises:
        InputError: If a path does not exist or holds nothing that lit-merge knows.
    """
    parser = command_parser("inspect", "Say what paths hold, and what is wrong with it.")
    parser.add_argument("paths", nargs="+", type=str, help="Files and folders of any kind.")
    add_switch(parser, "tensors", "List every tensor.")
    add_switch(parser, "headers", "Read no weights, so that NaN in them is not found.")
    add_json(parser)
    options = parse(parser, argv)

    from lit_merge.inspection import compare, inspect_path
    from lit_merge.terminal import print_inspection, print_warnings

    with json_result("inspect", asked=options.json) as result:
        with merge_progress(shown=True) as progress:
            inspections = [
                inspect_path(path, advance=_bar(progress, path), values=not options.headers)
                for path in options.paths
            ]
        compared = compare(inspections)
        if result.asked:
            contents = [inspection.as_dict() for inspection in inspections]
            if not options.tensors:
                for content in contents:
                    del content["tensors"]
            result.show(_content(contents, compared))
            return 0
        for inspection in inspections:
            print_inspection(inspection, tensors=options.tensors)
        print_warnings(compared)
    return 0


def _content(contents: Sequence[dict[str, Any]], compared: Sequence[str]) -> dict[str, Any]:
    """Return what is printed as JSON: of one path itself, of several a list."""
    if len(contents) == 1:
        return contents[0]
    every = [text for content in contents for text in content["warnings"]]
    return {"paths": contents, "warnings": [*every, *compared]}


def _bar(progress: MergeProgress, path: str) -> Callable[[int, int], None]:
    """Return what draws how much of a path has been read; it begins with the first bytes."""
    seen = 0
    advance: Callable[[int], None] | None = None

    def show(done: int, total: int) -> None:
        nonlocal seen, advance
        if advance is None:
            advance = progress.start(f"Reading {path}", total)
        advance(done - seen)
        seen = done

    return show
