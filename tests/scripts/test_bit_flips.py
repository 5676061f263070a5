"""A bit that rots in any artefact of ours is noticed where it is read, and named; or it changes nothing.

Each artefact is small, and every bit of it is flipped in turn under the marker `faults`; else every few.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.identifier_embedding import IdentifierEmbedding, read_identifier_embedding
from sd3_lora.common.records import InstanceImage, LatentMask, LatentPosterior, PromptEmbedding, Provenance
from sd3_lora.common.run_record import NotedPicture, RunFacts, RunRecord, RunResults, recorded_flags
from sd3_lora.common.tensor_files import read_shards, write_shards, write_tensors
from sd3_lora.drawing.class_pictures import WaitingLatents
from sd3_lora.drawing.pictures import PicturePlan
from sd3_lora.stage_one.embedding_parts import EmbeddingParts
from sd3_lora.stage_one.embedding_store import EmbeddingStore, write_embeddings
from sd3_lora.stage_one.latent_cache import LatentCache
from sd3_lora.training.checkpoints import read_pictures, read_state, write_pictures, write_state
from sd3_lora.training.loss_log import LoggedStep, LossLog, PendingStep, keep_lines
from sd3_lora.transformer.lora_shapes import require_finite

import pytest
import torch
from conftest import PROJECT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PROVENANCE = Provenance(1, "model", None, "0123456789ab", None, "fp32", 64, {"torch": "2"})
PICTURE = InstanceImage("ab" * 32, Path("dog.png"), "a dog")
CROP = "0,0,64,64"


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_embeddings(folder: Path) -> Path:
    rows = [
        PromptEmbedding(f"prompt {i}", ("instance",), (f"{i:064x}",), numbers(6, 8).half(), numbers(5).half())
        for i in range(2)
    ]
    write_embeddings(folder / "embeddings.parquet", PROVENANCE, rows)
    return folder / "embeddings.parquet"


def read_embeddings(path: Path) -> Any:
    with EmbeddingStore(path) as store:
        rows = [
            (row.prompt, row.roles, row.image_ids, row.prompt_embeds.tolist(), row.pooled_prompt_embeds.tolist())
            for row in map(store.read, store.prompts)
        ]
        return store.provenance, rows


def latent_cache(folder: Path) -> LatentCache:
    return LatentCache(folder, PROVENANCE, "white")


def make_latents(folder: Path) -> Path:
    cache = latent_cache(folder)
    mask = LatentMask(CROP, numbers(1, 4, 4), "mask.png")
    posterior = LatentPosterior(PICTURE.image_id, CROP, numbers(2, 4, 4), numbers(2, 4, 4))
    cache.add(PICTURE, (64, 64), [posterior], 32, [mask])
    return cache.path(PICTURE.image_id)


def read_latents(path: Path) -> Any:
    cache = latent_cache(path.parent)
    look = cache.look(PICTURE.image_id)
    posterior, mask = cache.read(PICTURE.image_id, CROP), cache.read_mask(PICTURE.image_id, CROP)
    return look, posterior.mean.tolist(), posterior.std.tolist(), mask.values.tolist(), mask.source


def make_parts(folder: Path) -> Path:
    parts = EmbeddingParts(folder / "embeddings.parquet", PROVENANCE)
    parts.add(0, ["a"], numbers(1, 6, 8).half(), numbers(1, 5).half())
    return folder / "embeddings.parquet.parts" / "part-000000.safetensors"


def read_parts(path: Path) -> Any:
    """A damaged part is removed, and its prompts are encoded again."""
    parts = EmbeddingParts(path.parent.with_suffix(""), PROVENANCE)
    if not parts.numbers():
        raise UserError(f"{path} is encoded again")
    return parts.prompts(), {name: tensor.tolist() for name, tensor in load_file(path).items()}


WAITING = PicturePlan("a dog", 0, Path("class_0000.png"), {"prompt": "a dog", "seed": 1}, is_drawn=False)


def make_waiting(folder: Path) -> Path:
    WaitingLatents(folder).add(WAITING, numbers(2, 4, 4))
    return folder / "class_0000.safetensors"


def read_waiting(path: Path) -> Any:
    """Damaged latents are denoised again."""
    latents = WaitingLatents(path.parent).read(WAITING)
    if latents is None:
        raise UserError(f"{path} is denoised again")
    return latents.tolist()


def make_checkpoint(folder: Path) -> Path:
    (folder / "checkpoint-2").mkdir()
    write_state(folder / "checkpoint-2", {"step": 2, "rate": 1e-4, "lora": {"q": numbers(3, 2), "v": numbers(2)}})
    return folder / "checkpoint-2" / "state.safetensors"


def make_checkpoint_json(folder: Path) -> Path:
    return make_checkpoint(folder).with_name("state.json")


def read_checkpoint(path: Path) -> Any:
    state = read_state(path.parent)
    return state["step"], state["rate"], {name: tensor.tolist() for name, tensor in state["lora"].items()}, list(state)


def make_lora(folder: Path) -> Path:
    write_tensors(folder / "lora.safetensors", {"a": numbers(2, 3), "b": numbers(3, 2)}, {"sd3_lora": '{"rank": 2}'})
    return folder / "lora.safetensors"


def read_lora(path: Path) -> Any:
    try:
        with safe_open(path, "pt") as handle:
            require_finite(path, handle, handle.keys())
            metadata = {name: text for name, text in handle.metadata().items() if name == "sd3_lora"}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"{path}: {error}") from error
    return metadata, {name: tensor.tolist() for name, tensor in load_file(path).items()}


def make_shard(folder: Path) -> Path:
    (path,) = write_shards(folder, "moments{suffix}.safetensors", {"a": numbers(2, 3), "b": numbers(3)})
    return path


def read_shard(path: Path) -> Any:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    read_shards(path.parent, tensors)
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def make_identifier(folder: Path) -> Path:
    vectors = {"text_encoder": numbers(1, 3), "text_encoder_2": numbers(1, 4, seed=1)}
    return IdentifierEmbedding("sks", vectors).save(folder / "learned_embeds.safetensors", {})


def read_identifier(path: Path) -> Any:
    found = read_identifier_embedding(path, {"text_encoder": 3, "text_encoder_2": 4})
    return found.word, {name: vectors.tolist() for name, vectors in found.vectors.items()}


def make_losses(folder: Path) -> Path:
    log = LossLog(folder / "losses.jsonl", lambda losses: losses, "fp32")
    for number in (1, 2, 3):
        log.add(PendingStep(number, torch.tensor(0.1 * number), torch.tensor(2.0), 1e-4, False, "a.png", [0.25]))
    log.read()
    return folder / "losses.jsonl"


def read_losses(path: Path) -> Any:
    """A damaged line is named and left out."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        lines = keep_lines(path, 3)
    if str(path) in out.getvalue() or len(lines) < 3:
        raise UserError(f"{path} has fewer lines")
    return [{each.name: line[each.name] for each in fields(LoggedStep)} for line in lines]


def make_pictures(folder: Path) -> Path:
    write_pictures(folder, [NotedPicture("ab", "dog.png", "a dög", ("0,0,64,64",), repeats=2)])
    return folder / "pictures.json"


def read_noted(path: Path) -> Any:
    """They are notes for people: damaged ones are named and not used."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        pictures = read_pictures(path.parent)
    if pictures is None:
        raise UserError(out.getvalue())
    return pictures


def make_record(folder: Path) -> Path:
    facts = RunFacts("model", None, {"torch": "2"}, "fp32", seed=3)
    RunRecord([ModelConfig(variant="fp16")], facts).save(folder / "run.json", RunResults("lora", []))
    return folder / "run.json"


def read_record(path: Path) -> Any:
    """A damaged record is named and not used."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        flags = recorded_flags(path, ModelConfig)
    if str(path) in out.getvalue():
        raise UserError(out.getvalue())
    return flags


ARTEFACTS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "embeddings": (make_embeddings, read_embeddings),
    "part of embeddings": (make_parts, read_parts),
    "latents": (make_latents, read_latents),
    "latents that wait": (make_waiting, read_waiting),
    "checkpoint": (make_checkpoint, read_checkpoint),
    "checkpoint's JSON": (make_checkpoint_json, read_checkpoint),
    "LoRA": (make_lora, read_lora),
    "shard of a whole transformer": (make_shard, read_shard),
    "identifier's embedding": (make_identifier, read_identifier),
    "losses": (make_losses, read_losses),
    "pictures": (make_pictures, read_noted),
    "record": (make_record, read_record),
}


def flip_bits(folder: Path, artefact: str, every: int) -> None:
    """Flips every so-manieth bit of an artefact, alone."""
    make, read = ARTEFACTS[artefact]
    path = make(folder)
    whole, content = repr(read(path)), path.read_bytes()
    noticed, unnamed = 0, 0
    for bit in range(0, 8 * len(content), every):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert repr(read(path)) == whole, f"bit {bit} of {len(content)} bytes is used in silence"
        except UserError as error:
            noticed += str(folder) in str(error)
            unnamed += str(folder) not in str(error)
    assert noticed > 0
    assert unnamed == 0
    path.write_bytes(content)
    assert repr(read(path)) == whole


@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_a_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path, artefact: str) -> None:
    flip_bits(tmp_path, artefact, 53)


@pytest.mark.faults
@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path, artefact: str) -> None:
    flip_bits(tmp_path, artefact, 1)


@pytest.mark.parametrize("read", [read_latents, read_embeddings, read_checkpoint], ids=["latents", "rows", "state"])
def test_the_sentence_says_what_is_damaged(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    """The last tensor's last byte, or the row's in the middle of a file: a number that is finite, and another one."""
    make = next(make for make, reader in ARTEFACTS.values() if reader is read)
    path = make(tmp_path)
    content = bytearray(path.read_bytes())
    number = content.index(numbers(6, 8).half().numpy().tobytes()[:8]) if read is read_embeddings else -4
    content[number] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"is damaged, .* has another checksum than when it was written: (delete|no ea)"
    ):
        read(path)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    """Those of earlier builds, and of other programs."""
    old = PROJECT / "tests" / "data" / "cc752f5"
    with EmbeddingStore(old / "embeddings.parquet") as store:
        assert len(list(store.read_all())) == len(store.prompts) > 0
    assert read_state(next(old.glob("*/checkpoint-3")))["step"] == 3
    path = tmp_path / "other.safetensors"
    save_file({"a": numbers(2)}, path, {"format": "pt"})
    with safe_open(path, "pt") as handle:
        require_finite(path, handle, ["a"])


def test_metadata_that_another_program_adds_are_no_damage(tmp_path: Path) -> None:
    path = make_lora(tmp_path)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    save_file(load_file(path), path, {**metadata, "modelspec.title": "dog"})
    with safe_open(path, "pt") as handle:
        require_finite(path, handle, ["a", "b"])
