"""Recipes: whole experiments as one YAML, a list of ``lit-merge`` commands with variables in them.

:mod:`~lit_merge.recipe.filling` puts variables in and repeats what has ``each``,
:mod:`~lit_merge.recipe.steps` makes the list of commands, and :mod:`~lit_merge.recipe.progress`
keeps which of them are done.
"""

from __future__ import annotations

from lit_merge.recipe.filling import fill
from lit_merge.recipe.progress import RunFolder
from lit_merge.recipe.steps import Step, plan

__all__ = ["RunFolder", "Step", "fill", "plan"]
