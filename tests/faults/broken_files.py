"""Files made bad in their own format's ways: json, safetensors, faiss indexes, arrays, Parquet, a picture's record.

A spoiler takes a random generator, the file's bytes and a number that walks through its parts; it returns other bytes
and what was done to them.
"""

import io
import json
import pickle
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load, save

VALUES: list[Any] = [
    None, True, 0, 1, -1, 0.5, 3, 7, 1e308, -1e308, 2**31, 2**70, float("nan"), float("inf"), "", "x", "x" * 10_000,
    "../../../etc/passwd", "a\nb", "\0", "\ud800", [], {}, [[]], {"a": 1}, [0], ["x"], [1, 2, 3], [None],
]  # fmt: skip
FILES = [
    b"", b"{", b"[]", b"null", b"7", b'"x"', b"\xff\xfe\0", b"\0" * 100, b"{}", b"[" * 50_000, b"\xef\xbb\xbf{}",
    pickle.dumps({"a": 1}), b"9" * 5000,
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every field inside a json value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for name, one in inside for found in [(*path, name), *places(one, (*path, name))]]


def changed(rng: random.Random, value: Any, n: int) -> tuple[Any, str]:
    """A json value with one field missing (each in turn, by n), or of another type or size."""
    found = places(value)
    if not found:
        return rng.choice(VALUES), "another value"
    path = found[n % len(found)]
    inside = value
    for name in path[:-1]:
        inside = inside[name]
    if rng.random() < 0.35:
        del inside[path[-1]]
        return value, f"without {path}"
    inside[path[-1]] = rng.choice(VALUES)
    return value, f"{path} = {str(inside[path[-1]])[:30]!r}"


def bad_json(rng: random.Random, data: bytes, n: int) -> tuple[bytes, str]:
    if rng.random() < 0.12:
        return rng.choice(FILES), "not that json"
    if rng.random() < 0.05:
        return data[: rng.randrange(len(data))], "truncated"
    value, what = changed(rng, json.loads(data), n)
    return json.dumps(value).encode(), what


def bad_tensors(rng: random.Random, data: bytes, n: int) -> tuple[bytes, str]:
    tensors = load(data)
    name = sorted(tensors)[n % len(tensors)]
    whole = tensors[name]
    picked = rng.randrange(13)
    if picked == 0:
        file = io.BytesIO()
        torch.save(tensors, file)
        return file.getvalue(), "a pickle"
    if picked == 1:
        return data[: rng.randrange(len(data))], "truncated"
    if picked == 2:
        length = rng.choice([2**63, 2**64 - 1, 10**9, 0, 7, len(data)])
        return length.to_bytes(8, "little") + data[8:], f"a header of {length} bytes"
    if picked == 3:
        return rng.choice(FILES), "no safetensors"
    if picked == 4:
        del tensors[name]
        return save(tensors), f"without {name}"
    if picked == 5:
        return save({**tensors, "one.more": torch.zeros(3)}), "one tensor more"
    if picked == 6:
        wrong = rng.choice([torch.zeros(0), torch.zeros(*whole.shape, 2), torch.zeros(7), torch.zeros(())])
        return save({**tensors, name: wrong}), f"{name} as {tuple(wrong.shape)}"
    if picked == 7:
        kind = rng.choice([torch.float64, torch.int64, torch.bool, torch.float16, torch.uint8])
        return save({**tensors, name: whole.to(kind)}), f"{name} as {kind}"
    if picked == 8:
        return save({}), "empty"
    if picked == 9:
        head = json.dumps({name: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
        return len(head).to_bytes(8, "little") + head, "a header that lies"
    if picked == 10:
        spoilt = bytearray(data)
        spoilt[-1 - rng.randrange(sum(tensor.nbytes for tensor in tensors.values()))] ^= 1 << rng.randrange(8)
        return bytes(spoilt), "a bit of its tensors"
    odd = rng.choice([float("nan"), float("inf"), 1e38])
    filled = {
        key: torch.full_like(value, odd) if value.is_floating_point() else value for key, value in tensors.items()
    }
    return save(filled if picked == 11 else {**tensors, name: filled[name]}), f"{'all' if picked == 11 else name} {odd}"


def bad_array(rng: random.Random, data: bytes, n: int) -> tuple[bytes, str]:
    rows = np.load(io.BytesIO(data))
    made = [
        rows[:-1], rows[:, :-1] if rows.ndim > 1 else rows[None], np.full_like(rows, -1), rows.astype(np.float64),
        rows * 7, np.asfortranarray(rows), np.array([{"a": 1}], dtype=object), rows.astype(str), rows.astype(complex),
        np.empty((0, 3)), np.array(5.0), np.full(rows.shape, np.nan) if rows.dtype.kind == "f" else rows + 10**9,
    ]  # fmt: skip
    which = rng.randrange(len(made) + 3)
    if which >= len(made):
        return (data[: rng.randrange(len(data))], "truncated") if which > len(made) else (rng.choice(FILES), "no array")
    file = io.BytesIO()
    np.save(file, made[which], allow_pickle=True)
    return file.getvalue(), f"array {which}: {made[which].dtype} {made[which].shape}"


def bad_table(rng: random.Random, data: bytes, n: int) -> tuple[bytes, str]:
    table = pq.read_table(io.BytesIO(data))
    column = table.column_names[n % table.num_columns]
    at, rows = table.column_names.index(column), table.num_rows
    made = {
        "without it": table.remove_column(at), "a row fewer": table.slice(1), "no rows": table.slice(0, 0),
        "nulls": table.set_column(at, column, pa.array([None] * rows, table.column(at).type)),
        "numbers": table.set_column(at, column, pa.array(range(rows))),
        "lists": table.set_column(at, column, pa.array([[1]] * rows)),
        "all equal": table.set_column(at, column, pa.array(["x"] * rows)),
        "bytes": table.set_column(at, column, pa.array([b"\xff"] * rows)),
        "no UTF-8": table.set_column(at, column, pa.array([b"caf\xe9"] * rows, pa.binary()).view(pa.string())),
        "a column twice": table.append_column(column, table.column(at)),
    }  # fmt: skip
    what = rng.choice([*made, "truncated", "flipped", "no Parquet"])
    if what == "truncated":
        return data[: rng.randrange(len(data))], what
    if what == "no Parquet":
        return rng.choice(FILES), what
    if what == "flipped":
        spoilt = bytearray(data)
        spoilt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(spoilt), what
    file = io.BytesIO()
    pq.write_table(made[what], file)
    return file.getvalue(), f"{column}: {what}"


def bad_bytes(rng: random.Random, data: bytes, n: int) -> tuple[bytes, str]:
    """An index of faiss, which hardly looks at what it reads: cut, longer, or with a bit changed in its header or
    anywhere."""
    if rng.random() < 0.25:
        return data[: rng.randrange(len(data))], "truncated"
    if rng.random() < 0.1:
        return rng.choice(FILES), "no index"
    if rng.random() < 0.05:
        return data + b"\0", "a byte longer"
    spoilt = bytearray(data)
    place = rng.randrange(rng.choice([60, len(data)]))
    spoilt[place] ^= 1 << rng.randrange(8)
    return bytes(spoilt), f"a bit of byte {place}"


def bad_record(rng: random.Random, data: bytes, n: int) -> tuple[bytes, str]:
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()  # the text may stand after the pixels
        record, what = bad_json(rng, picture.info["unclip"].encode(), n)
        chunks, file = PngImagePlugin.PngInfo(), io.BytesIO()
        chunks.add_itxt("unclip", record.decode("utf-8", "replace"))
        picture.save(file, "PNG", pnginfo=chunks)
    return file.getvalue(), what


SPOILERS = {
    ".json": bad_json, ".safetensors": bad_tensors, ".npy": bad_array, ".parquet": bad_table, ".index": bad_bytes,
    ".png": bad_record,
}  # fmt: skip
