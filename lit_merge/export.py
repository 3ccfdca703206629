"""One task's model out of a merged folder, as a plain checkpoint that needs nothing of lit-merge.

The folder that is written holds ``model.safetensors`` (shards with an index where it is large) or
``model.ckpt``, what a Hugging Face folder has beside its weights, and ``export.json``:

================= ==================================================================================
format_version    1
created           when, in UTC (ISO 8601)
task              its name
merged            path, fingerprint of the shared weights, and method of the merge
base              path and fingerprint of what masks were applied to; null without masks
mask              scale, and the share of the masked weights that the task uses; null without masks
expert            path and fingerprint of the task's expert, as the merge recorded them, or null
head              names of the tensors of the task's own
names, config     whose names the tensors have, and whose configuration was taken: "expert" or
                  "merged"
format, dtype     as given
fingerprint       of the weights
notes             texts
versions          of lit_merge, torch and lightning
================= ==================================================================================
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lit_merge.checkpoint import (
    Checkpoint,
    RenamedCheckpoint,
    aligned,
    alignment,
    fingerprint,
    open_checkpoint,
)
from lit_merge.checkpoint.bit_masks import share_of_ones
from lit_merge.checkpoint.lightning_writer import write_lightning_checkpoint
from lit_merge.errors import InputError
from lit_merge.expert import open_expert
from lit_merge.expert.info import current_versions
from lit_merge.location import locate
from lit_merge.merged.task_config import num_classes_of, with_classes
from lit_merge.merged.task_model import TaskModel, TaskModels, open_task_models
from lit_merge.output import new_folder
from lit_merge.strict_json import parse_json
from lit_merge.streaming.pieces import chunks
from lit_merge.streaming.progress import merge_progress
from lit_merge.streaming.provenance import copy_companions, write_record
from lit_merge.streaming.request import dtype_of
from lit_merge.streaming.shards import ShardedWriter, shards_of, write_index

FORMAT_VERSION = 1

ExportFormat = Literal["safetensors", "lightning"]

_RECORD = "export.json"
_CONFIG = "config.json"
