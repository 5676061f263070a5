"""Drawing with LoRAs of other programs: the right picture, or a sentence before any model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import inference
from sd3_lora.stage_one import text_encoders

import numpy as np
import pytest
import torch
from conftest import PROMPT, Prepared, Result
from diffusers import SD3Transformer2DModel
from PIL import Image
from safetensors.torch import save_file

Script = Callable[..., Result]
LAYERS = tuple(f"transformer_blocks.{block}.attn.{layer}" for block in (0, 1) for layer in ("to_q", "to_k", "to_v"))


@pytest.fixture(scope="module")
def tensors(tiny_sd3: Path) -> dict[str, torch.Tensor]:
    """A strong LoRA of rank 4 in diffusers' names."""
    transformer = SD3Transformer2DModel.from_pretrained(tiny_sd3 / "transformer")
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in LAYERS:
        width_out, width_in = transformer.get_submodule(name).weight.shape
        found[f"transformer.{name}.lora_A.weight"] = torch.randn(4, width_in, generator=generator)
        found[f"transformer.{name}.lora_B.weight"] = torch.randn(width_out, 4, generator=generator)
    return found


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return path


def draw(script: Script, prepared: Prepared, outdir: Path, *words: object) -> np.ndarray:
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings]
    flags += ["--outdir", outdir, "--num_steps", 2, "--guidance", 2, "--max_sequence_length", 20, "--prompt", PROMPT]
    assert script("inference", *flags, *words).code == 0
    path = max(outdir.glob("*/*.png"), key=lambda path: path.stat().st_mtime_ns)  # earlier ones keep their files
    return np.asarray(Image.open(path)).astype(int)


def refused(script: Script, prepared: Prepared, outdir: Path, *words: object) -> str:
    flags = ["--pretrained_model_name_or_path", prepared.model, "--outdir", outdir, "--prompt", "not embedded yet"]
    result = script("inference", *flags, *words)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert not outdir.exists()
    return result.err


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(text_encoders, "encode_prompts", fail)
    for name in ("arrange", "load_vae"):
        monkeypatch.setattr(inference, name, fail)


def test_an_alpha_beside_the_tensors_is_a_scale(
    script: Script, prepared: Prepared, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    plain = saved(tmp_path / "plain.safetensors", tensors)
    alphas = {f"transformer.{name}.alpha": torch.tensor(2.0) for name in LAYERS}
    alpha = saved(tmp_path / "alpha.safetensors", {**tensors, **alphas})
    half = draw(script, prepared, tmp_path / "half", "--lora", plain, "--lora_scale", 0.5)
    assert np.array_equal(draw(script, prepared, tmp_path / "alpha", "--lora", alpha), half)
    quarter = draw(script, prepared, tmp_path / "quarter", "--lora", plain, "--lora_scale", 0.25)
    assert np.array_equal(draw(script, prepared, tmp_path / "both", "--lora", alpha, "--lora_scale", 0.5), quarter)
    assert np.abs(draw(script, prepared, tmp_path / "plain", "--lora", plain) - half).mean() > 1


def test_a_picture_drawn_without_the_alpha_is_drawn_again(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An earlier build passed the alpha over: what it drew has the identity of the bytes alone."""
    alphas = {f"transformer.{name}.alpha": torch.tensor(2.0) for name in LAYERS}
    path = saved(tmp_path / "alpha.safetensors", {**tensors, **alphas})
    with monkeypatch.context() as patch:
        identity = inference.LoraFile.identity
        patch.setattr(inference.LoraFile, "identity", lambda self: identity(self).split("/")[0])
        patch.setattr(inference.MergedLoras, "use", lambda *_: None)
        before = draw(script, prepared, tmp_path / "out", "--lora", path)
    assert not np.array_equal(draw(script, prepared, tmp_path / "out", "--lora", path), before)


def test_streamed_blocks_draw_the_same(
    script: Script, prepared: Prepared, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = saved(tmp_path / "lora.safetensors", tensors)
    resident = draw(script, prepared, tmp_path / "resident", "--lora", path)
    unmerged = draw(script, prepared, tmp_path / "unmerged", "--lora", path, "--unmerged")
    for source, expected in (("host", resident), ("files", unmerged)):  # the files are never changed
        words = ["--lora", path, "--stream_blocks", 2, "--stream_from", source]
        assert np.array_equal(draw(script, prepared, tmp_path / source, *words), expected)


@pytest.mark.parametrize("words", [[], ["--unmerged"], ["--stream_blocks", 2], ["--base_precision", "nf4"]], ids=str)
def test_lokr_and_loha(
    script: Script, prepared: Prepared, tmp_path: Path, tensors: dict[str, torch.Tensor], words: list[Any]
) -> None:
    """A LoKr whose first matrix is a one, and a LoHa whose first product is of ones, are a LoRA."""
    lokr, loha = {}, {}
    for name in LAYERS:
        down, up = (tensors[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
        flat = f"lycoris_{name.replace('.', '_')}"
        shared = {f"{flat}.alpha": torch.tensor(2.0)}
        lokr |= {f"{flat}.lokr_w1": torch.ones(1, 1), f"{flat}.lokr_w2_a": up, f"{flat}.lokr_w2_b": down, **shared}
        ones = {f"{flat}.hada_w1_a": torch.ones(up.shape) / 4, f"{flat}.hada_w1_b": torch.ones(down.shape)}
        loha |= {**ones, f"{flat}.hada_w2_a": up, f"{flat}.hada_w2_b": down, **shared}
    base = draw(script, prepared, tmp_path / "base", *words)
    plain = saved(tmp_path / "plain.safetensors", tensors)
    expected = draw(script, prepared, tmp_path / "plain", "--lora", plain, "--lora_scale", 0.5, *words)
    assert np.abs(expected - base).max() > 20
    for name, own in (("lokr", lokr), ("loha", loha)):
        path = saved(tmp_path / f"{name}.safetensors", own)
        assert np.abs(draw(script, prepared, tmp_path / name, "--lora", path, *words) - expected).max() <= 2
    # Beside the plain one, of which it takes half away.
    both = ["--lora", plain, "--lora_scale", 1, "--lora", tmp_path / "lokr.safetensors", "--lora_scale", -1]
    assert np.abs(draw(script, prepared, tmp_path / "both", *both, *words) - expected).max() <= 2


def test_streamed_blocks_draw_the_base_beside_the_lora(
    script: Script, prepared: Prepared, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = saved(tmp_path / "lora.safetensors", tensors)
    with_it = draw(script, prepared, tmp_path / "with", "--lora", path)
    without = draw(script, prepared, tmp_path / "without")
    draw(script, prepared, tmp_path / "both", "--lora", path, "--compare", "--stream_blocks", 2)
    for name, expected in (("img_00", with_it), ("img_00_base", without)):
        (drawn,) = (tmp_path / "both").glob(f"*/{name}.png")
        assert np.array_equal(np.asarray(Image.open(drawn)).astype(int), expected)


@pytest.mark.parametrize("words", [[], ["--unmerged"], ["--stream_blocks", 2], ["--base_precision", "nf4"]], ids=str)
def test_a_dora(
    script: Script, prepared: Prepared, tmp_path: Path, tensors: dict[str, torch.Tensor], words: list[Any]
) -> None:
    """With the weights' own lengths as magnitudes and no change of direction, it is the base; else it is not."""
    transformer = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer")
    norms = {
        f"transformer.{name}.lora_magnitude_vector": transformer.get_submodule(name).weight.norm(dim=1).detach()
        for name in LAYERS
    }
    still = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    plain = draw(script, prepared, tmp_path / "plain", *words)
    unchanged = saved(tmp_path / "unchanged.safetensors", {**still, **norms})
    lengthened = saved(tmp_path / "long.safetensors", {**still, **{name: 9 * norm for name, norm in norms.items()}})
    as_plain = draw(script, prepared, tmp_path / "unchanged", *words, "--lora", unchanged)
    # The lengths are those of the weights before they were packed in 4 bits.
    assert np.abs(as_plain - plain).mean() < 0.1
    longer = draw(script, prepared, tmp_path / "long", *words, "--lora", lengthened)
    assert np.abs(longer - plain).mean() > 1


def test_the_original_names_and_whole_differences(
    script: Script, prepared: Prepared, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    """The same LoRA as one of q, k and v joined, and as its whole difference; streamed too."""
    expected = draw(script, prepared, tmp_path / "plain", "--lora", saved(tmp_path / "plain.safetensors", tensors))
    joined, whole = {}, {}
    for block in (0, 1):
        names = [f"transformer.transformer_blocks.{block}.attn.to_{letter}" for letter in "qkv"]
        key = f"lora_unet_joint_blocks_{block}_x_block_attn_qkv"
        joined[f"{key}.lora_down.weight"] = torch.cat([tensors[f"{name}.lora_A.weight"] for name in names])
        joined[f"{key}.lora_up.weight"] = torch.block_diag(*(tensors[f"{name}.lora_B.weight"] for name in names))
        joined[f"{key}.alpha"] = torch.tensor(12.0)
        for name in names:
            product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
            whole[f"lycoris_{name.removeprefix('transformer.').replace('.', '_')}.diff"] = product
    for form, file in (("joined", joined), ("whole", whole)):
        path = saved(tmp_path / f"{form}.safetensors", file)
        for words in ([], ["--stream_blocks", 2]):
            outdir = tmp_path / f"{form}{len(words)}"
            assert np.abs(draw(script, prepared, outdir, "--lora", path, *words) - expected).max() <= 1


@pytest.mark.parametrize("words", [[], ["--unmerged"], ["--stream_blocks", 2], ["--base_precision", "nf4"]], ids=str)
def test_a_dora_of_inputs(
    script: Script, prepared: Prepared, tmp_path: Path, tensors: dict[str, torch.Tensor], words: list[Any]
) -> None:
    """With the lengths of the weights' columns as magnitudes and no change of direction, it is the base."""
    transformer = SD3Transformer2DModel.from_pretrained(prepared.model / "transformer")
    norms = {
        f"transformer.{name}.dora_scale": transformer.get_submodule(name).weight.norm(dim=0, keepdim=True).detach()
        for name in LAYERS
    }
    still = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    plain = draw(script, prepared, tmp_path / "plain", *words)
    unchanged = saved(tmp_path / "unchanged.safetensors", {**still, **norms})
    longer = saved(tmp_path / "long.safetensors", {**still, **{name: 9 * norm for name, norm in norms.items()}})
    difference = np.abs(draw(script, prepared, tmp_path / "unchanged", *words, "--lora", unchanged) - plain).mean()
    assert difference < 0.1  # the norms are of the weights before they were packed in 4 bits
    assert np.abs(draw(script, prepared, tmp_path / "long", *words, "--lora", longer) - plain).mean() > 1


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("extra", "words", "says"),
    [
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", [], "lacks a part of the LoRA"),
        ("lora_te1_text_model_encoder_layers_9_mlp_fc1.lora_down.weight", [], "was trained on another model"),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.k.lora_A.weight", [], "holds LoRA layers of T5"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k.alpha", [], "holds LoRA layers of T5"),
        ("transformer.pos_embed.proj.lora_A.weight", [], "no linear layer"),
        ("transformer.transformer_blocks.9.attn.to_q.lora_A.weight", [], "was trained on another model"),
        ("nan", [], "has NaN or infinity"),
        ("dora", ["--lora_scale", 0.5], "which has one strength: leave out --lora_scale 0.5"),
        ("dora", ["--stream_blocks", 2, "--unmerged"], "cannot be streamed"),
        ("dora", ["--stream_blocks", 2, "--stream_from", "files", "--plan"], "cannot be streamed"),
    ],
)
def test_refused_before_a_model_is_loaded(
    script: Script,
    prepared: Prepared,
    tmp_path: Path,
    tensors: dict[str, torch.Tensor],
    extra: str,
    words: Any,
    says: str,
) -> None:
    changed = dict(tensors)
    if extra == "nan":
        name = f"transformer.{LAYERS[2]}.lora_B.weight"
        changed[name] = changed[name] * float("nan")
    elif extra == "dora":
        changed |= {f"transformer.{name}.lora_magnitude_vector": torch.ones(32) for name in LAYERS}
    else:
        changed[extra] = torch.ones(4, 4)
    path = saved(tmp_path / "lora.safetensors", changed)
    message = refused(script, prepared, tmp_path / "out", "--lora", path, *words)
    assert says in message
    assert str(path) in message


def test_a_lora_before_its_first_step_is_noted(
    script: Script, prepared: Prepared, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    still = {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    (tmp_path / "lora").mkdir()
    path = saved(tmp_path / "lora" / "mine.safetensors", still)  # the only file of the folder
    flags = ["--pretrained_model_name_or_path", prepared.model, "--data_df_path", prepared.embeddings, "--plan"]
    result = script("inference", *flags, "--prompt", PROMPT, "--lora", tmp_path / "lora")
    assert result.code == 0
    assert f"note: {path} changes nothing: its last matrix or its alpha is zero" in result.out
