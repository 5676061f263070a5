"""Artefacts that lie, made by rule from whole ones: safetensors headers, parquet schemas, JSON values."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

NUMBERS = (0, 1, -1, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 0.5, 1e300)
TEXTS = ("", "x", "../../x", "/x", "a\0b", "\u202e", "é" * 3000, "NaN", "[]", "{", "9" * 5000, "-1", "1e999")
OTHERS: tuple[Any, ...] = (None, True, [], {}, [[]], {"a": {"b": []}})
DTYPES = ("F16", "F64", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "C64", "F4", "X9", "")


def any_value(draw: Random) -> Any:
    return draw.choice((*NUMBERS, *TEXTS, *OTHERS, float("nan"), float("inf")))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has values: the keys that lead to each."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def lying_json(value: Any, draw: Random) -> Any:
    """One value is another, is left out, or has another name; text that is JSON itself lies inside."""
    value = json.loads(json.dumps(value))
    known = places(value)
    if not known:
        return any_value(draw)
    *way, last = draw.choice(known)
    holder = value
    for key in way:
        holder = holder[key]
    if isinstance(holder[last], str) and holder[last][:1] in "{[" and draw.random() < 0.8:
        try:
            holder[last] = json.dumps(lying_json(json.loads(holder[last]), draw))
            return value
        except ValueError:
            pass
    if isinstance(holder, dict) and draw.random() < 0.3:
        inner = holder.pop(last)
        if draw.random() < 0.5:
            holder[draw.choice(TEXTS)] = inner
    else:
        holder[last] = any_value(draw)
    return value


def lying_header(content: bytes, draw: Random) -> bytes:
    """A safetensors file whose header says something else than is in it; nested too deep, or of another length."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    how = draw.choice(("length", "nested", "text", "shape", "offsets", "dtype", "value", "value", "value", "twice"))
    if how == "length":
        return draw.choice((0, 1, 7, start - 9, start, 10**9, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if how in ("nested", "text"):
        text = b"[" * 200_000 if how == "nested" else draw.choice(TEXTS).encode()
        return len(text).to_bytes(8, "little") + text + content[start:]
    names = [name for name in header if name != "__metadata__"]
    entry, other = (header[draw.choice(names)] for _ in range(2))
    if how == "shape":
        entry["shape"] = draw.choice(([], [0], [-1], [2**40, 2**40], [1] * 70, entry["shape"][::-1], [2**63], ["x"]))
    elif how == "offsets":
        entry["data_offsets"] = draw.choice(
            ([0, 0], [0, 2**62], [2**63, 2**63 + 4], entry["data_offsets"][::-1], other["data_offsets"], [0], [-4, 0])
        )
    elif how == "dtype":
        entry["dtype"] = draw.choice(DTYPES)
    elif how == "twice":
        text = json.dumps(header)[:-1] + f", {json.dumps(names[0])}: {json.dumps(entry)}}}"
        return len(text.encode()).to_bytes(8, "little") + text.encode() + content[start:]
    else:
        header = lying_json(header, draw)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[start:]


def lying_parquet(path: Path, draw: Random) -> None:
    """Another column, type, count of rows or metadata; or bytes of the footer that are others."""
    how = draw.choice(("bytes", "bytes", "metadata", "drop", "cast", "rows", "groups", "twice"))
    if how == "bytes":
        content = bytearray(path.read_bytes())
        footer = int.from_bytes(content[-8:-4], "little")
        for _ in range(draw.choice((1, 2, 8))):
            place = len(content) - 1 - draw.randrange(min(len(content), footer + 8 if draw.random() < 0.7 else 10**9))
            content[place] = draw.randrange(256)
        path.write_bytes(content)
        return
    table = pq.read_table(path)
    name = draw.choice(table.column_names)
    index = table.column_names.index(name)
    if how == "metadata":
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        metadata = {key: value for key, value in metadata.items() if "checksum" not in key}
        changed = lying_json(metadata, draw) if metadata else {}
        changed = changed if isinstance(changed, dict) else {}
        table = table.replace_schema_metadata({str(k): str(v) for k, v in changed.items()})
    elif how == "drop":
        table = table.drop_columns([name])
    elif how == "cast":
        other = draw.choice(
            (
                pa.array([draw.choice((7, 0.5, True, "x"))] * len(table)),
                pa.array([[None]] * len(table), pa.list_(pa.float16())),
                pa.array([[1.0] * 3] * len(table), pa.list_(pa.float16(), 3)),
                pa.array([None] * len(table), pa.string()),
                pa.array([b"\xff\xfe"] * len(table)),
                pa.array([["a" * 10**6]] * len(table)),
                pa.DictionaryArray.from_arrays(pa.array([0] * len(table)), pa.array(["a"])),
            )
        )
        table = table.set_column(index, name, other)
    elif how == "rows":
        table = pa.concat_tables([table] * draw.choice((2, 50))) if draw.random() < 0.5 else table.slice(0, 0)
    elif how == "twice":
        table = table.append_column(name, table.column(index))
    pq.write_table(table, path, row_group_size=draw.choice((1, 10**6)))


def without_checksums(path: Path) -> None:
    """As earlier builds wrote it: what lies then is not noticed by a checksum."""
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.get("__metadata__", {}).pop("sd3_lora_checksums", None)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    elif path.suffix == ".parquet":
        table = pq.read_table(path)
        table = table.drop_columns([name for name in table.column_names if "checksum" in name])
        metadata = {key: value for key, value in table.schema.metadata.items() if b"checksum" not in key}
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=1)
    else:
        values = [json.loads(line) for line in lines_of(path)]
        for value in values:
            if isinstance(value, dict):
                value.pop("checksum", None)
        path.write_text("\n".join(map(json.dumps, values)) + "\n")


def lines_of(path: Path) -> list[str]:
    """The JSON values of a file: one of each line of a .jsonl, else one."""
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def make_lie(path: Path, draw: Random) -> None:
    """Makes a whole artefact one that lies, in half the cases one without checksums."""
    if draw.random() < 0.7:
        without_checksums(path)
    if path.suffix == ".safetensors":
        path.write_bytes(lying_header(path.read_bytes(), draw))
    elif path.suffix == ".parquet":
        lying_parquet(path, draw)
    else:
        lines = lines_of(path)
        number = draw.randrange(len(lines))
        lines[number] = json.dumps(lying_json(json.loads(lines[number]), draw))
        path.write_text("\n".join(lines) + "\n")
