"""Reading what ``torch.save`` wrote (.ckpt, .pt, .pth, .bin) without executing anything in it.

``torch.load(weights_only=True)`` unpickles tensors and plain containers only; a file that asks for
any other class or function is refused, with the name of what it asked for; ``argparse.Namespace``,
a container in which timm and others keep their settings, is let through. Files in the zip format
(torch ≥ 1.6) are mapped into memory, so that opening reads no weights; older ones are read whole.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from lit_merge.checkpoint.tensor_source import Checkpoint, StateDict
from lit_merge.errors import InputError

_ZIP = b"PK\x03\x04"
_REFUSED = re.compile(r"(?:GLOBAL|class|function) ([A-Za-z_][\w.]*\.\w+)")
# Where people put the weights beside the rest ("module" is DeepSpeed's).
_NESTED = ("state_dict", "model_state_dict", "model", "module")
# Where timm and those who followed it put the running average of the weights.
_AVERAGED = ("state_dict_ema", "model_ema")


def open_torch_file(path: Path, *, weights: Literal["averaged", "raw"] = "averaged") -> Checkpoint:
    """Open the state dict in a file that ``torch.save`` wrote.

    Taken is ``state_dict`` of a Lightning checkpoint (``current_model_state``, the weights that
    were being trained, for ``weights="raw"`` when an averaging callback has stored both), the state
    dict in a dict with other things beside it (of which ``metadata["key"]`` names the key), or the
    dict itself. Where timm has stored an average beside the weights, ``weights`` says which.

    Raises:
        InputError: If the file is damaged, asks for code, or holds no plain state dict or several.
    """
    content = load_torch_file(path)
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path}: must hold a state dict; got {_kind(content)}. Save the model's state_dict()."
        )
    if "pytorch-lightning_version" in content:
        return _open_lightning(content, path, weights)
    raw, averaged = _holding(content, _NESTED), _holding(content, _AVERAGED)
    for keys in (raw, averaged):
        if len(keys) > 1:
            raise InputError(
                f"{path}: must hold one state dict; got some under "
                f"{' and '.join(map(repr, keys))}. Save the one to merge in a file of its own."
            )
    if not raw and not averaged:
        return StateDict(_without_module(content), path=path, source="torch")
    metadata = {"key": (averaged if averaged and (weights == "averaged" or not raw) else raw)[0]}
    if raw and averaged:
        metadata["weights"] = weights
    state = content[metadata["key"]]
    return StateDict(_without_module(state), path=path, source="torch", metadata=metadata)


def _holding(content: Mapping[str, object], keys: Sequence[str]) -> list[str]:
    """Return the keys under which there are tensors; else the first under which there is a dict."""
    found = [key for key in keys if isinstance(content.get(key), Mapping)]
    filled = [key for key in found if _any_tensor(content[key])]
    return filled or found[:1]


def _any_tensor(state: object) -> bool:
    return isinstance(state, Mapping) and any(isinstance(v, torch.Tensor) for v in state.values())


def _open_lightning(
    content: Mapping[str, object], path: Path, weights: Literal["averaged", "raw"]
) -> Checkpoint:
    metadata = {
        key: str(content[key])
        for key in ("pytorch-lightning_version", "epoch", "global_step")
        if key in content
    }
    key = "state_dict"
    if "current_model_state" in content:
        metadata["weights"] = weights
        key = "current_model_state" if weights == "raw" else key
    state = content.get(key)
    if not isinstance(state, Mapping):
        raise InputError(
            f"{path}: must hold the weights under {key!r}; got {_kind(state)}. "
            "Save it again with trainer.save_checkpoint()."
        )
    return StateDict(_without_module(state), path=path, source="lightning", metadata=metadata)


def _without_module(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a state dict without the ``module.`` that DistributedDataParallel puts before all."""
    prefix = "module."
    if state and all(isinstance(name, str) and name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_torch_file(path: Path) -> Any:
    """Return what ``torch.save`` wrote, tensors mapped into memory.

    Raises:
        InputError: If the file is damaged, or asks for any class or function.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
    except OSError as error:
        raise InputError(
            f"{path}: must be a file that can be read; got {error.strerror}. Check the path."
        ) from error
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about the age of the file; it loads or it raises
            return torch.load(path, map_location="cpu", weights_only=True, mmap=start == _ZIP)
    except Exception as error:  # a damaged pickle can raise anything
        raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> InputError:
    text = str(error)
    if "TorchScript" in text:
        return InputError(
            f"{path}: must hold a state dict; got a TorchScript program. "
            "Save the state_dict() of the model instead."
        )
    asked = _REFUSED.search(text)
    if asked is not None:
        return InputError(
            f"{path}: must hold only tensors and primitives, so that opening it runs no code; got "
            f"{asked.group(1)}. Save hyper-parameters as primitives (str, float, dict), or save "
            "the state dict again as safetensors, on a machine where you trust the file."
        )
    reason = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return InputError(
        f"{path}: must be a whole checkpoint; got one that torch cannot read "
        f"({type(error).__name__}: {reason[:200]}). Copy or save the file again."
    )


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
