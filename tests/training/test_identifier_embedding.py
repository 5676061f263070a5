"""The identifier's embedding: its gradients, its file, exact resume, and what goes with it or is refused."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.identifier_embedding import EMBEDDING_FILE, read_identifier_embedding
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one.text_encoder_plan import TextEncoderPlan
from sd3_lora.stage_one.text_encoders import encode_clips
from sd3_lora.transformer.lora import EMA_FILE, LORA_FILE
from sd3_lora.transformer.lora_keys import CLIPS

import numpy as np
import pytest
import torch
from conftest import PROMPT, TRAINING_SCRIPT, Prepared
from diffusers import StableDiffusion3Pipeline
from diffusers.loaders import TextualInversionLoaderMixin
from PIL import Image
from safetensors.torch import load_file
from training_runs import Script

WORDS = ["--train_identifier_embedding", "sks", "--identifier_lr", 0.02, "--learning_rate", 0.01]


def embedding(folder: Path, name: str = EMBEDDING_FILE) -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# A run, and its file


@pytest.fixture(scope="module")
def trained(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of both, three vectors, with an average and pictures."""
    folder = tmp_path_factory.mktemp("trained")
    words = [*prepared.flags, "--device", "cpu", "--max_train_steps", 4, "--output_dir", folder, *WORDS, "--use_ema"]
    words += ["--num_vectors", 3, "--ema_decay", 0.5]
    words += ["--validation_prompt", PROMPT, "--validation_num_steps", 3, "--validation_guidance", 4]
    assert importlib.import_module(TRAINING_SCRIPT).main([str(word) for word in words]) == 0
    return folder


class Stock(StableDiffusion3Pipeline, TextualInversionLoaderMixin):
    """The stock pipeline, which of itself has no `load_textual_inversion`, as docs/text_encoders.md has it."""


def stock_with(model: Path, path: Path) -> tuple[Stock, str]:
    """The stock pipeline with the embedding loaded by diffusers, and what stands in prompts for the identifier."""
    pipeline, state = Stock.from_pretrained(model), load_file(path)
    names = [f"<s{index}>" for index in range(len(state["clip_l"]))]
    for key, encoder, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer),
        ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        pipeline.load_textual_inversion(state[key], token=names, text_encoder=encoder, tokenizer=tokenizer)
        encoder.text_model.eos_token_id = tokenizer.eos_token_id
    return pipeline, "".join(names)


@pytest.mark.parametrize("old_end", [False, True])
def test_diffusers_reads_the_file(prepared: Prepared, tmp_path: Path, trained: Path, old_end: bool) -> None:
    """Loaded by diffusers' own loader the stock encoders give what ours give, bit for bit; T5 reads the plain word."""
    model = tmp_path / "model"
    shutil.copytree(prepared.model, model)
    for name in CLIPS if old_end else ():  # as SD3's
        path = model / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 2}))
    prompts = ["a photo of sks robot, Sks!", "a red robot", "sks tasks"]
    pipeline, names = stock_with(model, trained / EMBEDDING_FILE)
    texts = [f"a photo of {names} robot, {names}!", "a red robot", f"{names} tasks"]
    expected, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, prompts, max_sequence_length=20, do_classifier_free_guidance=False
    )
    files = ModelFiles(ModelConfig(str(model)))
    identifier = read_identifier_embedding(trained / EMBEDDING_FILE, {"text_encoder": 8, "text_encoder_2": 16})
    plan = TextEncoderPlan("fp32", False, 20, torch.device("cpu"))
    hidden, found = encode_clips(files, prompts, plan, [], identifiers=[identifier])
    assert torch.equal(torch.cat(hidden, -1), expected[:, :77, :24].half())
    assert torch.equal(found, pooled.half())


def drawn(script: Script, prepared: Prepared, outdir: Path, *more: object, code: int = 0) -> Any:
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    flags += ["--outdir", outdir, "--num_steps", 3, "--guidance", 4, "--prompt", PROMPT, "--device", "cpu", *more]
    result = script("inference", *flags)
    assert result.code == code, result.err
    if code:
        return result.err
    (path,) = outdir.glob("0*/img_00.png")
    return np.asarray(Image.open(path)).astype(int)


def test_the_same_picture_everywhere(script: Script, prepared: Prepared, tmp_path: Path, trained: Path) -> None:
    """The stock pipeline's, ours, and the one that was drawn while training (with the average)."""
    from sd3_lora.drawing.pictures import plan_pictures

    pipeline, names = stock_with(prepared.model, trained / EMBEDDING_FILE)
    pipeline.load_lora_weights(trained, weight_name=LORA_FILE)
    pipeline.set_progress_bar_config(disable=True)
    (plan,) = plan_pictures(tmp_path, [PROMPT], 1, {"seed": 0})
    text = PROMPT.replace("sks", names)
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 4.0, "max_sequence_length": 20}
    settings |= {"latents": plan.noise((16, 8, 8))[None], "height": 64, "width": 64, "output_type": "np"}
    (picture,) = pipeline(prompt=text, prompt_3=PROMPT, **settings).images
    expected = (picture * 255).round().astype(int)
    (plain,) = pipeline(prompt=PROMPT, **settings).images
    assert np.abs(expected - (plain * 255).round()).mean() > 1
    assert np.abs(drawn(script, prepared, tmp_path / "ours", "--lora", trained) - expected).max() <= 2
    (picture,) = (trained / "samples" / "step_000004").glob("*.png")
    average = drawn(script, prepared, tmp_path / "average", "--lora", trained / EMA_FILE)
    assert np.abs(np.asarray(Image.open(picture)).astype(int) - average).max() <= 2
    assert np.abs(average - expected).max() > 2
