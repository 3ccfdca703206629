"""Make a tokenizer from texts, for a small language model that is trained from nothing.

    python examples/language/make_tokenizer.py data/imdb/train.jsonl data/agnews/train.jsonl \
        --size 2000 --output runs/tokenizer

It is a byte-level BPE with one special token, the end of a text, in a folder that
``AutoTokenizer.from_pretrained`` takes. Models from the hub bring their own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

END = "<|endoftext|>"


def texts_in(files: Sequence[Path], column: str) -> Iterator[str]:
    """Yield the texts of some files of one JSON object per line."""
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)[column]


def make_tokenizer(texts: Iterator[str], *, size: int, output: Path) -> None:
    """Learn a byte-level BPE of so many tokens, and write it.

    Args:
        texts: What to learn from.
        size: Number of tokens, at least 257: every byte, and the end of a text.
        output: The folder.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator(
        texts, vocab_size=size, min_frequency=2, special_tokens=[END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learner._tokenizer, eos_token=END)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path, help="jsonl files, one text per line")
    parser.add_argument("--column", default="text", help="where a line has its text")
    parser.add_argument("--size", type=int, default=2000, help="number of tokens")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()
    texts = texts_in(options.files, options.column)
    make_tokenizer(texts, size=options.size, output=options.output)
    print(options.output)


if __name__ == "__main__":
    main()
