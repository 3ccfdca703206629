"""Whatever bytes a file has: it is refused with our error, or read as the library reads it."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lit_merge.checkpoint.safetensors_file import DTYPES, SafetensorsFile, read_header
from lit_merge.errors import InputError

# Written without torch's own table, so that a wrong size there would show.
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
MANY = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
}


class Raw(str):
    """Text that goes into the header as it is."""


SPECIAL: list[Any] = [
    *(0, 1, -1, 4, 8, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30),
    *(0.0, 1.0, 4.0, 1e308, math.nan, math.inf, -math.inf, True, False, None),
    *("", "F32", "F4", "f32", "I128", "a", "\0", "\ud800", "é" * 300, "__metadata__"),
    *([], [[]], {}, [0, 0], [0, 4], [4, 0], [0, 2**63], [2**62, 2**62], [2**62, 2**62, 0]),
    *([0, 2**62, 2**62], [1] * 70, [-4, 0], [0, 4, 4], [True], ["4"], [None], [0], [4.0]),
    *map(Raw, ("-0", "[-0]", "01", "1e2", "0x4", "9" * 5000, "[" * 200, "[" * 20_000, "nul")),
    *map(Raw, ('"\\ud800"', '"\\uZZZZ"', '"a', "'a'", "[0,]", "/**/1", '{"a":1,"a":1}', "")),
]
HOLLOW: list[Any] = [
    *([0] * 70, [0, 2**62, 2**62], [2**62, 2**62, 0], [2**63 - 1, 0], [2**61, 0], [2**64, 0]),
    *map(Raw, ("[-0]", "[0, -0]", "[0.0]", "[0e0]", "[00]", "[" + "9" * 17 + "," * 60 + "0]")),
]
FAULTS = ["value", "entry", "name", "twice", "drop", "add", "shift", "hollow"]
junk = st.sampled_from(SPECIAL) | st.lists(st.sampled_from(SPECIAL[:14]), max_size=3)
names = st.sampled_from(["a", "b", "a.b", "", "\0", "../x", "\U0001f4a9"]) | st.text(max_size=5)
bad_names = names | st.sampled_from(["__metadata__", "\ud800", "\udcff"])


def is_object(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], tuple)


def dumps(value: Any) -> str:
    """Return JSON in which pairs (a list of tuples) may repeat names and Raw stands as it is."""
    if isinstance(value, Raw):
        return str(value)
    if is_object(value):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in value) + "}"
    return json.dumps(value, ensure_ascii=False)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[tuple[str, Any]], int]:
    """Return the fields of a well-formed header and the number of bytes of its data."""
    tensors = draw(
        st.lists(
            st.tuples(
                names,
                st.sampled_from(sorted(SIZES)),
                st.lists(st.integers(0, 3), max_size=3),
            ),
            min_size=1,
            max_size=4,
            unique_by=lambda tensor: tensor[0],
        )
    )
    end = 0
    fields: list[tuple[str, Any]] = []
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        entry = [("dtype", dtype), ("shape", shape), ("data_offsets", [start, end])]
        fields.append((name, entry))
    if draw(st.booleans()):
        fields = fields[::-1]  # the order of the header need not be that of the data
    if draw(st.booleans()):
        fields.append(("__metadata__", {"format": "pt", "": "x"}))
    return fields, end


def whole(fields: list[tuple[str, Any]], data: int) -> bytes:
    text = dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + bytes(i % 251 for i in range(data))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return a well-formed file with one to three faults: in the fields, the text or the sizes."""
    fields, data = draw(layouts())
    for _ in range(draw(st.integers(0, 2))):
        index = draw(st.integers(0, len(fields) - 1))
        name, entry = fields[index]
        what = draw(st.sampled_from(FAULTS))
        if what == "entry" or not is_object(entry):
            entry = draw(junk)
        elif what == "name":
            name = draw(bad_names)
        elif what == "twice":
            fields.append((draw(st.sampled_from([name, "b"])), entry))
        elif what == "add":
            entry = [*entry, (draw(st.sampled_from(["dtype", "x"])), draw(junk))]
        elif what == "hollow" and "0" in dumps(entry[1:2]):
            entry = [entry[0], ("shape", draw(st.sampled_from(HOLLOW))), *entry[2:]]
        elif what == "shift" and len(entry) == 3:
            by = draw(st.sampled_from([-8, -4, -1, 1, 4, 2**40]))
            which = draw(st.sampled_from([(1, 1), (0, 1), (1, 0)]))
            offsets = entry[2][1] if isinstance(entry[2][1], list) else []
            moved = [
                o + by * w if type(o) is int else o
                for o, w in zip(offsets[:2], which[: len(offsets)], strict=True)
            ]
            entry = [*entry[:2], ("data_offsets", moved)]
        else:
            at = draw(st.integers(0, len(entry) - 1))
            changed = [] if what == "drop" else [(entry[at][0], draw(junk))]
            entry = [*entry[:at], *changed, *entry[at + 1 :]]
        fields[index] = (name, entry)
    text = dumps(fields).encode("utf-8", "surrogatepass")
    kind = draw(st.sampled_from(["", "", "", "pad", "encoding", "cut", "bytes"]))
    if kind == "pad":
        text = draw(st.sampled_from([b" ", b"\n\t", b"\xef\xbb\xbf", b"\0", b"\xa0"])) + text
        text += draw(st.sampled_from([b"", b"   ", b"\0\0", b"{}", b","]))
    elif kind == "encoding":
        name = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-7", "utf-8-sig"]))
        text = text.decode("utf-8", "surrogatepass").encode(name, "replace")
    elif kind == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif kind == "bytes" and text:
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(text) - 1))
            text = text[:at] + draw(st.sampled_from(BYTES)) + text[at + 1 :]
    length = len(text)
    tail = 0
    if draw(st.integers(0, 5)) == 0:
        length = draw(
            st.sampled_from([length - 1, length + 1, length + data, 0, 1, 10**8, 2**63, 2**64 - 1])
        )
        tail = draw(st.sampled_from([0, 0, -1, 1, 8]))
    size = max(0, min(data + tail, 1000))
    whole = (length % 2**64).to_bytes(8, "little") + text + bytes(i % 251 for i in range(size))
    return whole[: draw(st.integers(0, len(whole)))] if kind == "cut" else whole


BYTES = [bytes([b]) for b in b'0123456789-+.eE[]{}",:\\ntf \0\x1f\x7f\x80\xc3\xed\xff'] + [b""]
prefixed = st.builds(
    lambda length, text: length.to_bytes(8, "little") + text,
    st.integers(0, 40)
    | st.sampled_from([10**8, 10**8 + 1, 2**63 - 1, 2**63, 2**64 - 9, 2**64 - 1]),
    st.binary(max_size=40) | st.text('0123456789[]{}",:', max_size=40).map(str.encode),
)
anything = damaged() | damaged() | damaged() | damaged() | st.binary(max_size=60) | prefixed


@pytest.fixture(scope="module")
def file() -> Iterator[tuple[Path, int]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.safetensors"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        yield path, descriptor
        os.close(descriptor)


def read(file: tuple[Path, int], content: bytes) -> bool:
    """Read bytes as a file; return whether it was accepted, as by the library."""
    path, descriptor = file
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    try:
        header = read_header(descriptor, path)
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{path}: ")
        assert " must " in message
        assert len(message) < 1500
        message.encode()  # can be printed
        return False
    entries = dict(safetensors.deserialize(content))
    assert header.infos.keys() == entries.keys()
    for name, entry in entries.items():
        info, start = header.infos[name], header.offsets[name]
        assert info.dtype == DTYPES[entry["dtype"]]
        assert list(info.shape) == entry["shape"]
        assert content[start : start + info.nbytes] == bytes(entry["data"])
    with safe_open(str(path), framework="pt") as library:
        assert header.metadata == (library.metadata() or {})
    with SafetensorsFile(path) as opened:
        for name in opened:
            value = opened.tensor(name)
            assert value.reshape(-1).view(torch.uint8).numpy().tobytes() == bytes(
                entries[name]["data"]
            )
    return True


@settings(max_examples=300, **MANY)
@given(layout=layouts())
def test_every_well_formed_file_is_read_as_the_library_reads_it(
    file: tuple[Path, int], layout: tuple[list[tuple[str, Any]], int]
) -> None:
    assert read(file, whole(*layout))


def of_shape(shape: str) -> bytes:
    fields = [("a", [("dtype", "F32"), ("shape", Raw(shape)), ("data_offsets", [0, 0])])]
    return whole(fields, 0)


@settings(max_examples=1000, **MANY)
@given(content=anything)
@example(content=of_shape("[-0]"))  # an integer for Python, a float for others
@example(content=of_shape("[4611686018427387904, 4, 0]"))  # empty, but 2**66 bytes on the way
@example(content=of_shape("[" + "4611686018427387904, " * 100_000 + "0]"))  # long to multiply
@example(content=of_shape("[" * 100_000))
@example(content=of_shape("[false]"))  # equal to 0 for Python
@example(content=of_shape("[-1, 0]"))
@example(content=of_shape("[0, 9223372036854775808]"))
@example(content=of_shape("[0]") + b"x")
def test_other_bytes_are_refused_or_read_as_the_library_reads_them(
    file: tuple[Path, int], content: bytes
) -> None:
    read(file, content)


@pytest.mark.slow
@settings(max_examples=100_000, **MANY)
@given(content=anything)
def test_a_hundred_thousand_files_bring_out_no_other_error(
    file: tuple[Path, int], content: bytes
) -> None:
    read(file, content)
