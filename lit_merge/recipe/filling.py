"""Variables in a tree of YAML: ``${name}`` is filled in, and what has ``each`` is repeated.

A string that is exactly ``${name}`` becomes the variable's value with its type; inside a longer
string the value is put in as text. Variables may use others, and are filled in where they are
used: ``${data}/${task}`` as the value of a variable takes the ``task`` of the place. A dot looks
into a mapping, ``${hub.imdb}``, and the innermost goes first, ``${hub.${task}}``. ``$${`` stands
for ``${`` itself.

An entry of a mapping or a list whose value is a mapping with ``each`` is repeated, once for every
value of the variables that ``each`` names; several lists go side by side. The rest of that mapping
is the value, or its ``value`` where it is to be something else than a mapping. A mapping with
``with`` has the entries of that mapping, and its own in their place.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lit_merge.errors import InputError

Scope = Mapping[str, Any]
"""Variables by name, not filled in yet."""

EACH = "each"
VALUE = "value"
WITH = "with"
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_ESCAPED = "\0{"  # NUL cannot stand in YAML
_DEPTH = 50  # of variables within variables


def fill(tree: Any, scope: Scope) -> Any:
    """Return a tree of YAML with its variables filled in and its repetitions made.

    Args:
        tree: Mappings, lists and scalars.
        scope: The variables.

    Raises:
        InputError: If a variable is not known, refers to itself, or is no text where text is
            needed; or a repetition is not as it should be.

    >>> fill({"${t}": {"each": {"t": "${tasks}"}, "value": "runs/${t}"}}, {"tasks": ["a", "b"]})
    {'a': 'runs/a', 'b': 'runs/b'}
    """
    return _fill(tree, scope, 0)


def repeat(block: Mapping[str, Any], scope: Scope) -> Iterator[Scope]:
    """Yield the variables of each repetition of a mapping: one, unless it has ``each``.

    Raises:
        InputError: If ``each`` is no mapping of names to lists of one length.
    """
    if EACH not in block:
        yield scope
        return
    each = _fill(block[EACH], scope, 0)
    if not isinstance(each, dict) or not each:
        raise InputError(
            f"{EACH}: must be a mapping of names to lists; got {each!r}. Write each: {{task: [a, "
            "b]}."
        )
    for name, values in each.items():
        if not isinstance(values, list | dict):
            raise InputError(
                f"{EACH}.{name}: must be a list, or a mapping whose names are taken; got "
                f"{values!r}. Put it in brackets."
            )
    lengths = {name: len(values) for name, values in each.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(
            f"{EACH}: lists side by side must be equally long; got {counts}. Add what is missing."
        )
    for values in zip(*each.values(), strict=True):
        # Filled in already: a value with ${ that was escaped must stay as it is.
        taken = {name: _escape(value) for name, value in zip(each, values, strict=True)}
        yield {**scope, **taken}


def _fill(tree: Any, scope: Scope, depth: int) -> Any:
    if depth > _DEPTH:
        raise InputError(
            f"variables: must not refer to themselves; got one that does, at {tree!r}. Rename one."
        )
    if isinstance(tree, str):
        return _fill_text(tree, scope, depth)
    if isinstance(tree, Mapping):
        return {**_taken_with(tree, scope, depth), **dict(_mapping_entries(tree, scope, depth))}
    if isinstance(tree, list | tuple):
        return [value for entry in tree for value in _list_entries(entry, scope, depth)]
    return tree


def _mapping_entries(
    tree: Mapping[str, Any], scope: Scope, depth: int
) -> Iterator[tuple[str, Any]]:
    seen = set()
    for key, value in tree.items():
        if key == WITH:
            continue
        for own in repeat(value, scope) if _is_repeated(key, value) else [scope]:
            rest = _without_each(value) if _is_repeated(key, value) else value
            name = _fill_text(key, own, depth) if isinstance(key, str) else key
            if name in seen:
                raise InputError(
                    f"{key}: a repetition must give every entry a name of its own; got {name!r} "
                    "twice. Put its variable into the name."
                )
            seen.add(name)
            yield name, _fill(rest, own, depth + 1)


def _taken_with(tree: Mapping[str, Any], scope: Scope, depth: int) -> dict[str, Any]:
    if WITH not in tree:
        return {}
    entries = _fill(tree[WITH], scope, depth + 1)
    if not isinstance(entries, dict):
        raise InputError(
            f"{WITH}: must be a mapping; got {entries!r}. Name a variable that is one."
        )
    return entries


def _list_entries(entry: Any, scope: Scope, depth: int) -> Iterator[Any]:
    if _is_repeated("", entry):
        for own in repeat(entry, scope):
            yield _fill(_without_each(entry), own, depth + 1)
    else:
        yield _fill(entry, scope, depth + 1)


def _is_repeated(key: Any, value: Any) -> bool:
    return key != EACH and isinstance(value, Mapping) and EACH in value


def _without_each(block: Mapping[str, Any]) -> Any:
    rest = {key: value for key, value in block.items() if key != EACH}
    return rest[VALUE] if set(rest) == {VALUE} else rest


def _fill_text(text: str, scope: Scope, depth: int) -> Any:
    text = text.replace("$${", _ESCAPED)
    while found := _INNERMOST.search(text):
        value = _look_up(found[1], scope, depth)
        if found[0] == text:
            return value
        if isinstance(value, dict | list):
            raise InputError(
                f"${{{found[1]}}}: must be a word or a number to be put into a text; got {value!r} "
                f"for {text!r}. Let it stand alone."
            )
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        text = text[: found.start()] + shown.replace("${", _ESCAPED) + text[found.end() :]
    return text.replace(_ESCAPED, "${")


def _look_up(path: str, scope: Scope, depth: int) -> Any:
    name, *inner = path.split(".")
    if name not in scope:
        raise _unknown(path, name, list(scope))
    value = _fill(scope[name], scope, depth + 1)
    for key in inner:
        if not isinstance(value, dict) or key not in value:
            raise _unknown(path, key, list(value) if isinstance(value, dict) else [])
        value = value[key]
    return value


def _unknown(path: str, name: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=1)
    fix = f'Did you mean "{near[0]}"?' if near else "Add it to variables."
    return InputError(f"${{{path}}}: must be one of the variables; got no {name!r} there. {fix}")


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("${", "$${")
    if isinstance(value, dict):
        return {_escape(key): _escape(item) for key, item in value.items()}
    return [_escape(item) for item in value] if isinstance(value, list) else value
