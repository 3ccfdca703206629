"""What lies around a path: the leftovers of runs that were stopped."""

from __future__ import annotations

import re
from pathlib import Path

# Beside an output, as lit_merge.output and lit_merge.streaming.unfinished name them.
_ASIDE = re.compile(r"\.(?P<name>.+)\.(?P<what>partial|replaced|unfinished)-[0-9a-f-]+")
_TEXTS = {
    "partial": "was written by a run that was killed; nothing reads it. Remove it",
    "replaced": "is what was there before a replacement that was killed. Look at it, then remove "
    "it or put it back",
    "unfinished": "is a merge that was stopped; the same command goes on with it. Else remove it",
}


def leftovers(path: Path) -> tuple[str, ...]:
    """Return a warning for everything in and beside a path that a stopped run has left.

    Args:
        path: A local file or folder; in a folder, one level is looked at.
    """
    found = []
    folders = [path.parent, path] if path.is_dir() else [path.parent]
    for folder in folders:
        for entry in sorted(folder.iterdir()):
            match = _ASIDE.fullmatch(entry.name)
            if match is not None and (folder == path or match["name"] == path.name):
                found.append(f"{entry}: {_TEXTS[match['what']]}.")
    passed = path.with_name(f"{path.name}.partial")
    if passed.is_dir():
        found.append(
            f'{passed}: is a "lit-merge curvature" pass that was stopped; the same command goes on '
            "with it. Else remove it."
        )
    return tuple(found)
