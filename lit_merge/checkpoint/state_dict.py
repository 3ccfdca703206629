"""State dicts against each other: aligning names, loading into a module, telling them apart.

One model is stored as ``blocks.0.weight`` by timm and as ``model.blocks.0.weight`` by a
LightningModule around it. All of lit-merge meets that here: one prefix, found by the names
themselves.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lit_merge.checkpoint.tensor_source import (
    Checkpoint,
    RenamedCheckpoint,
    StateDict,
    TensorInfo,
    unwrapped,
)
from lit_merge.errors import InputError

_BLOCKS = 16
_BLOCK = 64  # elements


def common_prefix(names: Iterable[str], reference: Iterable[str]) -> str:
    """Return the prefix without which most of the names stand in the reference.

    Args:
        names: Names that may carry a prefix.
        reference: Names that may lack it.

    Returns:
        Whole components with their dot, such as "model." or "net.backbone.", or "" for none. Of two
        that fit as many names, the shorter; "" when nothing fits.

    >>> common_prefix(["model.fc.weight", "model.fc.bias", "loss.scale"], ["fc.weight", "fc.bias"])
    'model.'
    """
    return _best_prefix(names, reference)[0]


def _best_prefix(names: Iterable[str], reference: Iterable[str]) -> tuple[str, int]:
    known = set(reference)
    counts: Counter[str] = Counter()
    for name in names:
        start = 0
        while True:
            if name[start:] in known:
                counts[name[:start]] += 1
            dot = name.find(".", start)
            if dot < 0:
                break
            start = dot + 1
    if not counts:
        return "", 0
    prefix = min(counts, key=lambda p: (-counts[p], len(p), p))
    return prefix, counts[prefix]


def alignment(names: Iterable[str], reference: Iterable[str]) -> dict[str, str]:
    """Return the name in the reference for each name, its own where there is none.

    A prefix is removed, added or exchanged for another, whichever brings most names together. A
    name is never changed into one that another name already has.

    >>> alignment(["model.fc.weight", "head.weight"], ["fc.weight"])
    {'model.fc.weight': 'fc.weight', 'head.weight': 'head.weight'}
    """
    own = list(names)
    known = set(reference)
    taken = set(own)
    old, new = _best_exchange(own, known)

    def rename(name: str) -> str:
        renamed = new + name.removeprefix(old)
        fits = name.startswith(old) and renamed in known and renamed not in taken
        return renamed if fits else name

    return {name: rename(name) for name in own}


def _best_exchange(names: Collection[str], reference: Collection[str]) -> tuple[str, str]:
    """Return the prefix of the names and that of the reference that correspond."""
    old, best = _best_prefix(names, reference)
    new = ""
    added, count = _best_prefix(reference, names)
    if count > best:
        old, new, best = "", added, count
    if 2 * best >= min(len(names), len(reference)):
        return old, new
    # Two wrappers, "net.0.weight" and "model.0.weight": try what most of the reference begins with.
    prefixes = Counter(name[: i + 1] for name in reference for i, c in enumerate(name) if c == ".")
    for prefix, size in prefixes.items():
        if 2 * size <= len(reference):
            continue
        inner = (name.removeprefix(prefix) for name in reference if name.startswith(prefix))
        # A bare "weight" would fit any layer.
        found, count = _best_prefix(names, (name for name in inner if "." in name))
        if count > best:
            old, new, best = found, prefix, count
    return old, new


def aligned(checkpoint: Checkpoint, reference: Iterable[str]) -> Checkpoint:
    """Return a view of a checkpoint whose names are those of the reference where they correspond.

    Names without a counterpart stay as they are; see :func:`alignment`.
    """
    names = alignment(checkpoint, reference)
    if all(old == new for old, new in names.items()):
        return checkpoint
    return RenamedCheckpoint(checkpoint, names)


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint | Mapping[str, Tensor],
    *,
    ignore: Collection[str] = (),
    copy: Callable[[Tensor, Tensor], object] = Tensor.copy_,
) -> None:
    """Copy a checkpoint into the parameters and buffers of a module, all of them or none.

    Names are aligned up to a prefix. Tied weights may be stored once; buffers that the module does
    not save may be in the checkpoint and are passed over.

    Args:
        module: The target; its types and devices stay.
        checkpoint: The source.
        ignore: Patterns (``head.*``) of names to leave as they are in the module, whatever the
            checkpoint holds for them.
        copy: Called with each target and what it is to hold; for sharded modules
            :func:`~lit_merge.sharding.copy_into`.

    Raises:
        InputError: Before anything is copied, if names or shapes do not correspond.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else StateDict(checkpoint)
    model = type(module).__name__
    targets = {
        unwrapped(name): value
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    unsaved = {unwrapped(name) for name, _ in module.named_buffers()} - targets.keys()
    prefix = common_prefix(source, targets)
    source = aligned(source, (*targets, *unsaved))

    def wanted(name: str) -> bool:
        own = name.removeprefix(prefix)
        return not any(fnmatchcase(name, p) or fnmatchcase(own, p) for p in ignore)

    given = [name for name in source if wanted(name) and name not in unsaved]
    extra = [name for name in given if name not in targets]
    if extra:
        raise InputError(
            f"{source.file_of(extra[0])}: must hold only tensors of {model}; got {_listed(extra)} "
            "beside them. Take the model that was trained, or ignore these tensors."
        )
    filled: dict[int, str] = {}
    for name in given:
        _require_fit(source, name, targets[name], model)
        first = filled.setdefault(id(targets[name]), name)
        if first != name and not torch.equal(source.tensor(first), source.tensor(name)):
            raise InputError(
                f"{source.file_of(name)}: {first!r} and {name!r} must be equal, since {model} ties "
                "them; got different values. Take a model that was trained with tied weights."
            )
    missing = [n for n, value in targets.items() if id(value) not in filled and wanted(n)]
    if missing:
        raise InputError(
            f"{source.path}: must hold every tensor of {model}; got none for {_listed(missing)}. "
            "Take the model that was trained, or ignore these tensors."
        )
    with torch.no_grad():
        for name in filled.values():
            copy(targets[name], source.tensor(name))


def _require_fit(source: Checkpoint, name: str, target: Tensor, model: str) -> None:
    shape = source.infos[name].shape
    if shape != tuple(target.shape):
        raise InputError(
            f"{source.file_of(name)}: tensor {name!r} must have the shape {list(target.shape)} of "
            f"{model}; got {list(shape)}. Take the model that was trained (the number of classes "
            "or the vocabulary differs), or ignore this tensor."
        )
    if target.is_meta:
        raise InputError(
            f"{model}: must have memory for {name!r}; got a parameter on the meta device. "
            "Call module.to_empty(device=...) first."
        )


def fingerprint(checkpoint: Checkpoint | Mapping[str, Tensor]) -> str:
    """Return 64 hexadecimal digits that tell one set of weights from another.

    A SHA-256 over the sorted names, shapes, types and a sample of the values: 16 evenly spaced
    blocks of 64 elements of every tensor, all of a tensor of up to 1024. It costs kilobytes, not
    the file, and is the same whatever the container, the order, and the prefix that all names
    share.

    Note:
        Any training step changes it. A change confined to elements between the sampled blocks does
        not: it guards against mistakes, not against forgery.
    """
    source = checkpoint if isinstance(checkpoint, Checkpoint) else StateDict(checkpoint)
    known = source.digest()
    if known is not None:
        return known
    shared = _shared_prefix(source)
    digest = hashlib.sha256()
    for name in sorted(source):
        info = source.infos[name]
        digest.update(f"{name[shared:]}\0{list(info.shape)}\0{info.dtype}\0".encode())
        for start, stop in _sampled(info):
            values = source.read(name, start, stop).contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sampled(info: TensorInfo) -> list[tuple[int, int]]:
    """Return the ranges of elements that a fingerprint looks at, the first and last among them."""
    if info.numel <= _BLOCKS * _BLOCK:
        return [(0, info.numel)] if info.numel else []
    last = info.numel - _BLOCK
    return [(i * last // (_BLOCKS - 1), i * last // (_BLOCKS - 1) + _BLOCK) for i in range(_BLOCKS)]


def _shared_prefix(names: Collection[str]) -> int:
    """Return the length of the whole components that all names begin with."""
    parts = [name.split(".")[:-1] for name in names]
    length = 0
    for components in zip(*parts, strict=False):
        if len(set(components)) > 1:
            break
        length += len(components[0]) + 1
    return length


def _listed(names: Collection[str]) -> str:
    first = ", ".join(repr(name) for name in list(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
