"""The device's memory runs out in stage one or while drawing: the script goes on within less, with what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PROMPT, Prepared
from safetensors.torch import load_file

Script = Callable[..., Any]
REASON = "CUDA out of memory. Tried to allocate 2.00 GiB"
NOTE = f"note: the GPU's memory ran out ({REASON}): going on within 3.60 GiB"


def failing(function: Callable[..., Any], call: int) -> tuple[Callable[..., Any], list[int]]:
    """The function, whose n-th call lacks memory; and the list of its calls."""
    calls = list[int]()

    def wrapped(*words: Any, **more: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == call:
            raise torch.OutOfMemoryError(REASON)
        return function(*words, **more)

    return wrapped, calls


def test_latents(script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import precompute_latents

    patched, calls = failing(precompute_latents.posterior_of, 3)
    monkeypatch.setattr(precompute_latents, "posterior_of", patched)
    words = [*prepared.flags[:4], "--output_path", tmp_path, "--vram_budget_gib", 4, "--vae_batch_size", 2]
    result = script("precompute_latents", *words)
    assert result.code == 0, result.err
    assert NOTE in result.out
    assert "wrote 13 crops of 5 pictures to " in result.out
    assert len(calls) > 3
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == 5
    for path in paths:  # other tests have added to those of `prepared`
        expected, made = load_file(prepared.latents / path.name), load_file(path)
        assert expected.keys() == made.keys()
        for name in expected:
            torch.testing.assert_close(made[name], expected[name])


def test_embeddings(script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compute_embeddings
    from sd3_lora.stage_one.embedding_store import EmbeddingStore

    patched, calls = failing(compute_embeddings.encode_prompts, 2)
    monkeypatch.setattr(compute_embeddings, "encode_prompts", patched)
    monkeypatch.setattr(compute_embeddings, "PROMPTS_PER_CHUNK", 1)
    path = tmp_path / "embeddings.parquet"
    words = [*prepared.flags[:4], "--instance_prompt", PROMPT, "--max_sequence_length", 20, "--output_path", path]
    words += ["--class_prompt", "a photo of a robot", "--vram_budget_gib", 4]
    result = script("compute_embeddings", *words)
    assert result.code == 0, result.err
    assert NOTE in result.out
    assert len(calls) == 4  # three prompts, and the one that failed
    with EmbeddingStore(path) as made, EmbeddingStore(prepared.embeddings) as expected:
        assert set(made.prompts) == set(expected.prompts)
        for row in expected.read_all():
            assert torch.equal(made.read(row.prompt).prompt_embeds, row.prompt_embeds)


@pytest.mark.parametrize("where", ["denoise", "decode"])
def test_pictures(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from sd3_lora.drawing import sampling

    shared = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    shared += [
        "--prompt",
        PROMPT,
        "--num_images",
        3,
        "--num_steps",
        2,
        "--height",
        64,
        "--width",
        64,
        "--batch_size",
        1,
    ]
    shared += ["--max_sequence_length", 20, "--vram_budget_gib", 4, "--device", "cpu"]
    assert script("inference", *shared, "--outdir", tmp_path / "whole").code == 0
    owner, name = (sampling.Sampler, "denoise") if where == "denoise" else (sampling, "queue_decode")
    patched, calls = failing(getattr(owner, name), 2)
    monkeypatch.setattr(owner, name, patched)
    result = script("inference", *shared, "--outdir", tmp_path / "run")
    assert result.code == 0, result.err
    assert NOTE in result.out
    assert len(calls) == 4
    expected = sorted((tmp_path / "whole").glob("*/*.png"))
    made = sorted((tmp_path / "run").glob("*/*.png"))
    assert [path.name for path in made] == [path.name for path in expected]
    assert len(made) == 3
    for one, other in zip(made, expected, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("where", ["denoise", "decode"])
def test_class_pictures(
    script: Script, private: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    import draw_class_pictures

    shared = ["--pretrained_model_name_or_path", private.model, "--data_df_path", private.embeddings]
    shared += ["--class_prompt", "a photo of a robot", "--num_class_images", 3, "--num_steps", 2, "--device", "cpu"]
    shared += ["--sample_batch_size", 1, "--vram_budget_gib", 4]
    folders = [["--class_data_dir", tmp_path / name, "--latents_path", tmp_path / f"{name}-latents"] for name in "ab"]
    assert script("draw_class_pictures", *shared, *folders[0]).code == 0
    owner, name = (draw_class_pictures.Sampler, "denoise") if where == "denoise" else (draw_class_pictures, "decode")
    patched, calls = failing(getattr(owner, name), 2)
    monkeypatch.setattr(owner, name, patched)
    result = script("draw_class_pictures", *shared, *folders[1])
    assert result.code == 0, result.err
    assert NOTE in result.out
    assert len(calls) == 4  # three pictures, and the one that failed
    whole, made = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.png")} for name in "ab")
    assert made == whole
    assert len(made) == 3
    cached = [{path.name for path in (tmp_path / f"{name}-latents").glob("*.safetensors")} for name in "ab"]
    assert cached[0] == cached[1]


def test_without_a_budget_it_is_a_sentence(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import precompute_latents

    patched, _ = failing(precompute_latents.posterior_of, 1)
    monkeypatch.setattr(precompute_latents, "posterior_of", patched)
    result = script("precompute_latents", *prepared.flags[:4], "--output_path", tmp_path)
    assert result.code == 2
    assert result.err.startswith(f"error: {REASON}: try ")
