"""The chunks of a stage one under way: found again, discarded, waited for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import compute_embeddings
from sd3_lora.common.records import PromptEmbedding, Provenance
from sd3_lora.stage_one.embedding_parts import CancelledError, EmbeddingParts

import pytest
import torch
from conftest import PROMPT, Result

S, D, P = 5, 6, 4
PROVENANCE = Provenance(1, "some/model", "abcdef0123", "c" * 64, None, "int8", 77, {"torch": "2"})
CHUNKS = {0: ["a photo of sks dog", ""], 1: ["größer, 🐕\n'quoted\""], 2: ["another", "and one more"]}


def values_of(chunk: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values that depend on the prompts alone."""
    generator = torch.Generator().manual_seed(sum("".join(chunk).encode()))
    shape = (len(chunk), S, D)
    return torch.randn(shape, generator=generator).half(), torch.randn(len(chunk), P, generator=generator).half()


def add(parts: EmbeddingParts, *numbers: int) -> None:
    for number in numbers:
        parts.add(number, CHUNKS[number], *values_of(CHUNKS[number]))


def read(parts: EmbeddingParts, *numbers: int) -> list[PromptEmbedding]:
    return list(parts.read(numbers, threading.Event()))


def are_rows_of(rows: list[PromptEmbedding], *numbers: int) -> bool:
    expected = [
        (prompt, embeds, pooled)
        for number in numbers
        for prompt, embeds, pooled in zip(CHUNKS[number], *values_of(CHUNKS[number]), strict=True)
    ]
    return [row.prompt for row in rows] == [prompt for prompt, _, _ in expected] and all(
        torch.equal(row.prompt_embeds, embeds) and torch.equal(row.pooled_prompt_embeds, pooled)
        for row, (_, embeds, pooled) in zip(rows, expected, strict=True)
    )


@pytest.fixture
def parts(tmp_path: Path) -> EmbeddingParts:
    parts = EmbeddingParts(tmp_path / "out.parquet", PROVENANCE)
    assert (parts.prompts(), parts.numbers()) == (set(), [])
    assert not parts.folder.exists()
    add(parts, 0, 1)
    return parts


def test_parts_are_found_again_and_removed(parts: EmbeddingParts, tmp_path: Path) -> None:
    again = EmbeddingParts(tmp_path / "out.parquet", replace(PROVENANCE, versions={}))
    assert again.prompts() == {*CHUNKS[0], *CHUNKS[1]}
    assert again.numbers() == [0, 1]
    add(again, 2)
    assert are_rows_of(read(again, 0, 1, 2), 0, 1, 2)
    assert are_rows_of(read(again, 2, 0), 2, 0)
    again.remove()
    assert list(tmp_path.iterdir()) == []
    again.remove()


@pytest.mark.parametrize("change", [{"precision": "nf4"}, {"size": 20}, {"config_hash": "d"}, {"revision": "other"}])
def test_parts_made_otherwise_are_discarded(parts: EmbeddingParts, tmp_path: Path, change: dict[str, Any]) -> None:
    other = EmbeddingParts(tmp_path / "out.parquet", replace(PROVENANCE, **change))
    assert other.prompts() == set()
    assert list(parts.folder.iterdir()) == []


@pytest.mark.parametrize("length", [0, 7, 50, -1])
def test_a_part_that_is_not_whole_is_discarded_and_no_other_is_overwritten(
    parts: EmbeddingParts, tmp_path: Path, length: int
) -> None:
    first = min(parts.folder.iterdir())
    first.write_bytes(first.read_bytes()[:length])
    again = EmbeddingParts(tmp_path / "out.parquet", PROVENANCE)
    assert again.prompts() == set(CHUNKS[1])
    (number,) = compute_embeddings.in_chunks(CHUNKS[0], again.numbers(), 1)
    assert number == 2  # not 1, which is there
    again.add(number, CHUNKS[0], *values_of(CHUNKS[0]))
    assert again.prompts() == {*CHUNKS[0], *CHUNKS[1]}
    assert [row.prompt for row in read(again, *again.numbers())] == [*CHUNKS[1], *CHUNKS[0]]


def test_an_interrupted_write_leaves_no_part(parts: EmbeddingParts, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sd3_lora.common.atomic_files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        add(parts, 2)
    assert parts.numbers() == [0, 1]
    assert len(list(parts.folder.iterdir())) == 2


def test_a_part_that_is_not_there_yet_is_waited_for(parts: EmbeddingParts) -> None:
    rows = parts.read([0, 1, 2], threading.Event())
    first = [next(rows) for _ in range(3)]
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, rows)
        assert not coming.done()
        add(parts, 2)
        assert are_rows_of([*first, coming.result(timeout=20), *rows], 0, 1, 2)


def test_whoever_waits_is_told_that_no_more_will_come(parts: EmbeddingParts) -> None:
    cancelled = threading.Event()
    rows = parts.read([1, 2], cancelled)
    assert next(rows).prompt == CHUNKS[1][0]
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, rows)
        cancelled.set()
        with pytest.raises(CancelledError):
            coming.result(timeout=20)


def test_rows_end_when_they_are_not_wanted_any_more(parts: EmbeddingParts) -> None:
    cancelled = threading.Event()
    rows = parts.read([0, 1], cancelled)
    assert next(rows).prompt == CHUNKS[0][0]
    cancelled.set()  # as by whoever interrupts the writing of the last chunk
    with pytest.raises(CancelledError):
        next(rows)


def test_whoever_is_interrupted_while_it_waits_gives_up_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def work(cancelled: threading.Event) -> int:
        seen.append(cancelled.wait(timeout=20))
        return 0

    def interrupted(_: compute_embeddings.Future) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compute_embeddings.Future, "exception", interrupted)
    with pytest.raises(KeyboardInterrupt), compute_embeddings.in_thread(work):
        pass
    assert seen == [True]


# Through the script


@pytest.fixture
def embed(script: Any, tiny_sd3: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script on five prompts in chunks of two."""
    monkeypatch.setattr(compute_embeddings, "PROMPTS_PER_CHUNK", 2)

    def run() -> Result:
        words = ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", pictures, "--device", "cpu"]
        words += ["--instance_prompt", PROMPT, "--validation_prompt", "red", "green", "blue"]
        return script("compute_embeddings", *words, "--output_path", tmp_path / "out.parquet")

    return run


def test_a_chunk_is_written_to_the_file_while_the_next_is_encoded(embed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    second = threading.Event()
    with_uses, encode = compute_embeddings.with_uses, compute_embeddings.encode_prompts
    chunks: list[list[str]] = []

    def watched(*args: Any) -> Iterator[PromptEmbedding]:
        for row in with_uses(*args):
            written.append(row.prompt)
            if len(written) == 2:
                second.set()
            yield row

    def encode_second(files: Any, prompts: list[str], *args: Any) -> Any:
        if chunks:
            assert second.wait(timeout=20)
        chunks.append(prompts)
        return encode(files, prompts, *args)

    monkeypatch.setattr(compute_embeddings, "with_uses", watched)
    monkeypatch.setattr(compute_embeddings, "encode_prompts", encode_second)
    assert embed().code == 0
    assert [len(chunk) for chunk in chunks] == [2, 2, 1]
    assert written == [prompt for chunk in chunks for prompt in chunk]


def test_where_encoding_fails_the_writing_ends_too_and_leaves_nothing_unfinished(
    embed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, calls = compute_embeddings.encode_prompts, []

    def failing(files: Any, prompts: list[str], *args: Any) -> Any:
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(files, prompts, *args)

    monkeypatch.setattr(compute_embeddings, "encode_prompts", failing)
    assert embed().code == 130
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "out.parquet.parts"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_where_the_file_cannot_be_written_the_parts_stay(
    embed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device", "out.parquet")

    with monkeypatch.context() as patch:
        patch.setattr(compute_embeddings, "write_embeddings", full)
        result = embed()
    assert result.code == 2
    assert "the disk is full: free some space" in result.err
    assert len(list((tmp_path / "out.parquet.parts").iterdir())) == 3
    assert "5 prompts, 5 of them done before" in embed().out
