"""The embeddings file: bit-exact, one row group a prompt, read row by row, never half-written."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.records import PromptEmbedding, Provenance
from sd3_lora.stage_one.embedding_store import EmbeddingStore, with_uses, write_embeddings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

S, D, P = 5, 6, 4
PROVENANCE = Provenance(1, "some/model", "abcdef0123", "c" * 64, None, "int8", 77, {"torch": "2"})
NOT_WHOLE = r"is not a whole embeddings file of this project \(.*\): delete it and run compute_embeddings.py again"


def row(prompt: str, *, roles: tuple[str, ...] = (), image_ids: tuple[str, ...] = ()) -> PromptEmbedding:
    """Values that depend on the prompt alone."""
    generator = torch.Generator().manual_seed(sum(prompt.encode()) + 256 * len(prompt))
    embeds = torch.randn(S, D, generator=generator).half()
    return PromptEmbedding(prompt, roles, image_ids, embeds, torch.randn(P, generator=generator).half())


def same(found: PromptEmbedding, expected: PromptEmbedding) -> bool:
    return (
        (found.prompt, found.roles, found.image_ids) == (expected.prompt, expected.roles, expected.image_ids)
        and torch.equal(found.prompt_embeds, expected.prompt_embeds)
        and torch.equal(found.pooled_prompt_embeds, expected.pooled_prompt_embeds)
    )


ROWS = [
    row("a photo of sks dog", roles=("instance", "validation"), image_ids=("id1", "id3")),
    row("", roles=("negative", "empty")),
    row("größer, 🐕\n'quoted\"", roles=("instance",), image_ids=("id2",)),
    row("nobody asked for this one"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    assert write_embeddings(tmp_path / "embeddings.parquet", PROVENANCE, iter(ROWS)) == 4
    return tmp_path / "embeddings.parquet"


def test_rows_round_trip(path: Path) -> None:
    with EmbeddingStore(path) as store:
        assert store.prompts == tuple(r.prompt for r in ROWS)
        assert len(store) == 4
        assert ("" in store, "another" in store) == (True, False)
        assert store.provenance == PROVENANCE
        assert (store.joint_width, store.pooled_width) == (D, P)
        assert store.prompts_with_role("instance") == (ROWS[0].prompt, ROWS[2].prompt)
        assert store.prompts_with_role("class") == ()
        assert store.prompts_of_images() == {
            "id1": (ROWS[0].prompt,),
            "id3": (ROWS[0].prompt,),
            "id2": (ROWS[2].prompt,),
        }
        assert all(same(store.read(r.prompt), r) for r in reversed(ROWS))
        assert all(same(found, r) for found, r in zip(store.read_all(), ROWS, strict=True))
        assert [found.prompt for found in store.read_all(["", ROWS[0].prompt])] == ["", ROWS[0].prompt]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=S * D, max_size=S * D))
def test_every_finite_float16_survives_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, bits: list[int]) -> None:
    values = np.array(bits, np.uint16).view(np.float16).reshape(S, D)
    values = np.where(np.isfinite(values), values, np.float16(-0.0))
    embedding = replace(ROWS[0], prompt_embeds=torch.from_numpy(values))
    path = tmp_path_factory.mktemp("bits") / "embeddings.parquet"
    write_embeddings(path, PROVENANCE, [embedding])
    with EmbeddingStore(path) as store:
        found = store.read(embedding.prompt).prompt_embeds.numpy()
    assert np.array_equal(found.view(np.uint16), values.view(np.uint16))


def test_the_layout_is_one_row_group_a_prompt_of_fixed_size_lists_of_float16(path: Path) -> None:
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups == 4
    assert [file.metadata.row_group(i).num_rows for i in range(4)] == [1] * 4
    assert file.schema_arrow.field("prompt_embeds").type == pa.list_(pa.float16(), S * D)
    assert file.schema_arrow.field("pooled_prompt_embeds").type == pa.list_(pa.float16(), P)
    frame = pd.read_parquet(path)
    columns = ["prompt", "roles", "image_ids", "prompt_embeds", "pooled_prompt_embeds"]
    assert list(frame.columns) == [*columns, "use_checksum", "embeds_checksum"]
    assert frame["prompt_embeds"][2].dtype == np.float16
    assert np.array_equal(frame["prompt_embeds"][2].reshape(S, D), ROWS[2].prompt_embeds.numpy())


def test_only_the_row_groups_asked_for_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[int] = []
    columns: list[str] = []
    read_row_group, read = pq.ParquetFile.read_row_group, pq.ParquetFile.read

    def watch_group(self: Any, i: int, **options: Any) -> Any:
        groups.append(i)
        return read_row_group(self, i, **options)

    def watch_read(self: Any, columns: Any = None, _columns: list[str] = columns, **options: Any) -> Any:
        _columns += self.schema_arrow.names if columns is None else columns
        return read(self, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watch_group)
    monkeypatch.setattr(pq.ParquetFile, "read", watch_read)
    with EmbeddingStore(path) as store:
        assert groups == []
        store.read(ROWS[2].prompt)
        assert list(store.read_all([ROWS[3].prompt, ROWS[0].prompt]))
    assert groups == [2, 3, 0]
    assert sorted(columns) == ["embeds_checksum", "image_ids", "prompt", "roles", "use_checksum"]


def test_a_prompt_that_is_not_there(path: Path) -> None:
    with EmbeddingStore(path) as store, pytest.raises(KeyError):
        store.read("another")


# What is not ours, or not whole


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("is not there: type `python compute_embeddings.py --output_path")):
        EmbeddingStore(tmp_path / "none.parquet")
    with pytest.raises(UserError, match="is a folder: give the name of a file, such as"):
        EmbeddingStore(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 100, -1, -8, -200])
def test_a_truncated_file(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=NOT_WHOLE):
        EmbeddingStore(path)


def test_a_foreign_file(path: Path) -> None:
    pd.DataFrame({"image_hash": ["a"], "prompt_embeds": [[1.0, 2.0]]}).to_parquet(path)  # the reference's own layout
    with pytest.raises(UserError, match=NOT_WHOLE):
        EmbeddingStore(path)
    path.write_bytes(b"PAR1, but no parquet")
    with pytest.raises(UserError, match=NOT_WHOLE):
        EmbeddingStore(path)


def test_a_file_without_its_row_groups(path: Path) -> None:
    pq.write_table(pq.read_table(path), path)  # as another tool would save it: all prompts in one row group
    with pytest.raises(UserError, match=NOT_WHOLE):
        EmbeddingStore(path)


def test_a_row_damaged_behind_an_intact_footer(path: Path) -> None:
    column = pq.ParquetFile(path).metadata.row_group(1).column(3)
    assert column.path_in_schema.startswith("prompt_embeds")
    damaged = bytearray(path.read_bytes())
    start = column.data_page_offset
    damaged[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(damaged)
    with EmbeddingStore(path) as store:
        assert same(store.read(ROWS[0].prompt), ROWS[0])
        with pytest.raises(UserError, match=NOT_WHOLE):
            store.read(ROWS[1].prompt)


@pytest.mark.parametrize("field", ["prompt_embeds", "pooled_prompt_embeds"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_names_the_prompt(tmp_path: Path, field: str, value: float) -> None:
    values = getattr(ROWS[0], field).clone()
    values[..., -1] = value
    bad = replace(ROWS[0], **{field: values})
    write_embeddings(tmp_path / "bad.parquet", PROVENANCE, [bad, ROWS[1]])
    with EmbeddingStore(tmp_path / "bad.parquet") as store:
        assert same(store.read(""), ROWS[1])
        with pytest.raises(UserError, match="holds a NaN or infinity for 'a photo of sks dog': delete it and run"):
            store.read(bad.prompt)


# Writing


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(path: Path) -> None:
    before = path.read_bytes()

    def interrupted() -> Iterator[PromptEmbedding]:
        yield row("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_embeddings(path, PROVENANCE, interrupted())
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_rows_of_other_shapes_or_none_at_all_are_refused(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="shapes differ at 'new'"):
        write_embeddings(path, PROVENANCE, [*ROWS, replace(row("new"), prompt_embeds=torch.zeros(S + 1, D))])
    with pytest.raises(ValueError, match="no embeddings"):
        write_embeddings(path, PROVENANCE, [])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_with_uses_gives_the_rows_this_run_s_uses_and_keeps_the_others() -> None:
    roles, image_ids = {"": ("empty",), "a": ("class",)}, {"a": ("id9",)}
    given_rows = [row("a", roles=("instance",), image_ids=("id1",)), row("", roles=("x",)), row("old", roles=("y",))]
    rows = list(with_uses([*given_rows, row("a")], roles, image_ids))
    assert [(r.prompt, r.roles, r.image_ids) for r in rows] == [
        ("a", ("class",), ("id9",)),
        ("", ("empty",), ()),
        ("old", (), ()),
    ]
    assert all(torch.equal(r.prompt_embeds, given.prompt_embeds) for r, given in zip(rows, given_rows, strict=True))


def test_the_next_rows_are_read_while_one_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddingStore(path) as store:
        asked: list[str] = []
        read, second = store.read, threading.Event()

        def watched(prompt: str) -> PromptEmbedding:
            asked.append(prompt)
            if len(asked) == 2:
                second.set()
            return read(prompt)

        monkeypatch.setattr(store, "read", watched)
        rows = store.read_all()
        first = next(rows)
        assert second.wait(timeout=20)
        assert [first.prompt, *(row.prompt for row in rows)] == list(store.prompts) == asked


def test_no_time_is_spent_on_the_statistics_of_embeddings(path: Path) -> None:
    group = pq.ParquetFile(path).metadata.row_group(0)
    statistics = {group.column(i).path_in_schema.split(".")[0]: group.column(i).statistics for i in range(5)}
    assert statistics["prompt"] is not None
    assert statistics["prompt_embeds"] is statistics["pooled_prompt_embeds"] is None
