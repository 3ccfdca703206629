"""Tables for the terminal: an evaluation, a merge, a forecast, an inspected folder.

The same numbers as in the report, small enough for 80 columns and a handful of tasks.
"""

from __future__ import annotations

from lit_merge.terminal.evaluation import evaluation_table, print_evaluation
from lit_merge.terminal.forecast import print_forecast
from lit_merge.terminal.inspection import print_inspection, print_warnings
from lit_merge.terminal.merging import print_merge, print_plan
from lit_merge.terminal.text import MISSING, accuracy_text, percent, perplexity_text, size

__all__ = [
    "MISSING",
    "accuracy_text",
    "evaluation_table",
    "percent",
    "perplexity_text",
    "print_evaluation",
    "print_forecast",
    "print_inspection",
    "print_merge",
    "print_plan",
    "print_warnings",
    "size",
]
