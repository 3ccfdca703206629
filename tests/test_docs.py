"""The documentation: its code runs, its messages are ours, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", *ROOT.glob("examples/*/README.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def test_code_of_the_page_on_extending_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(blocks(DOCS / "extending.md", "python"))
    # Dataclasses look their module up.
    import sys
    import types

    page = types.ModuleType("extending_page")
    monkeypatch.setitem(sys.modules, "extending_page", page)
    exec(compile(code, "docs/extending.md", "exec"), page.__dict__)
    assert {"Median", "LastStepsFisher", "Shift"} <= set(page.__dict__)


def test_classes_to_add_are_of_thirty_lines() -> None:
    code = "\n".join(blocks(DOCS / "extending.md", "python"))
    classes = re.findall(r"^class .*?(?=^\S|\Z)", code, re.MULTILINE | re.DOTALL)
    assert len(classes) == 3
    assert max(len(text.strip().splitlines()) for text in classes) <= 30


def test_messages_that_are_explained_are_messages_of_ours() -> None:
    files = [
        path for folder in ("lit_merge", "callbacks") for path in (ROOT / folder).rglob("*.py")
    ]
    # A text that goes on in the next line of code is one text.
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in files)
    page = (DOCS / "troubleshooting.md").read_text()
    explained = re.findall(r"\*\*`([^`]+)`\*\*", page)
    assert len(explained) > 12
    assert [text for text in explained if text not in code] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_files_lead_to_files(path: Path) -> None:
    generated = {"configuration.md", "configs.md", "examples.md", "results.md", "changelog.md"}
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if re.match(r"\w+:", link) or Path(link).name in generated or "api/" in link:
            continue
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_on_the_pages_is_yaml(path: Path) -> None:
    for text in blocks(path, "yaml"):
        assert yaml.safe_load(text.replace("{…}", "{}")) is not None


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_configurations_and_commands_that_pages_name_exist(path: Path) -> None:
    from lit_merge.cli.commands import COMMANDS

    text = path.read_text()
    for name in re.findall(r"configs/[\w]+\.yaml", text):
        assert (ROOT / name).is_file(), f"{path.name} names {name}"
    commands = {command.name for command in COMMANDS}
    code = "\n".join(blocks(path, "bash") + re.findall(r"`[^`\n]+`", text))
    named = re.findall(r"(?:^|`)lit-merge ([a-z]+)\b", code, re.MULTILINE)
    assert set(named) <= commands
