"""LoRAs in the original SD3's names, and of other forms: drawn as the original's weights plus the difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.transformer.lora import LORA_FILE, LoraKind
from sd3_lora.transformer.lora_exports import export_lora
from sd3_lora.transformer.lora_files import LoraFile, read_lora_file, require_drawable
from sd3_lora.transformer.lora_starts import require_start
from sd3_lora.transformer.merged_weights import write_merged

import pytest
import torch
from diffusers import SD3Transformer2DModel
from original_sd3 import CONFIG, WIDTH, Base, Tensors, apply_by_comfyui, apply_by_sd_scripts, in_diffusers, velocity
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora_exports import trained

QKV, PROJ, MLP = (
    "joint_blocks.1.x_block.attn.qkv",
    "joint_blocks.0.context_block.attn.proj",
    "joint_blocks.1.x_block.mlp.fc1",
)
SECOND, SHORT = "joint_blocks.0.x_block.attn2.qkv", "joint_blocks.2.context_block.adaLN_modulation.1"
LAST, MODULATION = "final_layer.adaLN_modulation.1", "joint_blocks.0.x_block.adaLN_modulation.1"
LAYERS = (QKV, PROJ, MLP, SECOND, SHORT, LAST, MODULATION, "context_embedder", "t_embedder.mlp.2", "final_layer.linear")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.saved(tmp_path_factory.mktemp("base"))


def flat(layer: str, prefix: str = "lora_unet_") -> str:
    return prefix + layer.replace(".", "_")


def draw(*shape: int, seed: int = 3) -> torch.Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def written(path: Path, tensors: Tensors) -> LoraFile:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return read_lora_file(path, CONFIG)


def with_differences(base: Base, differences: Tensors) -> torch.Tensor:
    """What the original computes where these are added to its weights."""
    original = dict(base.original)
    for name, difference in differences.items():
        original[name] = original[name] + difference
    return velocity(in_diffusers(original, CONFIG))


def is_close(found: torch.Tensor, expected: torch.Tensor, base: Base) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (expected - velocity(base.transformer())).abs().max() > 0.003


# Names of the original, of which q, k and v are one layer

FORMS: dict[str, Callable[[str], tuple[str, str, str]]] = {
    "sd-scripts": lambda layer: (flat(layer), "lora_down.weight", "lora_up.weight"),
    "LyCORIS on sd-scripts": lambda layer: (flat(layer), "lora_down.weight", "lora_up.weight"),
    "ComfyUI": lambda layer: (f"diffusion_model.{layer}", "lora_A.weight", "lora_B.weight"),
    "the original alone": lambda layer: (layer, "lora_down.weight", "lora_up.weight"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_alpha", [True, False])
def test_original_names(base: Base, tmp_path: Path, form: str, with_alpha: bool) -> None:
    """q, k and v share a lora_down; halves of three modulations stand in the other order."""
    tensors, differences = {}, {}
    for index, layer in enumerate(LAYERS):
        height, width = base.original[f"{layer}.weight"].shape
        down, up, name = draw(3, width), draw(height, 3), FORMS[form](layer)
        tensors |= {f"{name[0]}.{name[1]}": down, f"{name[0]}.{name[2]}": up}
        tensors |= {f"{name[0]}.alpha": torch.tensor(1.0 + index)} if with_alpha else {}
        differences[f"{layer}.weight"] = up @ down * ((1 + index) / 3 if with_alpha else 1)
    lora = written(tmp_path / "kohya.safetensors", tensors)
    is_close(base.drawn(lora), with_differences(base, differences), base)
    assert {layer.rank for layer in lora.layers.values()} == {3}
    assert len(lora.layers) == len(LAYERS) + 4


def test_every_layer_of_sd_scripts(base: Base, tmp_path: Path) -> None:
    """Against sd-scripts' own way to apply it."""
    tensors = {}
    for name, weight in base.original.items():
        if name.endswith(".weight") and weight.dim() == 2:
            key = flat(name.removesuffix(".weight"))
            tensors |= {f"{key}.lora_down.weight": draw(2, weight.shape[1]), f"{key}.alpha": torch.tensor(4.0)}
            tensors[f"{key}.lora_up.weight"] = draw(len(weight), 2)
    expected = velocity(in_diffusers(apply_by_sd_scripts(base.original, tensors), CONFIG))
    lora = written(tmp_path / "kohya.safetensors", tensors)
    linears = {name for name, module in base.transformer().named_modules() if isinstance(module, torch.nn.Linear)}
    assert lora.layers.keys() == linears
    is_close(base.drawn(lora), expected, base)


@pytest.mark.parametrize("form", ["kohya", "a1111"])
def test_our_own_exports(base: Base, tmp_path: Path, form: str) -> None:
    """Of a block-diagonal file each layer gets its own rank back; a layer that was not trained is not there."""
    ranks = LoraKind(ranks={"attn.to_q": 2, "add_v_proj": 5})
    layers = ["attn.to_q", "attn.to_v", "attn.add_v_proj", "attn2.to_k", "attn.to_out.0", "norm1_context.linear"]
    lora = trained(base, tmp_path, layers, 4, 6, ranks)
    export_lora(lora, form, tmp_path / "exported.safetensors", base.files)
    again = read_lora_file(tmp_path / "exported.safetensors", CONFIG)
    assert {name: layer.rank for name, layer in again.layers.items()} == {
        name: layer.rank for name, layer in lora.layers.items()
    }
    torch.testing.assert_close(base.drawn(again), base.drawn(lora), atol=1e-5, rtol=1e-5)
    assert again.record["trigger"] == lora.record["trigger"]
    require_start(again, {name: layer.rank for name, layer in lora.layers.items()}, LoraKind())


def test_a_joined_layer_without_effect(base: Base, tmp_path: Path) -> None:
    key = flat(QKV)
    tensors = {f"{key}.lora_down.weight": draw(3, WIDTH), f"{key}.lora_up.weight": torch.zeros(3 * WIDTH, 3)}
    lora = written(tmp_path / LORA_FILE, tensors)
    assert not lora.has_effect
    assert len(lora.layers) == 3


def test_onetrainers_omi_form(base: Base, tmp_path: Path) -> None:
    """The original's names with dots, q, k and v numbered; the last modulation's halves in the original's order."""
    tensors, differences = {}, {}
    for part in range(3):
        down, up = draw(2, WIDTH, seed=part), draw(WIDTH, 2, seed=part)
        name = f"transformer.{QKV}.{part}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
        rows = torch.zeros(3 * WIDTH, WIDTH)
        rows[part * WIDTH : (part + 1) * WIDTH] = up @ down / 2
        differences[f"{QKV}.weight"] = differences.get(f"{QKV}.weight", 0) + rows
    down, up = draw(2, WIDTH), draw(2 * WIDTH, 2)
    tensors |= {f"transformer.{LAST}.lora_down.weight": down, f"transformer.{LAST}.lora_up.weight": up}
    differences[f"{LAST}.weight"] = up @ down
    is_close(base.drawn(written(tmp_path / LORA_FILE, tensors)), with_differences(base, differences), base)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (f"{flat(QKV)}.lora_down.weight", "lacks a part of the LoRA of transformer_blocks.1.attn.to_q"),
        (f"{flat('x_embedder.proj')}.lora_down.weight", r"has a LoRA on pos_embed\.proj, which is no linear layer"),
        (f"{flat('joint_blocks.7.x_block.mlp.fc1')}.alpha", "was trained on another model"),
        (f"diffusion_model.{SECOND.replace('0', '2')}.lora_A.weight", "was trained on another model"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "has LoRA layers of text encoders"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_k.alpha", "holds LoRA layers of T5"),
        ("t5.encoder.block.0.layer.0.SelfAttention.k.lora_down.weight", "holds LoRA layers of T5"),
        ("clip_g.text_model.encoder.layers.0.mlp.fc1.lora_up.weight", "has LoRA layers of text encoders"),
    ],
)
def test_what_is_not_whole_is_refused(base: Base, tmp_path: Path, key: str, says: str) -> None:
    tensors = {f"{flat(PROJ)}.lora_down.weight": draw(2, WIDTH), f"{flat(PROJ)}.lora_up.weight": draw(WIDTH, 2)}
    written(tmp_path / LORA_FILE, tensors)
    with pytest.raises(UserError, match=says):
        written(tmp_path / LORA_FILE, {**tensors, key: torch.ones(2, WIDTH)})
    if "attn_qkv" in key:
        wrong = {f"{flat(QKV)}.lora_down.weight": draw(2, WIDTH), f"{flat(QKV)}.lora_up.weight": draw(WIDTH, 2)}
        with pytest.raises(UserError, match="was trained on another model"):
            written(tmp_path / LORA_FILE, wrong)


def test_one_layer_in_both_names(tmp_path: Path) -> None:
    tensors = {f"{flat(QKV)}.lora_down.weight": draw(2, WIDTH), f"{flat(QKV)}.lora_up.weight": draw(3 * WIDTH, 2)}
    name = "transformer.transformer_blocks.1.attn.to_k"
    tensors |= {f"{name}.lora_A.weight": draw(2, WIDTH), f"{name}.lora_B.weight": draw(WIDTH, 2)}
    with pytest.raises(UserError, match="has two tensors for one place"):
        written(tmp_path / LORA_FILE, tensors)


# DoRA


def dora_weight(weight: torch.Tensor, product: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """LyCORIS' and OneTrainer's rule: the changed weight with these norms, of its rows or of its columns."""
    merged = weight + product
    return magnitudes * merged / merged.norm(dim=1 if magnitudes.shape[1] == 1 else 0, keepdim=True)


@pytest.mark.parametrize("layer", [QKV, PROJ, SECOND, SHORT])
def test_a_dora_of_outputs(base: Base, tmp_path: Path, layer: str) -> None:
    key, weight = flat(layer), base.original[f"{layer}.weight"]
    down, up = draw(2, weight.shape[1]), draw(len(weight), 2)
    magnitudes = weight.norm(dim=1, keepdim=True) * (1 + draw(len(weight), 1))
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": magnitudes}
    lora = written(tmp_path / LORA_FILE, {**tensors, f"{key}.alpha": torch.tensor(1.0)})
    difference = dora_weight(weight, up @ down / 2, magnitudes) - weight
    is_close(base.drawn(lora), with_differences(base, {f"{layer}.weight": difference}), base)


@pytest.mark.parametrize("form", ["sd-scripts", "OneTrainer", "diffusers"])
def test_a_dora_of_inputs(base: Base, tmp_path: Path, form: str) -> None:
    """OneTrainer's default, and older LyCORIS'. PROJ is square: the shape alone tells the axis."""
    names = {
        "sd-scripts": flat(PROJ),
        "OneTrainer": "lora_transformer_transformer_blocks_0_attn_to_add_out",
        "diffusers": "transformer.transformer_blocks.0.attn.to_add_out",
    }
    key, weight = names[form], base.original[f"{PROJ}.weight"]
    down, up = draw(2, WIDTH), draw(WIDTH, 2)
    magnitudes = weight.norm(dim=0, keepdim=True) * (1 + draw(1, WIDTH))
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": magnitudes}
    lora = written(tmp_path / LORA_FILE, {**tensors, f"{key}.alpha": torch.tensor(1.0)})
    difference = dora_weight(weight, up @ down / 2, magnitudes) - weight
    is_close(base.drawn(lora), with_differences(base, {f"{PROJ}.weight": difference}), base)
    transformer = base.transformer()
    lora.attach(transformer, "lora_0")
    transformer.disable_adapters()
    assert torch.equal(velocity(transformer), velocity(base.transformer()))
    for scale, is_streamed, says in ((0.5, False, "one strength"), (1.0, True, "cannot be streamed")):
        with pytest.raises(UserError, match=says):
            require_drawable([lora], [scale], is_streamed)
    with pytest.raises(UserError, match="has magnitudes of the layers' inputs, which are not trained here"):
        require_start(lora, {}, LoraKind(use_dora=True))
    export_lora(lora, "kohya", tmp_path / "exported.safetensors", base.files)
    again = apply_by_comfyui(base.original, load_file(tmp_path / "exported.safetensors"))
    torch.testing.assert_close(velocity(in_diffusers(again, CONFIG)), base.drawn(lora), atol=1e-4, rtol=1e-3)


def test_a_dora_of_the_inputs_of_joined_layers(tmp_path: Path) -> None:
    key = flat(QKV)
    tensors = {f"{key}.lora_down.weight": draw(2, WIDTH), f"{key}.lora_up.weight": draw(3 * WIDTH, 2)}
    with pytest.raises(UserError, match="is a DoRA with magnitudes of the inputs of q, k and v as one layer"):
        written(tmp_path / LORA_FILE, {**tensors, f"{key}.dora_scale": torch.ones(1, WIDTH)})


# Whole differences, and biases


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("names", ["LyCORIS", "sd-scripts"])
def test_whole_differences(base: Base, tmp_path: Path, names: str, with_bias: bool) -> None:
    """LyCORIS' full: layers of more outputs, of more inputs, and square; joined and in diffusers' names."""
    own = {PROJ: "transformer_blocks_0_attn_to_add_out", MLP: "transformer_blocks_1_ff_net_0_proj"}
    own |= {MLP.replace("fc1", "fc2"): "transformer_blocks_1_ff_net_2"}
    layers = {layer: f"lycoris_{name}" for layer, name in own.items()}
    if names == "sd-scripts":
        layers = {layer: flat(layer) for layer in (*own, QKV, SHORT)}
    tensors, differences = {}, {}
    for layer, key in layers.items():
        differences[f"{layer}.weight"] = tensors[f"{key}.diff"] = draw(*base.original[f"{layer}.weight"].shape)
        if with_bias and layer != PROJ:
            differences[f"{layer}.bias"] = tensors[f"{key}.diff_b"] = draw(len(base.original[f"{layer}.bias"]))
    lora = written(tmp_path / LORA_FILE, tensors)
    is_close(base.drawn(lora), with_differences(base, differences), base)
    merged = merged_by_us(base, lora, tmp_path / "merged")
    is_close(velocity(merged), with_differences(base, differences), base)
    export_lora(lora, "kohya", tmp_path / "exported.safetensors", base.files)
    again = apply_by_comfyui(base.original, load_file(tmp_path / "exported.safetensors"))
    torch.testing.assert_close(velocity(in_diffusers(again, CONFIG)), base.drawn(lora), atol=2e-3, rtol=2e-3)


def merged_by_us(base: Base, lora: LoraFile, folder: Path, scale: float = 1.0) -> SD3Transformer2DModel:
    folder.mkdir()
    write_merged(lora, scale, base.files.weight_files("transformer"), folder)
    transformer = base.transformer()
    transformer.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return transformer


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_two_whole_differences_add_up(base: Base, tmp_path: Path, scale: float) -> None:
    differences = [draw(WIDTH, WIDTH, seed=seed) for seed in (1, 2)]
    transformer = base.transformer()
    for index, difference in enumerate(differences):
        key = "lycoris_transformer_blocks_0_attn_to_add_out.diff"
        written(tmp_path / f"{index}.safetensors", {key: difference}).attach(transformer, f"lora_{index}")
    transformer.set_adapters(["lora_0", "lora_1"], [scale, 2.0])
    expected = with_differences(base, {f"{PROJ}.weight": scale * differences[0] + 2 * differences[1]})
    is_close(velocity(transformer), expected, base)


@pytest.mark.parametrize(
    ("key", "shape", "says"),
    [
        ("lora_down.weight", (2, WIDTH), "beside .*diff, which is not drawn here"),
        ("dora_scale", (WIDTH, 1), "beside .*diff, which is not drawn here"),
        ("diff_b", (WIDTH + 1,), "was trained on another model"),
        ("diff", (WIDTH, WIDTH + 1), "was trained on another model"),
    ],
)
def test_whole_differences_that_do_not_fit(tmp_path: Path, key: str, shape: tuple[int, ...], says: str) -> None:
    name = "lycoris_transformer_blocks_0_attn_to_add_out"
    with pytest.raises(UserError, match=says):
        written(tmp_path / LORA_FILE, {f"{name}.diff": draw(WIDTH, WIDTH), f"{name}.{key}": torch.ones(shape)})


@pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape")  # PEFT's, of any bias
def test_biases_that_peft_saved(base: Base, tmp_path: Path) -> None:
    layers = ["attn.to_add_out", "ff.net.2"]
    config = LoraConfig(r=2, lora_alpha=3, target_modules=layers, lora_bias=True)
    model = get_peft_model(base.transformer(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = draw(*parameter.shape)
    model.save_pretrained(tmp_path)
    lora = read_lora_file(tmp_path / "adapter_model.safetensors", CONFIG)
    assert lora.has_biases
    is_close(base.drawn(lora), velocity(model.base_model.model), base)
    merged = merged_by_us(base, lora, tmp_path / "merged")
    torch.testing.assert_close(velocity(merged), base.drawn(lora), atol=2e-5, rtol=1e-4)


def test_a_bias_beside_a_dora_or_of_another_rule(tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_add_out"
    tensors = {f"{name}.lora_A.weight": draw(2, WIDTH), f"{name}.lora_B.weight": draw(WIDTH, 2)}
    for extra in (
        {f"{name}.lora_B.bias": torch.ones(WIDTH), f"{name}.dora_scale": torch.ones(WIDTH, 1)},
        {f"{name}.diff_b": torch.ones(WIDTH)},
    ):
        with pytest.raises(UserError, match="beside its LoRA, which is not drawn here"):
            written(tmp_path / LORA_FILE, tensors | extra)


# LyCORIS' kinds on joined layers


def test_a_loha_of_q_k_and_v(base: Base, tmp_path: Path) -> None:
    parts = {
        f"hada_w{n}_{side}": draw(*shape, seed=n)
        for n in (1, 2)
        for side, shape in (("a", (3 * WIDTH, 2)), ("b", (2, WIDTH)))
    }
    parts = {name: 3 * tensor for name, tensor in parts.items()}
    lora = written(tmp_path / LORA_FILE, {f"{flat(QKV)}.{name}": part for name, part in parts.items()})
    difference = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    is_close(base.drawn(lora), with_differences(base, {f"{QKV}.weight": difference}), base)


@pytest.mark.parametrize("rows", [3, 6, 4])
def test_a_lokr_of_q_k_and_v(base: Base, tmp_path: Path, rows: int) -> None:
    """Where the first factor is of three like parts; else it is none of each, and refused."""
    parts = {"lokr_w1": draw(rows, 4), "lokr_w2": 3 * draw(3 * WIDTH // rows, WIDTH // 4)}
    tensors = {f"{flat(QKV)}.{name}": part for name, part in parts.items()}
    if rows == 4:
        with pytest.raises(UserError, match=r"is a LoKr of q, k and v .*lokr_w1 is not made of 3 like parts"):
            written(tmp_path / LORA_FILE, tensors)
        return
    expected = with_differences(base, {f"{QKV}.weight": torch.kron(parts["lokr_w1"], parts["lokr_w2"])})
    is_close(base.drawn(written(tmp_path / LORA_FILE, tensors)), expected, base)
