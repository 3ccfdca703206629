"""One thread per process: the tests run on machines with few cores, several at a time."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
