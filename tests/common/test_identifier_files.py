"""The identifier's embedding: where it stands in prompts, its file, and files that are not it."""

from __future__ import annotations

from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.identifier_embedding import (
    IdentifierEmbedding,
    IdentifierTokenizer,
    counts_of,
    embedding_path,
    is_embedding,
    read_identifier_embedding,
    stands_in,
)
from sd3_lora.common.model_files import MINIATURE

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

WIDTHS = {"text_encoder": 4, "text_encoder_2": 6}


def vectors(count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(count, width, generator=generator) for name, width in WIDTHS.items()}


@pytest.mark.parametrize(
    ("word", "prompt", "stands"),
    [
        ("sks", "a photo of sks dog", True),
        ("sks", "SKS, a dog", True),
        ("sks", "tasks", False),
        ("sks", "asks sks_1", False),
        ("sks", "", False),
        ("[V]", "a [V] dog", True),
        ("<dog-1>", "a<dog-1>.", True),
        ("sks dog", "a photo of sks dog", True),
        ("a.b", "a photo of axb", False),
    ],
)
def test_where_it_stands(word: str, prompt: str, stands: bool) -> None:
    assert stands_in(word, prompt) is stands


def test_its_ids_are_negative_and_all_others_stay() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(MINIATURE / "tokenizer")
    known = len(tokenizer)
    ours = IdentifierTokenizer(tokenizer, {"sks": 2, "ohwx": 1})
    options = {"padding": "max_length", "max_length": 20, "truncation": True, "return_tensors": "pt"}
    plain = tokenizer(["a red robot"], **options).input_ids
    assert torch.equal(ours(["a red robot"], **options).input_ids, plain)
    ids = ours(["a sks robot, ohwx", "sks"], **options).input_ids
    start, a = plain[0, :2].tolist()
    robot = tokenizer("robot", add_special_tokens=False).input_ids
    comma = tokenizer(",", add_special_tokens=False).input_ids
    expected = [start, a, -1, -2, *robot, *comma, -3, tokenizer.eos_token_id]
    assert ids[0, : len(expected)].tolist() == expected
    assert ids[1, :4].tolist() == [start, -1, -2, tokenizer.eos_token_id]
    assert len(tokenizer) == known
    words = IdentifierTokenizer(tokenizer, {"sks": 1, "vector": 1})  # a word that the vectors' own names have
    assert words(["vector sks"]).input_ids[0][1:3] == [known + 1, known]


def test_the_file_comes_back(tmp_path: Path) -> None:
    identifier = IdentifierEmbedding("sks", vectors())
    path = identifier.save(tmp_path / "learned_embeds.safetensors", {"trigger": "a photo of sks dog"})
    assert {key: tuple(value.shape) for key, value in load_file(path).items()} == {"clip_l": (2, 4), "clip_g": (2, 6)}
    read = read_identifier_embedding(path, WIDTHS)
    assert (read.word, read.count, read.note) == ("sks", 2, identifier.note)
    assert read.record["trigger"] == "a photo of sks dog"
    assert all(torch.equal(read.vectors[name], identifier.vectors[name]) for name in WIDTHS)
    assert IdentifierEmbedding("sks", vectors(1)).identity != identifier.identity


def test_what_is_not_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"clip_l": torch.zeros(1, 4)}, path)
    with pytest.raises(UserError, match="has no clip_g: give the file that training with --train_identifier_emb"):
        read_identifier_embedding(path, WIDTHS)
    save_file({"clip_l": torch.zeros(1, 4), "clip_g": torch.zeros(1, 6)}, path)
    with pytest.raises(UserError, match="does not say which word it is of"):
        read_identifier_embedding(path, WIDTHS)
    IdentifierEmbedding("sks", vectors()).save(path, {})
    with pytest.raises(UserError, match=r"does not fit this model: its clip_g is \(2, 6\), and vectors are 8 finite"):
        read_identifier_embedding(path, WIDTHS | {"text_encoder_2": 8})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"is damaged .*: train again"):
        read_identifier_embedding(path, WIDTHS)
    bad = vectors()
    bad["text_encoder"][0, 0] = float("nan")
    with pytest.raises(UserError, match="has NaN or infinity: not saved; lower --identifier_lr"):
        IdentifierEmbedding("sks", bad).save(tmp_path / "bad.safetensors", {})
    assert not (tmp_path / "bad.safetensors").exists()


def test_names_and_counts() -> None:
    first, second = IdentifierEmbedding("sks", vectors()), IdentifierEmbedding("ohwx", vectors(3))
    assert counts_of([first, second]) == {"sks": 2, "ohwx": 3}
    with pytest.raises(UserError, match="two embeddings are of 'SKS': draw with one of them"):
        counts_of([first, IdentifierEmbedding("SKS", vectors())])
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_ema.safetensors", "dog-step1.safetensors"):
        assert is_embedding(embedding_path(Path(name)))
        assert not is_embedding(Path(name))
