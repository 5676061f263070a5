"""LoRA files of other programs: each tensor is applied, at the right strength, or the file is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sd3_lora.transformer.lora_files
from sd3_lora.common.command_line import UserError
from sd3_lora.transformer.lora import LORA_FILE, attach_lora, save_lora, target_modules
from sd3_lora.transformer.lora_files import LoraFile, find_lora, read_lora_file, require_drawable

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

BLOCK = "transformer_blocks.0."
LAYERS = (BLOCK + "attn.to_q", BLOCK + "attn.add_k_proj", BLOCK + "ff.net.0.proj", "transformer_blocks.1.attn.to_out.0")
Tensors = dict[str, torch.Tensor]
Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]


def load_transformer(model: Path, dtype: torch.dtype = torch.float32) -> SD3Transformer2DModel:
    return SD3Transformer2DModel.from_pretrained(model / "transformer", torch_dtype=dtype)


@pytest.fixture
def transformer(tiny_sd3: Path) -> SD3Transformer2DModel:
    return load_transformer(tiny_sd3)


def pairs(transformer: SD3Transformer2DModel, ranks: tuple[int, ...] = (4, 4, 4, 4)) -> Pairs:
    """A and B of each of `LAYERS`."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name, rank in zip(LAYERS, ranks, strict=True):
        width_out, width_in = transformer.get_submodule(name).weight.shape
        a, b = torch.randn(rank, width_in, generator=generator), torch.randn(width_out, rank, generator=generator)
        found[name] = (a / math.sqrt(width_in), b)
    return found


def output(transformer: SD3Transformer2DModel) -> torch.Tensor:
    generator, dtype = torch.Generator().manual_seed(2), transformer.dtype
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 16, 8, 8, generator=generator).to(dtype),
            timestep=torch.tensor([900.0, 100.0]),
            encoder_hidden_states=torch.randn(2, 97, 48, generator=generator).to(dtype),
            pooled_projections=torch.randn(2, 24, generator=generator).to(dtype),
        ).sample.float()


def with_differences(model: Path, differences: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the base computes where these are added to its weights."""
    transformer = load_transformer(model)
    for name, difference in differences.items():
        transformer.get_submodule(name).weight.data += difference
    return output(transformer)


def drawn(transformer: SD3Transformer2DModel, path: Path) -> torch.Tensor:
    read_lora_file(path, transformer.config).attach(transformer, "lora_0")
    return output(transformer)


def in_diffusers(pairs: Pairs, prefix: str = "transformer.") -> Tensors:
    return {
        f"{prefix}{name}.lora_{part}.weight": tensor
        for name, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def written(path: Path, tensors: Mapping[str, torch.Tensor], adapter: Mapping[str, Any] | None = None) -> Path:
    """A file with these tensors, and PEFT's settings as diffusers keeps them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {f"transformer.{key}": value for key, value in (adapter or {}).items()}
    metadata = {"format": "pt", **({LORA_ADAPTER_METADATA_KEY: json.dumps(own)} if own else {})}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


# Names

FORMS: dict[str, Callable[[str], tuple[str, str, str]]] = {
    "diffusers": lambda name: (f"transformer.{name}", "lora_A.weight", "lora_B.weight"),
    "peft, of the transformer alone": lambda name: (name, "lora_A.weight", "lora_B.weight"),
    "peft, of a live model": lambda name: (name, "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers of 2023": lambda name: (f"transformer.{name}", "lora.down.weight", "lora.up.weight"),
    "down and up": lambda name: (f"transformer.{name}", "lora_down.weight", "lora_up.weight"),
    "ComfyUI's prefix": lambda name: (f"diffusion_model.{name}", "lora_A.weight", "lora_B.weight"),
    "OneTrainer": lambda name: (f"lora_transformer_{name.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
    "OneTrainer, with dots": lambda name: (f"lora_transformer.{name}", "lora_down.weight", "lora_up.weight"),
    "LyCORIS": lambda name: (f"lycoris_{name.replace('.', '_')}", "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("alpha", [None, "alpha", "lora.alpha"])
@pytest.mark.parametrize("form", FORMS)
def test_names_of_other_programs(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, form: str, alpha: str | None
) -> None:
    """Each layer adds alpha / rank B A; without an alpha B A."""
    own, tensors, differences = pairs(transformer), {}, {}
    for index, (name, (down, up)) in enumerate(own.items()):
        prefix, of_down, of_up = FORMS[form](name)
        tensors |= {f"{prefix}.{of_down}": down, f"{prefix}.{of_up}": up}
        tensors |= {f"{prefix}.{alpha}": torch.tensor(2.0 + index)} if alpha else {}
        differences[name] = up @ down * ((2.0 + index) / 4 if alpha else 1)
    expected = with_differences(tiny_sd3, differences)
    base = output(transformer)
    found = drawn(transformer, written(tmp_path / "foreign.safetensors", tensors))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (base - expected).abs().max() > 0.1


def test_our_own_file_is_drawn_as_trained(transformer: SD3Transformer2DModel, tiny_sd3: Path, tmp_path: Path) -> None:
    attach_lora(transformer, target_modules(transformer, None, None), 4, 12.0, 0.0, seed=0)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    path = save_lora(tmp_path, transformer, {"trigger": "sks"})
    loaded = load_transformer(tiny_sd3)
    torch.testing.assert_close(drawn(loaded, path), output(transformer), atol=1e-5, rtol=1e-5)
    assert read_lora_file(path, transformer.config).record == {"trigger": "sks", "rank": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_diffusers_own_loader(tiny_sd3: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    transformer, stock = load_transformer(tiny_sd3, dtype), load_transformer(tiny_sd3, dtype)
    path = written(tmp_path / LORA_FILE, in_diffusers(pairs(transformer)))
    stock.load_lora_adapter(str(tmp_path), weight_name=LORA_FILE)
    assert torch.equal(drawn(transformer, path), output(stock))


# Strength


@pytest.mark.parametrize(
    ("adapter", "ranks", "strengths"),
    [
        ({"r": 4, "lora_alpha": 2}, (4, 4, 4, 4), (0.5, 0.5, 0.5, 0.5)),
        ({"r": 4, "lora_alpha": 2, "use_rslora": True}, (4, 4, 4, 4), (1, 1, 1, 1)),
        ({"r": 4, "lora_alpha": 4}, (4, 2, 8, 1), (1, 2, 0.5, 4)),  # no rank_pattern: the shapes know
        (
            {"r": 4, "lora_alpha": 4, "rank_pattern": {"attn.to_q": 2}, "alpha_pattern": {"attn.to_q": 6}},
            (2, 4, 4, 4),
            (3, 1, 1, 1),
        ),
        ({"r": 9, "lora_alpha": 3, "alpha_pattern": {"^" + LAYERS[2]: 18}}, (9, 9, 9, 9), (1 / 3, 1 / 3, 2, 1 / 3)),
    ],
    ids=["alpha", "rslora", "mixed ranks", "patterns", "a pattern of one layer"],
)
@pytest.mark.parametrize("kept", ["in the metadata", "in an adapter folder"])
def test_strength_by_peft_settings(
    tiny_sd3: Path,
    transformer: SD3Transformer2DModel,
    tmp_path: Path,
    adapter: dict[str, Any],
    ranks: tuple[int, ...],
    strengths: tuple[float, ...],
    kept: str,
) -> None:
    own = pairs(transformer, ranks)
    if kept == "in the metadata":
        path = written(tmp_path / LORA_FILE, in_diffusers(own), adapter)
    else:
        path = written(tmp_path / "adapter_model.safetensors", in_diffusers(own, "base_model.model."))
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **adapter}))
        assert find_lora(str(tmp_path)) == path
    differences = {
        name: strength * up @ down for (name, (down, up)), strength in zip(own.items(), strengths, strict=True)
    }
    torch.testing.assert_close(drawn(transformer, path), with_differences(tiny_sd3, differences), atol=5e-5, rtol=1e-4)


def test_without_settings_the_strength_is_one(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path
) -> None:
    own = pairs(transformer, (4, 2, 8, 1))
    path = written(tmp_path / "adapter_model.safetensors", in_diffusers(own))  # its name alone makes it no adapter
    expected = with_differences(tiny_sd3, {name: up @ down for name, (down, up) in own.items()})
    torch.testing.assert_close(drawn(transformer, path), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_that_peft_saved(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, use_rslora: bool, use_dora: bool
) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["attn.to_q", "attn.to_k"],
        rank_pattern={BLOCK + "attn.to_q": 2},
        alpha_pattern={BLOCK + "attn.to_k": 1},
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    model = get_peft_model(load_transformer(tiny_sd3), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data *= 1.5
    model.save_pretrained(tmp_path)
    found = drawn(transformer, find_lora(str(tmp_path)))
    torch.testing.assert_close(found, output(model.base_model.model), atol=5e-5, rtol=1e-4)


def test_two_alphas_that_differ_are_refused(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    tensors = in_diffusers(pairs(transformer))
    alphas = {f"transformer.{name}.alpha": torch.tensor(2.0) for name in LAYERS}
    agreeing = written(tmp_path / "agreeing.safetensors", {**tensors, **alphas}, {"r": 4, "lora_alpha": 2})
    layers = read_lora_file(agreeing, transformer.config).layers
    assert {layer.alpha / layer.rank for layer in layers.values()} == {0.5}
    path = written(tmp_path / "differing.safetensors", {**tensors, **alphas}, {"r": 4, "lora_alpha": 4})
    with pytest.raises(UserError, match=r"says alpha 2 beside the tensors of .* and 4 in its metadata"):
        read_lora_file(path, transformer.config)


def test_hundreds_of_ranks_and_alphas_are_few_patterns(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    """PEFT tries each pattern on each layer, and past 512 of them compiles each anew."""
    tensors = {}
    for index, name in enumerate(target_modules(transformer, None, None)):
        rank = 1 + index % 3
        width_out, width_in = transformer.get_submodule(name).weight.shape
        tensors |= in_diffusers({name: (torch.randn(rank, width_in), torch.randn(width_out, rank))})
        tensors[f"transformer.{name}.alpha"] = torch.tensor(float(rank % 2 + 1))
    lora = read_lora_file(written(tmp_path / LORA_FILE, tensors), transformer.config)
    config = lora._config()
    assert len(config.rank_pattern) == 2
    assert len(config.alpha_pattern) == 1
    lora.attach(transformer, "lora_0")
    for name, layer in lora.layers.items():
        assert transformer.get_submodule(name).scaling["lora_0"] == layer.alpha / layer.rank


# DoRA


def magnitudes(transformer: SD3Transformer2DModel) -> Tensors:
    """By layer, `(out,)`: a half more than the weight's own."""
    return {name: 1.5 * transformer.get_submodule(name).weight.norm(dim=1).detach() for name in LAYERS}


def dora_differences(transformer: SD3Transformer2DModel, own: Pairs, strength: float) -> Tensors:
    """m (W + s B A) / |W + s B A| - W, each row for itself (DoRA, arXiv 2402.09353, equation 5)."""
    differences = {}
    for name, (down, up) in own.items():
        weight = transformer.get_submodule(name).weight.detach()
        merged = weight + strength * up @ down
        differences[name] = (magnitudes(transformer)[name] / merged.norm(dim=1))[:, None] * merged - weight
    return differences


def dora_file(transformer: SD3Transformer2DModel, path: Path, key: str, alpha: float = 4.0, **adapter: Any) -> Path:
    tensors = in_diffusers(pairs(transformer))
    for name, magnitude in magnitudes(transformer).items():
        tensors[f"transformer.{name}.{key}"] = magnitude[:, None] if key == "dora_scale" else magnitude
        tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    return written(path, tensors, adapter)


@pytest.mark.parametrize("alpha", [4.0, 2.0])
@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "dora_scale", "magnitude"])
def test_dora(tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, key: str, alpha: float) -> None:
    """Whether the metadata say so or not; base plus the explicit difference of the weights."""
    expected = with_differences(tiny_sd3, dora_differences(transformer, pairs(transformer), alpha / 4))
    path = dora_file(transformer, tmp_path / "dora.safetensors", key, alpha)
    told = dora_file(transformer, tmp_path / "told.safetensors", key, alpha, r=4, lora_alpha=alpha, use_dora=True)
    torch.testing.assert_close(drawn(load_transformer(tiny_sd3), told), expected, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(drawn(transformer, path), expected, atol=5e-5, rtol=1e-4)


def test_magnitudes_stay_in_float32(tiny_sd3: Path, tmp_path: Path) -> None:
    """Rounded to bfloat16 they would be off by up to 0.4 %, a whole row at a time."""
    transformer = load_transformer(tiny_sd3, torch.bfloat16)
    own = magnitudes(load_transformer(tiny_sd3))
    path = dora_file(load_transformer(tiny_sd3), tmp_path / LORA_FILE, "lora_magnitude_vector")
    read_lora_file(path, transformer.config).attach(transformer, "lora_0")
    for name, magnitude in own.items():
        layer = transformer.get_submodule(name)
        assert torch.equal(layer.lora_magnitude_vector["lora_0"].weight, magnitude)
        assert layer.lora_A["lora_0"].weight.dtype == torch.bfloat16
    assert torch.isfinite(output(transformer)).all()


def test_a_dora_is_drawn_whole_or_not_at_all(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    plain = read_lora_file(
        written(tmp_path / "plain.safetensors", in_diffusers(pairs(transformer))), transformer.config
    )
    path = dora_file(transformer, tmp_path / "dora.safetensors", "lora_magnitude_vector")
    dora = read_lora_file(path, transformer.config)
    require_drawable([dora], [1.0], is_streamed=False)
    require_drawable([plain, plain], [0.5, 2.0], is_streamed=True)
    for loras, scales, is_streamed, says in (
        ([dora], [0.5], False, "which has one strength: leave out --lora_scale 0.5"),
        ([plain, dora], [1.0, 1.0], False, "does not add up with other LoRAs: give one --lora alone"),
        ([dora], [1.0], True, "cannot be streamed to the device: type --stream_blocks 0"),
    ):
        with pytest.raises(UserError, match=rf"dora\.safetensors is a DoRA.*{says}"):
            require_drawable(loras, scales, is_streamed)


def test_a_dora_needs_room_for_its_largest_layer(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    plain = written(tmp_path / "plain.safetensors", in_diffusers(pairs(transformer)))
    dora = dora_file(transformer, tmp_path / "dora.safetensors", "lora_magnitude_vector")
    largest = transformer.get_submodule(BLOCK + "ff.net.0.proj").weight
    assert read_lora_file(plain, transformer.config).device_bytes == plain.stat().st_size
    expected = dora.stat().st_size + 4 * (largest.shape[1] ** 2 + 3 * largest.numel())
    assert read_lora_file(dora, transformer.config).device_bytes == expected


@pytest.mark.parametrize("kind", ["of another width", "of some layers", "of no layer"])
def test_magnitudes_that_are_not_drawn(transformer: SD3Transformer2DModel, tmp_path: Path, kind: str) -> None:
    tensors = in_diffusers(pairs(transformer))
    name = LAYERS[0]
    width_out, width_in = transformer.get_submodule(name).weight.shape
    if kind == "of another width":
        tensors[f"transformer.{name}.dora_scale"] = torch.ones(1, width_in + 1)
    elif kind == "of some layers":
        tensors[f"transformer.{name}.dora_scale"] = torch.ones(width_out, 1)
    path = written(tmp_path / LORA_FILE, tensors, {"r": 4, "lora_alpha": 4, "use_dora": True})
    says = (
        r"dora_scale does not fit" if kind == "of another width" else "is a DoRA that lacks magnitudes of some layers"
    )
    with pytest.raises(UserError, match=says):
        read_lora_file(path, transformer.config)


# Refused, by name

Q = f"transformer.{BLOCK}attn.to_q"
KOHYA = "lora_unet_joint_blocks_0_x_block_attn_qkv"


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (f"{Q}.hada_t1", "is a LyCORIS LoHa or LoKr with a Tucker decomposition"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_t2", "is a LyCORIS LoHa or LoKr with a Tucker decomposition"),
        ("lycoris_transformer_blocks_0_attn_to_q.lokr_w1", "lacks a part|has a LyCORIS LoKr or LoHa with a plain LoRA"),
        ("lycoris_transformer_blocks_7_attn_to_q.lokr_w1", "was trained on another model"),
        (f"{KOHYA}.oft_blocks", "is an OFT adapter"),
        (f"{Q}.a1.weight", "is a LyCORIS GLoRA"),
        (f"{KOHYA}.lora_mid.weight", "is a LyCORIS LoCon with a Tucker decomposition"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
            "has LoRA layers of text encoders.*does not apply",
        ),
        (
            "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
            "has LoRA layers of text encoders.*does not apply",
        ),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "has LoRA layers of text encoders"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k.alpha", "holds LoRA layers of T5.*ComfyUI"),
        ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.k.lora_A.weight", "holds LoRA layers of T5"),
        ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k.lora_A.weight", "layers of T5"),
        ("base_model.model.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "by names that are not known here"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "by names that are not known here"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "was trained on Flux"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "was trained on Flux"),
        ("lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight", "was trained on Stable Diffusion 1, 2 or XL"),
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight", "was trained on Stable Diffusion 1, 2 or XL"),
        ("clip_l", "holds a textual inversion"),
        ("bundle_emb.sks.clip_g", "holds a textual inversion"),
        (f"base_model.model.{BLOCK}attn.to_q.base_layer.weight", "holds whole weights"),
        ("transformer.pos_embed.proj.weight", "holds whole weights"),
        (f"{BLOCK}attn.to_q.weight", "holds whole weights"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "holds whole weights"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight", "holds whole weights"),
        ("transformer.transformer_blocks.2.attn.to_q.lora_A.weight", "was trained on another model"),
        ("lora_transformer_transformer_blocks_23_attn_to_q.alpha", "was trained on another model"),
        ("step", "has the tensor step, which is of no LoRA format known here: docs/loras.md"),
        (f"{Q}.set_weight", "holds weights of norms, or whole ones in place of the base's"),
        ("lycoris_transformer_blocks_0_norm1.w_norm", "holds weights of norms"),
        ("diffusion_model.joint_blocks.3.context_block.attn.qkv.lora_A.weight", "was trained on another model"),
        ("lora_unet_joint_blocks_23_x_block_mlp_fc1.alpha", "was trained on another model"),
        (f"{Q}.lora_C.weight", "which is of no LoRA format known here"),
    ],
)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a whole LoRA"])
def test_a_tensor_that_is_not_applied(
    transformer: SD3Transformer2DModel, tmp_path: Path, key: str, says: str, beside: bool
) -> None:
    tensors = {**(in_diffusers(pairs(transformer)) if beside else {}), key: torch.ones(4, 4)}
    path = written(tmp_path / LORA_FILE, tensors)
    with pytest.raises(UserError, match=says) as error:
        read_lora_file(path, transformer.config)
    assert str(error.value).startswith(str(path))
    assert key in str(error.value)


@pytest.mark.parametrize("key", [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight", f"transformer.{LAYERS[3]}.lora_B.weight"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("left out", "lacks a part of the LoRA of"),
        ("nan", "has NaN or infinity in"),
        ("inf", "has NaN or infinity in"),
        ("rank", "do not fit together"),
        ("width", "was trained on another model"),
        ("a vector", "do not fit together"),
        ("a convolution's", "do not fit together"),
        ("int8", "is quantized"),
    ],
)
def test_damaged_tensors(transformer: SD3Transformer2DModel, tmp_path: Path, key: str, damage: str, says: str) -> None:
    tensors = in_diffusers(pairs(transformer))
    is_down, tensor = "lora_A" in key, tensors[key]
    if damage == "left out":
        del tensors[key]
    elif damage in ("nan", "inf"):
        tensor[1, 2] = float(damage)
    elif damage in ("rank", "width"):
        tensors[key] = torch.cat([tensor, tensor], dim=int(is_down == (damage == "width")))
    else:
        other = {
            "a vector": tensor.flatten(),
            "a convolution's": tensor[:, :, None, None],
            "int8": tensor.to(torch.int8),
        }
        tensors[key] = other[damage]
    path = written(tmp_path / LORA_FILE, tensors)
    with pytest.raises(UserError, match=says):
        read_lora_file(path, transformer.config)


def test_a_layer_that_is_not_linear(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    convolution = transformer.pos_embed.proj
    tensors = in_diffusers(pairs(transformer)) | {
        "transformer.pos_embed.proj.lora_A.weight": torch.ones(4, *convolution.weight.shape[1:]),
        "transformer.pos_embed.proj.lora_B.weight": torch.ones(convolution.out_channels, 4, 1, 1),
    }
    with pytest.raises(UserError, match=r"has a LoRA on pos_embed\.proj, which is no linear layer, and is not drawn"):
        read_lora_file(written(tmp_path / LORA_FILE, tensors), transformer.config)


def test_no_tensors_two_of_one_place_and_bad_alphas(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    whole = in_diffusers(pairs(transformer))
    for tensors, says in (
        ({}, "holds no tensor"),
        ({**whole, f"{LAYERS[0]}.lora_A.weight": whole[f"{Q}.lora_A.weight"].clone()}, "has two tensors for one place"),
        ({**whole, f"{Q}.alpha": torch.ones(2)}, "is not one number"),
        ({**whole, f"{Q}.alpha": torch.tensor(math.nan)}, "has NaN or infinity in .*alpha"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, "lacks a part of the LoRA of"),
    ):
        with pytest.raises(UserError, match=says):
            read_lora_file(written(tmp_path / LORA_FILE, tensors), transformer.config)


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"peft_type": "LOKR"}, "is of PEFT's LOKR, which is not drawn here"),
        ({"init_lora_weights": "pissa_niter_4"}, "says init_lora_weights pissa_niter_4, which fits a base that it"),
        ({"use_qalora": True}, "says use_qalora True, which is not drawn here"),
        ({"alora_invocation_tokens": [3]}, "says alora_invocation_tokens"),
        ({"made_up_next_year": "yes"}, "says made_up_next_year yes"),
        ({"lora_alpha": "four"}, "cannot be read"),
        ({"lora_alpha": math.nan}, "cannot be read"),
        ({"alpha_pattern": {"(": 4}}, "cannot be read"),
    ],
)
def test_settings_that_are_not_drawn(
    transformer: SD3Transformer2DModel, tmp_path: Path, adapter: dict[str, Any], says: str
) -> None:
    own = pairs(transformer)
    path = written(tmp_path / "adapter_model.safetensors", in_diffusers(own, "base_model.model."))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, **adapter}))
    with pytest.raises(UserError, match=says):
        read_lora_file(path, transformer.config)
    for text in ("{", "[[1, 2]]", "null"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            read_lora_file(path, transformer.config)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"is a PEFT adapter without its adapter_config\.json"):
        read_lora_file(path, transformer.config)
    path = written(tmp_path / LORA_FILE, in_diffusers(own), {"r": 4, "lora_alpha": 4, **adapter})
    with pytest.raises(UserError, match=says):
        read_lora_file(path, transformer.config)


def test_every_setting_that_peft_writes_is_known(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    """What diffusers itself saves is not refused for a setting at its default."""
    config = LoraConfig(r=4, target_modules=list(LAYERS)).to_dict()
    plain = {key: list(value) if isinstance(value, set) else value for key, value in config.items()}
    path = written(tmp_path / LORA_FILE, in_diffusers(pairs(transformer)), json.loads(json.dumps(plain, default=str)))
    read_lora_file(path, transformer.config)
    transformer.add_adapter(LoraConfig(r=4, target_modules=list(LAYERS)))
    transformer.save_lora_adapter(tmp_path / "saved", weight_name=LORA_FILE)
    layers = read_lora_file(tmp_path / "saved" / LORA_FILE, transformer.config).layers
    assert {layer.alpha / layer.rank for layer in layers.values()} == {2.0}


# What a file does


def test_whether_it_has_an_effect(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    own = pairs(transformer)

    def has_effect(tensors: Tensors) -> bool:
        return read_lora_file(written(tmp_path / LORA_FILE, tensors), transformer.config).has_effect

    assert has_effect(in_diffusers(own))
    fresh = in_diffusers({name: (down, torch.zeros_like(up)) for name, (down, up) in own.items()})
    assert not has_effect(fresh)
    alphas = {f"transformer.{name}.alpha": torch.tensor(0.0) for name in LAYERS}
    assert not has_effect({**in_diffusers(own), **alphas})
    assert has_effect({**fresh, f"{Q}.lora_B.weight": own[LAYERS[0]][1]})


def test_identity_tells_files_and_their_settings_apart(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    """The same adapter_model beside other settings is another picture; a plain file's identity is its hash alone."""
    path = written(tmp_path / "adapter_model.safetensors", in_diffusers(pairs(transformer), "base_model.model."))

    def identity(**settings: Any) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, **settings}))
        return read_lora_file(path, transformer.config).identity()

    plain, half, third = (identity(lora_alpha=alpha) for alpha in (4, 2, 1))
    assert len({plain, half, third}) == 3
    assert len(plain) == 12
    assert half.startswith(plain)


def test_an_old_torchao_does_not_matter(
    transformer: SD3Transformer2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colab has one. PEFT raises where it looks for it."""

    def fail() -> bool:
        raise ImportError("Found an incompatible version of torchao")

    monkeypatch.setattr(peft.tuners.lora.torchao, "is_torchao_available", fail)
    base = output(transformer)
    found = drawn(transformer, written(tmp_path / LORA_FILE, in_diffusers(pairs(transformer))))
    assert not torch.equal(found, base)


@pytest.mark.filterwarnings("error")
def test_several_files_add_up(tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    """Of other ranks and layers, each at its own scale."""
    first, second = pairs(transformer), pairs(transformer, (1, 2, 3, 8))
    del second[LAYERS[1]]
    for index, own in enumerate((first, second)):
        path = written(tmp_path / f"{index}.safetensors", in_diffusers(own))
        read_lora_file(path, transformer.config).attach(transformer, f"lora_{index}")
    transformer.set_adapters(["lora_0", "lora_1"], [0.5, -2.0])
    differences = {name: 0.5 * up @ down for name, (down, up) in first.items()}
    for name, (down, up) in second.items():
        differences[name] = differences[name] - 2 * up @ down
    torch.testing.assert_close(output(transformer), with_differences(tiny_sd3, differences), atol=2e-4, rtol=1e-4)


# Finding


def test_find_lora(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    path = folder / LORA_FILE
    with pytest.raises(UserError, match=f"mine holds no {LORA_FILE}: give the training's --output_dir"):
        find_lora(str(folder))
    (folder / "other.safetensors").write_bytes(b"")
    assert find_lora(str(folder)) == folder / "other.safetensors"  # the only one, whatever its name
    (folder / "another.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds 2 safetensors files .* such as .*another\.safetensors"):
        find_lora(str(folder))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert find_lora(str(folder)) == folder / "adapter_model.safetensors"
    path.write_bytes(b"")
    assert find_lora(str(folder)) == find_lora(str(path)) == path
    for name in ("nobody/nothing", str(tmp_path / "other"), "???"):
        with pytest.raises(UserError, match="is neither a file or folder here nor a LoRA on the hub"):
            find_lora(name)
    with pytest.raises(UserError, match="there is no such file"):
        find_lora("outputs/mine.safetensors")
    (folder / "mine.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a pickle.*give a \.safetensors file"):
        find_lora(str(folder / "mine.pt"))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([LORA_FILE, "other.safetensors"], LORA_FILE),
        (["README.md", "sub/x.safetensors", "mine.safetensors"], "mine.safetensors"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_model.safetensors"),
        (["a.safetensors", "b.safetensors"], None),
    ],
)
def test_find_lora_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], found: str | None
) -> None:
    fetched = []

    def download(_: str, name: str) -> str:
        if name not in files:
            raise EntryNotFoundError(name)
        fetched.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr(sd3_lora.transformer.lora_files, "hf_hub_download", download)
    monkeypatch.setattr(sd3_lora.transformer.lora_files.HfApi, "list_repo_files", lambda *_: files)
    if found is None:
        with pytest.raises(UserError, match="holds 2 safetensors files"):
            find_lora("somebody/lora")
        return
    assert find_lora("somebody/lora") == tmp_path / found
    assert ("adapter_config.json" in fetched) == ("adapter_config.json" in files)


def test_old_work(miniature_files: Any, tmp_path: Path) -> None:
    """The LoRA of an earlier build, as it always was: strength 1, and the identity that its pictures hold."""
    data = Path(__file__).parent.parent / "data" / "cc752f5" / "adamw"
    shutil.copytree(data, tmp_path / "adamw")
    lora: LoraFile = read_lora_file(find_lora(str(tmp_path / "adamw")), miniature_files.read_config("transformer"))
    assert {layer.alpha / layer.rank for layer in lora.layers.values()} == {1.0}
    assert len(lora.identity()) == 12
    assert lora.record["resolution"] == 64
