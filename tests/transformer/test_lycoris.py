"""LoKr and LoHa: the numbers are PEFT's, and the file is what LyCORIS and ComfyUI read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3_lora.common.checksums import CHECKSUMS_KEY
from sd3_lora.common.command_line import UserError
from sd3_lora.gpu.cuda_graph import CapturedCall
from sd3_lora.transformer.added_layers import AddedLoha
from sd3_lora.transformer.base_weights import make_hollow
from sd3_lora.transformer.flat_parameters import flatten_parameters
from sd3_lora.transformer.lora import (
    EMA_FILE,
    LORA_FILE,
    LoraKind,
    attach_lora,
    load_lora_tensors,
    lora_tensors,
    save_lora,
    start_from,
    target_modules,
)
from sd3_lora.transformer.lora_files import read_lora_file
from sd3_lora.transformer.lycoris import lycoris_layers

import pytest
import torch
from conftest import PROJECT
from diffusers import SD3Transformer2DModel
from peft import LoHaConfig, LoKrConfig
from peft.tuners import loha, lokr
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_transformer import GPU, needs_gpu
from test_lora import load_transformer, output
from test_lora_kinds import MODELS, SHARED

KINDS = {
    "LoKr": LoraKind(type="lokr"),
    "LoKr, factor 2": LoraKind(type="lokr", factor=2),
    "LoKr, whole matrices in some layers": LoraKind(type="lokr", ranks={"attn.to_k": 30, "to_v": 1}),
    "LoHa": LoraKind(type="loha"),
    "LoHa of a high rank in some layers": LoraKind(type="loha", ranks={"attn.to_k": 9, "to_v": 1}),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
LAYERS = ["attention+mlp"]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def transformer(tiny_sd3: Path) -> SD3Transformer2DModel:
    return load_transformer(tiny_sd3)


def attach(transformer: SD3Transformer2DModel, kind: LoraKind, seed: int = 0, rank: int = 2) -> SD3Transformer2DModel:
    """Of strength 1.5."""
    attach_lora(transformer, target_modules(transformer, LAYERS, None), rank, 1.5 * rank, 0.0, seed, kind)
    return transformer


def targets_of(transformer: SD3Transformer2DModel) -> list[str]:
    return target_modules(hollow(transformer), LAYERS, None)


def hollow(transformer: SD3Transformer2DModel) -> SD3Transformer2DModel:
    return make_hollow(dict(transformer.config), torch.float32)


def move(transformer: SD3Transformer2DModel) -> None:
    """As training would, but further."""
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device)


@each_kind
def test_a_new_one_changes_nothing(transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    before = output(transformer)
    attach(transformer, kind)
    assert torch.equal(output(transformer), before)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert len(lycoris_layers(transformer)) == len(targets_of(transformer))


@each_kind
def test_the_numbers_are_pefts(tiny_sd3: Path, transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    """Output and gradients, where peft's own layers have the same tensors and patterns."""
    move(attach(transformer, kind))
    theirs = load_transformer(tiny_sd3)
    theirs.requires_grad_(False)
    of_ours = transformer.peft_config["default"]
    config: Any = (LoKrConfig if kind.type == "lokr" else LoHaConfig)(
        r=2,
        alpha=3.0,
        rank_pattern=of_ours.rank_pattern,
        alpha_pattern=of_ours.alpha_pattern,
        target_modules=targets_of(transformer),
        **({"decompose_factor": kind.factor} if kind.type == "lokr" else {}),
    )
    theirs.add_adapter(config)
    assert {type(m) for m in theirs.modules() if isinstance(m, (lokr.LoKrLayer, loha.LoHaLayer))} <= {
        lokr.Linear,
        loha.Linear,
    }
    load_lora_tensors(theirs, lora_tensors(transformer))
    torch.testing.assert_close(output(transformer), output(theirs), atol=2e-5, rtol=2e-5)
    output(transformer, with_gradient=True).square().mean().backward()
    output(theirs, with_gradient=True).square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    mine = {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}
    assert mine.keys() == gradients.keys()
    assert sum(gradient is not None and bool(gradient.any()) for gradient in mine.values()) > 40
    torch.testing.assert_close(mine, gradients, atol=1e-5, rtol=1e-3)


def test_peft_and_lycoris_cut_widths_alike(transformer: SD3Transformer2DModel) -> None:
    """32 wide and 128 wide: (4, 8) and (8, 16) near the square root, or a factor."""
    for kind, first in (
        (KINDS["LoKr"], (4, 4)),
        (KINDS["LoKr, factor 2"], (2, 2)),
        (LoraKind(type="lokr", factor=3), (2, 2)),
    ):
        layers = lycoris_layers(attach(hollow(transformer), kind))
        assert tuple(layers["transformer_blocks.0.attn.to_q"].lokr_w1["default"].shape) == first


# The file


def differences(path: Path) -> Tensors:
    """What LyCORIS 4.1.3 adds to each weight, and ComfyUI (comfy/weight_adapter), by the file alone."""
    tensors, found = load_file(path), {}
    for key in tensors:
        name, _, part = key.rpartition(".")
        if part != "alpha":
            continue
        own = {k.rpartition(".")[2]: tensor for k, tensor in tensors.items() if k.startswith(f"{name}.")}
        if "hada_w1_a" in own:
            scale = own["alpha"] / own["hada_w1_b"].shape[0]
            found[name] = scale * (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        elif "lokr_w2" in own:
            found[name] = torch.kron(own["lokr_w1"], own["lokr_w2"])  # both whole: no alpha
        else:
            scale = own["alpha"] / own["lokr_w2_b"].shape[0]
            found[name] = scale * torch.kron(own["lokr_w1"], own["lokr_w2_a"] @ own["lokr_w2_b"])
    return found


@each_kind
def test_the_file_is_what_was_trained(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, kind: LoraKind
) -> None:
    """By the formula of other programs, which is peft's difference of the weights; and by ours."""
    base = output(transformer)
    move(attach(transformer, kind))
    expected = output(transformer)
    assert (base - expected).abs().max() > 0.05
    path = save_lora(tmp_path, transformer, {"trigger": "sks"})
    found = differences(path)
    plain = load_transformer(tiny_sd3)
    for name, layer in lycoris_layers(transformer).items():
        difference = found.pop(f"lycoris_{name.replace('.', '_')}")
        torch.testing.assert_close(difference, layer.get_delta_weight("default").detach(), atol=1e-6, rtol=1e-5)
        plain.get_submodule(name).weight.data += difference
    assert not found
    torch.testing.assert_close(output(plain), expected, atol=2e-5, rtol=2e-5)
    ours = load_transformer(tiny_sd3)
    lora = read_lora_file(path, ours.config)
    assert (lora.type, lora.has_effect, lora.is_dora) == (kind.type, True, False)
    assert lora.record == {"trigger": "sks", "rank": 2}
    assert lora.device_bytes > path.stat().st_size
    lora.attach(ours, "subject")
    torch.testing.assert_close(output(ours), expected, atol=2e-5, rtol=2e-5)


@each_kind
def test_all_alphas_are_the_ranks(transformer: SD3Transformer2DModel, tmp_path: Path, kind: LoraKind) -> None:
    """Programs differ in how often they apply another: findings/strength_of_lokr_and_loha.sh."""
    tensors = load_file(save_lora(tmp_path, attach(transformer, kind), {}, EMA_FILE))
    assert not (tmp_path / LORA_FILE).exists()
    for name, layer in lycoris_layers(transformer).items():
        flat = f"lycoris_{name.replace('.', '_')}"
        assert tensors[f"{flat}.alpha"] == layer.r["default"]
        inner = tensors.get(f"{flat}.lokr_w2_b", tensors.get(f"{flat}.hada_w2_b"))
        assert inner is None or len(inner) == layer.r["default"]


@each_kind
def test_it_goes_on_from_its_tensors(tiny_sd3: Path, transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    move(attach(transformer, kind))
    other = attach(load_transformer(tiny_sd3), kind, seed=5)
    load_lora_tensors(other, lora_tensors(transformer))
    assert torch.equal(output(other), output(transformer))


@each_kind
def test_it_begins_as_another(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, kind: LoraKind
) -> None:
    """Of another strength."""
    move(attach(transformer, kind))
    lora = read_lora_file(save_lora(tmp_path, transformer, {}), transformer.config)
    other = load_transformer(tiny_sd3)
    attach_lora(other, target_modules(other, LAYERS, None), 2, 10.0, 0.0, 3, kind)
    start_from(other, lora.starts())
    torch.testing.assert_close(output(other), output(transformer), atol=2e-5, rtol=2e-5)


def test_a_new_file_has_no_effect(tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    """Which matrix is zero in a new one is the one that the strength goes into."""
    for type_ in ("lokr", "loha"):
        path = save_lora(tmp_path, attach(load_transformer(tiny_sd3), LoraKind(type=type_)), {})
        assert not read_lora_file(path, transformer.config).has_effect
        assert not any(
            tensor.any() for name, tensor in load_file(path).items() if name.endswith(("lokr_w2_b", "hada_w2_a"))
        )


# Files of other programs

Q = "transformer_blocks.0.attn.to_q"
FORMS = ("lycoris_{flat}", "transformer.{name}", "diffusion_model.{name}", "lora_transformer_{flat}", "{name}")


def written(path: Path, parts: Mapping[str, torch.Tensor], form: str = FORMS[0], name: str = Q) -> Path:
    prefix = form.format(name=name, flat=name.replace(".", "_"))
    save_file({f"{prefix}.{part}": tensor.contiguous() for part, tensor in parts.items()}, path)
    return path


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 4


FOREIGN: dict[str, tuple[Tensors, torch.Tensor]] = {
    "both low, no divisor that PEFT would take": (
        {
            **{"lokr_w1_a": draw(16, 3), "lokr_w1_b": draw(3, 2), "lokr_w2_a": draw(2, 3), "lokr_w2_b": draw(3, 16)},
            "alpha": torch.tensor(6.0),
        },
        2 * torch.kron(draw(16, 3) @ draw(3, 2), draw(2, 3) @ draw(3, 16)),
    ),
    "the first low, the second whole": (
        {"lokr_w1_a": draw(4, 3), "lokr_w1_b": draw(3, 4), "lokr_w2": draw(8, 8), "alpha": torch.tensor(6.0)},
        2 * torch.kron(draw(4, 3) @ draw(3, 4), draw(8, 8)),
    ),
    "both whole, whose alpha counts for nothing": (
        {"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8), "alpha": torch.tensor(7.0)},
        torch.kron(draw(4, 4), draw(8, 8)),
    ),
    "without an alpha": (
        {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(8, 2), "lokr_w2_b": draw(2, 8)},
        torch.kron(draw(4, 4), draw(8, 2) @ draw(2, 8)),
    ),
    "LoHa": (
        {
            **{"hada_w1_a": draw(32, 3), "hada_w1_b": draw(3, 32), "hada_w2_a": 2 * draw(32, 3)},
            **{"hada_w2_b": 3 * draw(3, 32), "alpha": torch.tensor(6.0)},
        },
        2 * 6 * (draw(32, 3) @ draw(3, 32)).square(),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_other_programs(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, form: str, case: str
) -> None:
    parts, difference = FOREIGN[case]
    plain = load_transformer(tiny_sd3)
    before = output(plain)
    plain.get_submodule(Q).weight.data += difference
    read_lora_file(written(tmp_path / "f.safetensors", parts, form), transformer.config).attach(transformer, "lora_0")
    assert (output(plain) - before).abs().max() > 1e-3
    torch.testing.assert_close(output(transformer), output(plain), atol=2e-5, rtol=1e-4)


def test_several_add_up_with_scales(tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    """A LoKr, a LoHa and a plain LoRA on one layer, in any order."""
    kinds = [FOREIGN["without an alpha"], FOREIGN["LoHa"]]
    kinds.append(({"lora_down.weight": draw(2, 32), "lora_up.weight": draw(32, 2)}, draw(32, 2) @ draw(2, 32)))
    files = [
        read_lora_file(written(tmp_path / f"{index}.safetensors", parts), transformer.config)
        for index, (parts, _) in enumerate(kinds)
    ]
    scales = [0.5, 2.0, -1.0]
    plain = load_transformer(tiny_sd3)
    for (_, difference), scale in zip(kinds, scales, strict=True):
        plain.get_submodule(Q).weight.data += scale * difference
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        drawing = load_transformer(tiny_sd3)
        for index in order:
            files[index].attach(drawing, f"lora_{index}")
        drawing.set_adapters([f"lora_{index}" for index in order], [scales[index] for index in order])
        torch.testing.assert_close(output(drawing), output(plain), atol=2e-5, rtol=1e-4)


WRONG: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "half a pair": ({"lokr_w1": draw(4, 4), "lokr_w2_a": draw(8, 2)}, "lacks a part of this layer, or was trained on"),
    "other widths": ({"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 9)}, "lokr_w2 does not fit"),
    "no second": ({"lokr_w1": draw(4, 4)}, "does not fit"),
    "both forms": (
        {"lokr_w1": draw(4, 4), "lokr_w1_a": draw(4, 1), "lokr_w1_b": draw(1, 4), "lokr_w2": draw(8, 8)},
        "fit",
    ),
    "pairs of other ranks": (
        {"hada_w1_a": draw(32, 3), "hada_w1_b": draw(3, 32), "hada_w2_a": draw(32, 2), "hada_w2_b": draw(2, 32)},
        "does not fit",
    ),
    "magnitudes": ({"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8), "dora_scale": draw(32, 1)}, "with magnitudes (DoRA)"),
    "Tucker": ({"lokr_w1": draw(4, 4), "lokr_t2": draw(2, 2)}, "with a Tucker decomposition, which is not drawn here"),
    "NaN": ({"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8) / 0 * 0}, "has NaN or infinity"),
    "alphas": ({"lokr_w1": draw(4, 4), "lokr_w2": draw(8, 8), "alpha": draw(2)}, "is not one number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(transformer: SD3Transformer2DModel, tmp_path: Path, case: str) -> None:
    parts, says = WRONG[case]
    with pytest.raises(UserError) as error:
        read_lora_file(written(tmp_path / "f.safetensors", parts), transformer.config)
    assert says in str(error.value)


def test_several_kinds_in_a_file(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    parts = {f"lycoris_{Q.replace('.', '_')}.{part}": tensor for part, tensor in FOREIGN["LoHa"][0].items()}
    other = "lycoris_transformer_blocks_0_attn_to_k"
    save_file({**parts, f"{other}.lokr_w1": draw(4, 4), f"{other}.lokr_w2": draw(8, 8)}, tmp_path / "f.safetensors")
    with pytest.raises(UserError, match="has layers of several kinds, which are not drawn here: draw with it in Comfy"):
        read_lora_file(tmp_path / "f.safetensors", transformer.config)


def test_the_metadata_claim_no_peft_lora(transformer: SD3Transformer2DModel, tmp_path: Path) -> None:
    with safe_open(save_lora(tmp_path, attach(transformer, KINDS["LoKr"]), {}), "pt") as handle:
        assert set(handle.metadata()) == {"format", "sd3_lora", CHECKSUMS_KEY}


# How a step is carried out


@each_kind
def test_a_compiled_layer_is_one_graph(transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    move(attach(transformer, kind))
    for name in (Q, "transformer_blocks.0.attn.to_k"):
        layer = transformer.get_submodule(name).train()
        states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(states), layer(states))


@each_kind
def test_no_draw_in_a_forward(transformer: SD3Transformer2DModel, kind: LoraKind) -> None:
    """peft's layers draw a number in each, which no CUDA graph holds."""
    attach(transformer, kind).train()
    before = torch.get_rng_state()
    output(transformer, with_gradient=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@each_kind
def test_on_16_bits(
    tiny_sd3: Path, transformer: SD3Transformer2DModel, tmp_path: Path, kind: LoraKind, precision: torch.dtype
) -> None:
    """What is trained under autocast is drawn without it."""
    move(attach(transformer, kind))
    path = save_lora(tmp_path, transformer, {})
    exact = transformer.get_submodule(Q)
    states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    trained, drawing = (load_transformer(tiny_sd3, precision) for _ in range(2))
    attach(trained, kind)
    load_lora_tensors(trained, lora_tensors(transformer))
    read_lora_file(path, drawing.config).attach(drawing, "subject")
    with torch.autocast("cpu", precision):
        under_autocast = trained.get_submodule(Q)(states)
    drawn = drawing.get_submodule(Q)(states.to(precision))
    assert under_autocast.dtype == drawn.dtype == precision
    scale = exact(states).abs().max()
    for each in (under_autocast, drawn):
        assert (each.float() - exact(states)).abs().max() < 0.02 * scale
    assert {p.dtype for n, p in drawing.named_parameters() if ".lokr_" in n or ".hada_" in n} == {torch.float32}


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


# How many numbers


def trained_numbers(model: str, kind: LoraKind, rank: int) -> int:
    transformer = make_hollow({**SHARED, **MODELS[model]}, torch.float32)
    with torch.device("meta"):
        parameters = attach_lora(transformer, target_modules(transformer, None, None), rank, rank, 0.0, 0, kind)
    return sum(parameter.numel() for parameter in parameters)


# 191 layers of 1536 to 1536 features in the Mediums, 303 of 2432 to 2432 in the Large; docs/loras.md has these.
NUMBERS = {
    ("SD3-Medium", "lora", -1, 4): 191 * 4 * 3072,
    ("SD3.5-Medium", "lora", -1, 4): 191 * 4 * 3072,
    ("SD3.5-Large", "lora", -1, 4): 303 * 4 * 4864,
    ("SD3-Medium", "lora", -1, 8): 191 * 8 * 3072,
    ("SD3-Medium", "lokr", -1, 8): 191 * (32**2 + 8 * 96),
    ("SD3-Medium", "lokr", 8, 8): 191 * (8**2 + 8 * 384),
    ("SD3-Medium", "lokr", 8, 96): 191 * (8**2 + 192**2),
    ("SD3-Medium", "lokr", 16, 48): 191 * (16**2 + 96**2),
    ("SD3-Medium", "loha", -1, 4): 191 * 2 * 4 * 3072,
    ("SD3-Medium", "loha", -1, 8): 191 * 2 * 8 * 3072,
    ("SD3-Medium", "loha", -1, 32): 191 * 2 * 32 * 3072,
}


@pytest.mark.parametrize(("model", "type_", "factor", "rank"), NUMBERS, ids=str)
def test_how_many_numbers_are_trained(model: str, type_: Any, factor: int, rank: int) -> None:
    assert trained_numbers(model, LoraKind(type=type_, factor=factor), rank) == NUMBERS[model, type_, factor, rank]


def test_the_documents_have_these_numbers() -> None:
    millions = {key: f"{number / 1e6:.2f} million" for key, number in NUMBERS.items()}
    of_rank_4 = millions["SD3-Medium", "lora", -1, 4]
    for document in ("docs/tricks/adam-in-8-bits.md", "docs/optimizers.md", "docs/scaling.md"):
        text = " ".join((PROJECT / document).read_text(encoding="utf-8").split())
        assert of_rank_4 in text
        assert "4.7 million" not in text
    table = (PROJECT / "docs/loras.md").read_text(encoding="utf-8")
    assert "0.587 million numbers a rank" in table
    assert "2.35 and 5.90 million at rank 4" in table
    assert f"{NUMBERS['SD3.5-Large', 'lora', -1, 4] / 1e6:.2f}" == "5.90"
    for (model, type_, factor, rank), million in millions.items():
        if model == "SD3-Medium" and (type_, rank) != ("lora", 4):
            name = {"lora": "plain LoRA", "lokr": "LoKr", "loha": "LoHa"}[type_]
            name += f", `--lokr_factor {factor}`" if factor != -1 else ""
            assert re.search(rf"\| {name} \| {rank}( \(whole\))? \| {million} \|", table), (name, rank)


def test_loha_starts_as_lycoris(transformer: SD3Transformer2DModel) -> None:
    """With entries of peft's start it would hardly learn at a LoRA's rates."""
    layers = lycoris_layers(attach(transformer, KINDS["LoHa"], rank=8)).values()
    products = [
        layer.hada_w1_a["default"] @ layer.hada_w1_b["default"] for layer in layers if isinstance(layer, AddedLoha)
    ]
    deviation = torch.cat([product.flatten() for product in products]).std().item()
    assert deviation == pytest.approx(0.1 * 8**0.5, rel=0.2)
    assert not any(layer.hada_w2_a["default"].any() for layer in layers)
