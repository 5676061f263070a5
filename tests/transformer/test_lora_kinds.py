"""Kinds of LoRA: presets, ranks, rsLoRA, DoRA, PiSSA, OLoRA, and a start from another LoRA."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.transformer.base_weights import make_hollow
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.lora import (
    DEFAULT_LAYERS,
    LORA_FILE,
    LoraKind,
    attach_lora,
    chosen_blocks,
    load_lora_tensors,
    lora_in,
    lora_layers,
    lora_tensors,
    save_lora,
    start_from,
    target_modules,
)
from sd3_lora.transformer.lora_files import read_lora_file

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_transformer import GPU, needs_gpu
from test_lora import load_transformer, output

# What tells the three models' layers apart, as their transformer/config.json has it.
SHARED = {"attention_head_dim": 64, "in_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
MODELS = {
    "SD3-Medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    "SD3.5-Medium": {
        **{"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": "rms_norm"},
        "dual_attention_layers": tuple(range(13)),
    },
    "SD3.5-Large": {
        **{"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
    },
}
KINDS = {
    "default": LoraKind(start="default"),
    "rsLoRA": LoraKind(use_rslora=True),
    "DoRA": LoraKind(use_dora=True),
    "DoRA, rsLoRA": LoraKind(use_dora=True, use_rslora=True),
    "PiSSA": LoraKind(start="pissa"),
    "OLoRA": LoraKind(start="olora"),
    "ranks": LoraKind(ranks={"attn.to_k": 2, "to_v": 7}),
    "PiSSA, rsLoRA, ranks": LoraKind(use_rslora=True, start="pissa", ranks={"attn.to_k": 2, "to_v": 7}),
    "DoRA, ranks": LoraKind(use_dora=True, ranks={"attn.to_k": 2}),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def transformer(tiny_sd3: Path) -> SD3Transformer2DModel:
    return load_transformer(tiny_sd3)


def attach(transformer: SD3Transformer2DModel, kind: LoraKind, alpha: float = 12.0) -> SD3Transformer2DModel:
    """Rank 4."""
    attach_lora(transformer, target_modules(transformer, None, None), 4, alpha, 0.0, 0, kind)
    return transformer


def move(transformer: SD3Transformer2DModel) -> None:
    """As training would, but further."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            draw = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.data += (0.5 * parameter.data if "magnitude" in name else 0.2) * draw


# Presets


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, SD3Transformer2DModel]:
    """Its name, and the transformer without weights."""
    return request.param, make_hollow({**SHARED, **MODELS[request.param]}, torch.float32)


def test_layer_presets(model: tuple[str, SD3Transformer2DModel]) -> None:
    name, transformer = model
    count = len(transformer.transformer_blocks)
    second = 13 if name == "SD3.5-Medium" else 0

    def layers(preset: str) -> Counter[str]:
        return Counter(target.split(".", 2)[2] for target in target_modules(transformer, [preset], None))

    attention = Counter(dict.fromkeys(DEFAULT_LAYERS, count))
    attention["attn.to_add_out"] -= 1  # the last block drops its text stream
    attention += Counter({f"attn2.{layer}": second for layer in ("to_k", "to_q", "to_v", "to_out.0")})
    assert layers("attention") == attention
    mlp = Counter({f"ff.net.{layer}": count for layer in ("0.proj", "2")})
    mlp += Counter({f"ff_context.net.{layer}": count - 1 for layer in ("0.proj", "2")})
    assert layers("attention+mlp") == attention + mlp
    if second:
        assert sum(layers("second_attention").values()) == 4 * 13
    else:
        with pytest.raises(UserError, match=r"^--lora_layers second_attention is in no block: the layers are .*attn"):
            layers("second_attention")


def test_a_preset_beside_a_layer(transformer: SD3Transformer2DModel) -> None:
    both = target_modules(transformer, ["attention", "ff.net.2"], None)
    assert {*both} == {
        *target_modules(transformer, ["attention"], None),
        *(f"transformer_blocks.{block}.ff.net.2" for block in (0, 1)),
    }
    with pytest.raises(UserError, match=r"mlp is in no block: .*; the presets attention, attention\+mlp$"):
        target_modules(transformer, ["mlp"], None)


def test_block_presets(model: tuple[str, SD3Transformer2DModel]) -> None:
    count = len(model[1].transformer_blocks)
    early, late = (chosen_blocks([name], count) for name in ("early", "late"))
    assert early == list(range(count // 2))
    assert late == list(range(count // 2, count))
    assert chosen_blocks(["early", str(count - 1), "0"], count) == [*early, count - 1]
    assert chosen_blocks(None, count) is None


@pytest.mark.parametrize(
    ("asked", "count", "says"),
    [
        (
            ["middle"],
            24,
            "--lora_blocks middle is not a list of numbers: type for example 12,13, or one of the presets",
        ),
        (["1", "late", "x"], 24, "--lora_blocks 1,late,x is not a list"),
        (["early"], 1, "--lora_blocks early: this transformer has one block: leave it out"),
        (["24"], 24, "--lora_blocks 24: this transformer has the blocks 0 to 23"),
    ],
)
def test_unknown_blocks(asked: list[str], count: int, says: str) -> None:
    with pytest.raises(UserError) as error:
        chosen_blocks(asked, count)
    assert str(error.value).startswith(says)


# Kinds


@each_kind
def test_a_new_one_changes_nothing(transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    before = output(transformer)
    attach(transformer, kind)
    torch.testing.assert_close(output(transformer), before, atol=1e-5, rtol=1e-5)
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    if kind.use_dora:
        assert torch.equal(output(transformer), before)


@each_kind
def test_the_file_is_what_was_trained(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, kind: LoraKind
) -> None:
    """On the untouched base, by diffusers' own loader and by ours."""
    base = output(transformer)
    move(attach(transformer, kind))
    expected = output(transformer)
    assert (base - expected).abs().max() > 0.05
    path = save_lora(tmp_path, transformer, {})
    stock, ours = load_transformer(tiny_sd3), load_transformer(tiny_sd3)
    stock.load_lora_adapter(str(tmp_path), weight_name=LORA_FILE)
    torch.testing.assert_close(output(stock), expected, atol=2e-5, rtol=2e-5)
    lora = read_lora_file(path, ours.config)
    assert lora.is_dora == kind.use_dora
    lora.attach(ours, "default")
    torch.testing.assert_close(output(ours), expected, atol=2e-5, rtol=2e-5)


@each_kind
def test_in_16_bits_it_needs_no_autocast(tiny_sd3: Path, kind: LoraKind) -> None:
    """A start that is subtracted neither. Afterwards its numbers are what they were."""
    transformer = load_transformer(tiny_sd3, torch.bfloat16)
    move(attach(transformer, kind))
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in transformer.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        expected = output(transformer)
    with lora_in(transformer, torch.bfloat16):
        drawn = output(transformer)
    off_by = (drawn - expected).float().norm() / expected.float().norm()
    assert 0 <= off_by < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output(transformer), expected)
    for name, parameter in transformer.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


@each_kind
def test_it_goes_on_from_its_tensors(tiny_sd3: Path, transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    move(attach(transformer, kind))
    other = load_transformer(tiny_sd3)
    attach_lora(other, target_modules(other, None, None), 4, 12.0, 0.0, 5, kind)
    load_lora_tensors(other, lora_tensors(transformer))
    assert torch.equal(output(other), output(transformer))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_without_metadata_it_is_drawn_all_the_same(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, start: Any
) -> None:
    move(attach(transformer, LoraKind(start=start)))
    tensors = load_file(save_lora(tmp_path, transformer, {}))
    assert {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name} == {8}  # twice the rank
    save_file(tensors, tmp_path / LORA_FILE)
    stock = load_transformer(tiny_sd3)
    stock.load_lora_adapter(str(tmp_path), weight_name=LORA_FILE)
    torch.testing.assert_close(output(stock), output(transformer), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_start_is_pefts(tiny_sd3: Path, transformer: SD3Transformer2DModel, start: Any) -> None:
    """Of PiSSA by what it leaves of the weight. The base is left alone, and is what is left with the adapter off."""
    before = output(transformer)
    attach(transformer, LoraKind(start=start))
    theirs = load_transformer(tiny_sd3)
    names = list(lora_layers(transformer))
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=12, init_lora_weights=start, target_modules=names))
    for name, layer in lora_layers(transformer).items():
        other = theirs.get_submodule(name)
        mine, peft = (
            (each.lora_B["default"].weight.detach(), each.lora_A["default"].weight.detach()) for each in (layer, other)
        )
        weight = layer.get_base_layer().weight.detach()
        rest, best = (torch.linalg.norm(weight - 3 * up @ down) for up, down in (mine, peft))
        assert rest == pytest.approx(best.item(), rel=1e-3)
        assert best < 0.95 * torch.linalg.norm(weight) or start == "olora"
        if start == "olora":
            torch.testing.assert_close(mine, peft, atol=1e-5, rtol=1e-4)
    transformer.disable_adapters()
    assert torch.equal(output(transformer), before)


def test_a_rank_beyond_the_weights(transformer: SD3Transformer2DModel) -> None:
    targets = target_modules(transformer, ["attn.to_k"], [0])
    with pytest.raises(UserError, match=r"^--init_lora_weights pissa: transformer_blocks.0.attn.to_k has a rank of 32"):
        attach_lora(transformer, targets, 33, 33.0, 0.0, 0, LoraKind(start="pissa"))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_new_dora_on_16_bits_changes_nothing(tiny_sd3: Path, precision: torch.dtype) -> None:
    """peft's is off by the rounding of a norm."""
    transformer = load_transformer(tiny_sd3, precision)
    name = "transformer_blocks.0.attn.to_q"
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).to(precision)
    before = transformer.get_submodule(name)(states)
    attach(transformer, KINDS["DoRA"])
    with torch.autocast("cpu", precision):
        assert torch.equal(transformer.get_submodule(name)(states), before)
    assert transformer.get_submodule(name).lora_magnitude_vector["default"].weight.dtype == torch.float32


def test_dropout_leaves_a_doras_base_alone(transformer: SD3Transformer2DModel) -> None:
    before = output(transformer)
    attach_lora(transformer, target_modules(transformer, None, None), 4, 4.0, 0.5, 0, KINDS["DoRA"])
    assert torch.equal(output(transformer.train()), before)


@pytest.mark.parametrize("kind", [KINDS["DoRA"], KINDS["PiSSA"]], ids=["DoRA", "PiSSA"])
def test_a_compiled_layer_is_one_graph(transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    move(attach(transformer, kind))
    layer = transformer.get_submodule("transformer_blocks.0.attn.to_q")
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(states), layer(states))


@needs_gpu
@each_kind
def test_a_captured_step_is_the_step_bit_for_bit(tiny_sd3: Path, kind: LoraKind) -> None:
    losses = []
    for is_captured in (False, True):
        transformer = load_transformer(tiny_sd3).to(GPU)
        move(attach(transformer, kind))
        flat = flatten_parameters([parameter for parameter in transformer.parameters() if parameter.requires_grad])
        assert flat.grad is not None

        def step(states: torch.Tensor, text: torch.Tensor, model: Any = transformer) -> torch.Tensor:
            velocity = model(states, text, text[:, 0, :24], torch.full((2,), 500.0, device=GPU)).sample
            loss = velocity.square().mean()
            loss.backward()
            return loss.detach()

        call = CapturedCall(step, GPU, [flat.grad], asked=True) if is_captured else step
        torch.manual_seed(0)
        states, text = torch.randn(2, 16, 8, 8, device=GPU), torch.randn(2, 97, 48, device=GPU)
        for _ in range(3):
            losses.append((is_captured, call(states, text).item()))
            flat.data -= 0.01 * flat.grad
            flat.grad.zero_()
    assert [loss for captured, loss in losses if captured] == [loss for captured, loss in losses if not captured]


def test_ranks_of_single_layers(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    """The first that fits counts; the strength is that of the others."""
    attach(transformer, LoraKind(ranks={"attn.to_k": 2, "to_v": 7, "attn.to_v": 9, "add_v_proj": 5, "to_k": 11}))
    layers = lora_layers(transformer)
    ranks = {"to_k": 2, "to_v": 7, "add_v_proj": 5}
    for name, layer in layers.items():
        assert layer.r["default"] == ranks.get(name.rsplit(".", 1)[1], 4)
        assert layer.scaling["default"] == pytest.approx(3.0)
    with safe_open(save_lora(tmp_path, transformer, {}), "pt") as handle:
        metadata = handle.metadata()
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert settings["transformer.r"] == 4
    assert sorted(settings["transformer.rank_pattern"].values()) == [2, 5, 7]
    assert settings["transformer.rank_pattern"] == settings["transformer.alpha_pattern"]


def test_the_strength_of_rslora(transformer: SD3Transformer2DModel) -> None:
    attach(transformer, LoraKind(use_rslora=True, ranks={"attn.to_k": 16}))
    for name, layer in lora_layers(transformer).items():
        assert layer.scaling["default"] == pytest.approx(12 if name.endswith("attn.to_k") else 6)  # 48 / √16, 12 / √4


# A start from another LoRA


@pytest.mark.parametrize("rank", [4, 6])
@pytest.mark.parametrize("kind", [LoraKind(), LoraKind(use_rslora=True), LoraKind(use_dora=True)], ids=str)
def test_it_begins_as_the_other(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, kind: LoraKind, rank: int
) -> None:
    """A file of rank 4 and strength 3: whatever the rank, strength and kind here, the model is the same."""
    move(attach(transformer, LoraKind()))
    lora = read_lora_file(save_lora(tmp_path, transformer, {}), transformer.config)
    other = load_transformer(tiny_sd3)
    attach_lora(other, target_modules(other, None, None), rank, 5.0, 0.0, 3, kind)
    start_from(other, lora.starts())
    torch.testing.assert_close(output(other), output(transformer), atol=2e-5, rtol=2e-5)
    tensors = lora_tensors(other)
    assert all(tensor[4:].any() for name, tensor in tensors.items() if "lora_A" in name and rank > 4)
    assert not any(tensor[:, 4:].any() for name, tensor in tensors.items() if "lora_B" in name)


def test_a_dora_begins_as_a_dora(tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    move(attach(transformer, KINDS["DoRA"]))
    lora = read_lora_file(save_lora(tmp_path, transformer, {}), transformer.config)
    other = attach(load_transformer(tiny_sd3), KINDS["DoRA"], 4.0)
    start_from(other, lora.starts())
    torch.testing.assert_close(output(other), output(transformer), atol=2e-5, rtol=2e-5)
