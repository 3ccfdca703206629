"""What mkdocs makes of the sources: configuration keys, configurations, examples, results.

A hook of mkdocs (``hooks:`` in mkdocs.yml). These pages are made at every build, so that they
cannot say anything else than the code. Links of the pages to files beside ``docs`` work on GitHub
as they are, and are led to the generated pages here.
"""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
API = {
    "merging": (
        "Merging",
        "merge merge_state_dicts MergeResult ParametersPolicy forecast_merge Forecast align.align",
    ),
    "methods": ("Merge methods", "methods.*"),
    "callbacks": ("Callbacks", "callbacks.*"),
    "curvature": ("Curvature", "curvature_of_checkpoint curvature.*"),
    "correction": ("Correction", "MergeModule LeastSquares correction.*"),
    "tasks": ("Tasks and modules", "tasks.*"),
    "evaluation": (
        "Evaluation and report",
        "evaluate Evaluation EvaluationRow ModelEntry read_evaluation write_evaluation "
        "write_report",
    ),
    "files": (
        "Files",
        "open_expert write_expert Expert ExpertInfo inspect_path Inspection read_merge_record "
        "MergeRecord export_task export_multi_task",
    ),
}
"""What stands on the pages of the API: titles and names, ``package.*`` for all that it exports."""
_LINK = re.compile(r"\]\((?P<path>[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the plots."""
    pages = {
        "configuration.md": configuration_page(),
        "configs.md": configs_page(),
        "examples.md": examples_page(),
        "results.md": (ROOT / "benchmarks/RESULTS.md").read_text(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(),
    }
    pages |= {f"api/{name}.md": api_page(*entry) for name, entry in API.items()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    for picture in sorted((ROOT / "benchmarks/plots").glob("*.svg")):
        files.append(File.generated(config, f"plots/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to files outside of ``docs`` to the pages that were made of them."""
    up = "../" * page.file.src_uri.count("/")

    def lead(found: re.Match[str]) -> str:
        path, anchor = found["path"], found["anchor"] or ""
        inside = re.sub(r"^(\.\./)+", "", path)
        if inside.startswith("configs/") and inside.endswith(".yaml"):
            return f"]({up}configs.md#{_anchor(inside)})"
        if inside in {"benchmarks/RESULTS.md", "RESULTS.md"}:
            return f"]({up}results.md{anchor})"
        if inside == "CHANGELOG.md":
            return f"]({up}changelog.md)"
        if picture := re.fullmatch(r"(?:benchmarks/)?plots/(.*\.svg)", inside):
            return f"]({up}plots/{picture[1]})"
        if example := re.match(r"examples/(\w+)", inside):
            return f"]({up}examples.md#{example[1]})"
        if inside.startswith("docs/"):
            return f"]({up}{inside.removeprefix('docs/')}{anchor})"
        return found[0]

    # Sources are no pages: what links to one names it.
    sources = re.sub(r"\[[^]]*\]\(([\w/.]+\.(?:py|sh))\)", r"`\1`", markdown)
    return _LINK.sub(lead, sources)


def configs_page() -> str:
    """Return every file of ``configs``, whole."""
    parts = ["# Configurations\n\nThe files of `configs/`, as they are.\n"]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        name = f"configs/{path.name}"
        parts.append(f"## {name} {{#{_anchor(name)}}}\n\n```yaml\n{path.read_text()}```\n")
    return "\n".join(parts)


def examples_page() -> str:
    """Return the README of every example, one below the other."""
    parts = ["# Examples\n\nEach is run by one command from a clone.\n"]
    for path in sorted((ROOT / "examples").glob("*/README.md")):
        title, _, text = path.read_text().partition("\n")
        deeper = re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE)
        here = rf"](examples/{path.parent.name}/\1)"
        deeper = re.sub(r"\]\((\w+\.(?:py|sh))\)", here, deeper)
        deeper = re.sub(r"\]\(\.\./(\w+)/README\.md", r"](examples/\1/README.md", deeper)
        parts.append(f"## {title.lstrip('# ')} {{#{path.parent.name}}}\n{deeper}")
    return "\n".join(parts)


def api_page(title: str, names: str) -> str:
    """Return a page that asks mkdocstrings for the docstrings of some names."""
    found = [public for name in names.split() for public in _public(name)]
    homes = dict.fromkeys(f"{thing.__module__}.{thing.__qualname__}" for thing in found)
    return f"# {title}\n\n" + "\n".join(f"::: {home}\n" for home in homes)


def _public(name: str) -> Iterator[Any]:
    package, _, last = f"lit_merge.{name}".rpartition(".")
    module = importlib.import_module(package)
    for one in module.__all__ if last == "*" else [last]:
        thing = getattr(module, one)
        if hasattr(thing, "__qualname__"):  # no constants and types
            yield thing


def configuration_page() -> str:
    """Return every option of every command, and every argument of the classes that they take."""
    parts = [
        "# Configuration keys\n\nEvery key of every command's YAML; on the command line the same "
        "with `--` and dots. `--print_config` prints a file with the defaults. Below `trainer` "
        "stand the arguments of Lightning's `Trainer`.\n\n## Commands\n"
    ]
    for name, parser in _parsers():
        parts.append(f"### lit-merge {name}\n\n{_table(_options(parser()))}")
    for title, classes in _classes().items():
        parts.append(f"## {title}\n")
        parts += [f"### {kind.__name__}\n\n{_table(_arguments(kind))}" for kind in classes]
    return "\n".join(parts)


def _parsers() -> Iterator[tuple[str, Callable[[], Any]]]:
    from lit_merge.cli.align import align_parser
    from lit_merge.cli.correct import correct_parser
    from lit_merge.cli.curvature import curvature_parser
    from lit_merge.cli.evaluate import evaluate_parser
    from lit_merge.cli.export import export_parser
    from lit_merge.cli.forecast import forecast_parser
    from lit_merge.cli.merge import merge_parser
    from lit_merge.cli.run import run_parser

    yield "curvature", curvature_parser
    yield "align", align_parser
    yield "merge", merge_parser
    yield "forecast", forecast_parser
    yield "correct", correct_parser
    yield "evaluate", evaluate_parser
    yield "export", export_parser
    yield "run", run_parser


def _classes() -> dict[str, list[type]]:
    import lit_merge
    from lit_merge import callbacks, methods, tasks
    from lit_merge.alignment.settings import AlignSettings
    from lit_merge.evaluation.model_entry import ModelEntry
    from lit_merge.tasks.digits import DigitsTask

    def of(package: Any, names: list[str]) -> list[type]:
        return [
            getattr(package, name) for name in names if isinstance(getattr(package, name), type)
        ]

    not_chosen = {"MergeMethod", "ParameterSlice"}
    return {
        "Methods": of(methods, [n for n in methods.__all__ if n not in not_chosen]),
        "Callbacks": of(callbacks, list(callbacks.__all__)),
        "Models": of(tasks, ["TransformersClassifier", "TimmClassifier", "TransformersCausalLM"]),
        "Data": [
            *of(tasks, ["TextTask", "ImageTask", "LanguageTask", "TaskDataModule"]),
            DigitsTask,
        ],
        "Settings": [
            lit_merge.ParametersPolicy,
            lit_merge.LeastSquares,
            AlignSettings,
            ModelEntry,
        ],
    }


def _options(parser: Any) -> Iterator[tuple[str, str, str, str]]:
    for action in parser._actions:
        if action.dest in {"help", "config", "print_config"} or action.dest.endswith(".help"):
            continue
        if action.dest.split(".")[0] == "trainer" or action.dest == "help_all":
            continue
        yield action.dest, _type_of(action), _default(action.default), action.help or ""


def _arguments(kind: type) -> Iterator[tuple[str, str, str, str]]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(kind, fail_untyped=False)
    yield from _options(parser)


def _type_of(action: Any) -> str:
    hint = getattr(action, "_typehint", None) or action.type
    if hint is None:
        return "bool" if isinstance(action.default, bool) else "str"
    text = hint.__name__ if isinstance(hint, type) and "[" not in str(hint) else str(hint)
    text = re.sub(r"(typing|collections\.abc|builtins)\.", "", text)
    while optional := re.fullmatch(r"Optional\[(.*)\]", text):
        text = f"{optional[1]} | None"
    if union := re.fullmatch(r"Union\[([^]\[]*(?:\[[^]]*\][^]\[]*)*)\]", text):
        text = " | ".join(re.split(r", (?![^[]*\])", union[1]))
    text = re.sub(r"Literal\[([^]]*)\]", r"\1", text)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text).replace("NoneType", "None")
    return text.replace("<class '", "").replace("'>", "")


def _default(value: Any) -> str:
    if value is None or str(value) in {"==SUPPRESS==", "<UnsetType>", "UNSET"}:
        return ""
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict | list | tuple):
        plain = list(value) if isinstance(value, tuple) else value
        return yaml.safe_dump(plain, default_flow_style=True).strip() if _is_plain(plain) else ""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return shown if len(shown) < 60 and not shown.startswith("<") else ""


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, text in rows:
        cells = (_code(key), _code(kind), _code(default), _plain(text).replace("|", "&#124;"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    # As HTML: of a bar in backticks the table would keep the backslash.
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>" if text else ""


def _plain(text: str) -> str:
    text = re.sub(r"\s*\(required\)|\(type: .*", "", re.sub(r"\s+", " ", text))
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
