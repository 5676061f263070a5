"""A file is there whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sd3_lora.drawing.class_pictures as class_pictures
import sd3_lora.stage_one.embedding_parts as embedding_parts
import sd3_lora.stage_one.embedding_store as embedding_store
import sd3_lora.stage_one.latent_cache as latent_cache
import sd3_lora.transformer.lora as lora
from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.records import InstanceImage, LatentPosterior, PromptEmbedding, Provenance
from sd3_lora.drawing.pictures import PicturePlan

import pytest
import torch
from small_transformer import make_transformer

PROVENANCE = Provenance(1, "m", None, "c", None, "fp32", 64, {})


def test_it_replaces_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with replacing(path) as unfinished:
        unfinished.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")

    def fail() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        fail()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def _embedding() -> PromptEmbedding:
    return PromptEmbedding("a", (), (), torch.zeros(4, 8, dtype=torch.float16), torch.zeros(6, dtype=torch.float16))


WRITERS: dict[str, tuple[Any, str, Callable[[Path], object]]] = {
    # the module and the name of what writes there, and a call of it that writes one file into a folder
    "waiting latents": (
        class_pictures,
        "write_tensors",
        lambda folder: class_pictures.WaitingLatents(folder).add(
            PicturePlan("a", 0, folder / "a.png", {}, is_drawn=False), torch.zeros(16, 2, 2)
        ),
    ),
    "embedding parts": (
        embedding_parts,
        "save_file",
        lambda folder: embedding_parts.EmbeddingParts(folder / "e", PROVENANCE).add(
            0, ["a"], torch.zeros(1, 4, 8), torch.zeros(1, 6)
        ),
    ),
    "embeddings": (
        embedding_store,
        "_row_table",
        lambda folder: embedding_store.write_embeddings(folder / "e.parquet", PROVENANCE, [_embedding()]),
    ),
    "latents": (
        latent_cache,
        "write_tensors",
        lambda folder: latent_cache.LatentCache(folder, PROVENANCE).add(
            InstanceImage("0", folder / "a.png", ""),
            (64, 64),
            [LatentPosterior("0", "64x64+0+0", torch.zeros(16, 8, 8), torch.zeros(16, 8, 8))],
        ),
    ),
    "the LoRA": (lora, "load", lambda folder: lora.save_lora(folder, make_transformer(1), {})),
}


@pytest.mark.parametrize("name", WRITERS)
def test_where_writing_fails_nothing_is_left(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, writer, write = WRITERS[name]
    original = getattr(module, writer)

    def fail(*words: Any, **more: Any) -> None:
        original(*words, **more)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, writer, fail)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    write(tmp_path)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert not path.name.startswith(".")
