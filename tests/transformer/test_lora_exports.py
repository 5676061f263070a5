"""A LoRA in the names of other programs: each reader applies every tensor, and draws what our LoRA draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError
from sd3_lora.transformer.lora import LORA_FILE, LoraKind, attach_lora, save_lora, target_modules
from sd3_lora.transformer.lora_exports import export_lora, export_path
from sd3_lora.transformer.lora_files import LoraFile, read_lora_file
from sd3_lora.transformer.original_layers import original_places

import pytest
import torch
from diffusers import SD3Transformer2DModel
from original_sd3 import (
    CONFIG,
    WIDTH,
    Base,
    Tensors,
    apply_by_a1111,
    apply_by_comfyui,
    apply_by_sd_scripts,
    in_diffusers,
    original_shapes,
    velocity,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora_kinds import MODELS, SHARED

READERS: dict[str, tuple[str, Callable[[Tensors, Tensors], Tensors]]] = {
    "sd-scripts": ("kohya", apply_by_sd_scripts),
    "ComfyUI and Forge": ("kohya", apply_by_comfyui),
    "A1111": ("a1111", apply_by_a1111),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.saved(tmp_path_factory.mktemp("base"))


def trained(base: Base, folder: Path, layers: list[str] | None, rank: int, alpha: float, kind: LoraKind) -> LoraFile:
    """A LoRA as training saves it, with a lora_B that is not zero."""
    transformer = base.transformer()
    attach_lora(transformer, target_modules(transformer, layers, None), rank, alpha, 0.0, seed=0, kind=kind)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)
        if "lokr" in name or "hada" in name:
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    record = {
        "base_model": "somebody/sd3",
        "trigger": "a photo of sks dog",
        "resolution": 1024,
        "steps": 800,
        "seed": 0,
    }
    return read_lora_file(save_lora(folder, transformer, record), CONFIG)


def exported(base: Base, lora: LoraFile, form: str) -> Tensors:
    path = export_path(lora.path, form)
    export_lora(lora, form, path, base.files)
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([path.name, LORA_FILE])
    tensors = load_file(path)
    path.unlink()
    return tensors


KINDS: dict[str, tuple[list[str] | None, int, float, LoraKind]] = {
    "the default layers": (None, 4, 4, LoraKind()),
    "alpha is not the rank": (None, 4, 6, LoraKind()),
    "rsLoRA": (None, 4, 4, LoraKind(use_rslora=True)),
    "ranks of their own": (["attention+mlp"], 4, 4, LoraKind(ranks={"attn.to_k": 1, "add_v_proj": 7})),
    "keys alone": (["attn.to_k", "attn.add_k_proj", "attn2.to_k"], 3, 3, LoraKind()),
    "modulations": (["norm1.linear", "norm1_context.linear"], 2, 2, LoraKind()),
    "PiSSA": (["attn.to_q", "ff.net.2"], 2, 2, LoraKind(start="pissa")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_we_trained(base: Base, tmp_path: Path, reader: str, kind: str) -> None:
    lora = trained(base, tmp_path, *KINDS[kind])
    form, apply = READERS[reader]
    merged = in_diffusers(apply(base.original, exported(base, lora, form)), CONFIG)
    expected = base.drawn(lora)
    torch.testing.assert_close(velocity(merged), expected, atol=2e-5, rtol=1e-4)
    assert (expected - velocity(base.transformer())).abs().max() > 0.1


@pytest.mark.parametrize("reader", READERS)
def test_every_linear_layer(base: Base, tmp_path: Path, reader: str) -> None:
    """Those outside the blocks too, which other programs train."""
    transformer, tensors = base.transformer(), {}
    generator = torch.Generator().manual_seed(2)
    for index, (name, module) in enumerate(transformer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            rank = 1 + index % 3
            tensors[f"{name}.lora_A.weight"] = 0.2 * torch.randn(rank, module.in_features, generator=generator)
            tensors[f"{name}.lora_B.weight"] = 0.2 * torch.randn(module.out_features, rank, generator=generator)
    save_file(tensors, tmp_path / LORA_FILE)
    lora = read_lora_file(tmp_path / LORA_FILE, CONFIG)
    form, apply = READERS[reader]
    merged = in_diffusers(apply(base.original, exported(base, lora, form)), CONFIG)
    torch.testing.assert_close(velocity(merged), base.drawn(lora), atol=2e-5, rtol=1e-4)


def test_joined_layers_are_block_diagonal(base: Base, tmp_path: Path) -> None:
    """q and v of ranks 4 and 2, and no k."""
    layers, kind = ["attn.to_q", "attn.to_v"], LoraKind(ranks={"to_v": 2})
    tensors = exported(base, trained(base, tmp_path, layers, 4, 8.0, kind), "kohya")
    up, down = (tensors[f"lora_unet_joint_blocks_1_x_block_attn_qkv.lora_{part}.weight"] for part in ("up", "down"))
    assert (tuple(up.shape), tuple(down.shape)) == ((3 * WIDTH, 6), (6, WIDTH))
    is_there = up.view(3, WIDTH, 6).any(dim=1)
    assert is_there.tolist() == [[True] * 4 + [False] * 2, [False] * 6, [False] * 4 + [True] * 2]
    assert tensors["lora_unet_joint_blocks_1_x_block_attn_qkv.alpha"] == 6


# What is no plain LoRA

OTHER_KINDS = {
    "DoRA": LoraKind(use_dora=True),
    "LoKr": LoraKind(type="lokr"),
    "LoHa": LoraKind(type="loha"),
}


@pytest.mark.parametrize("layers", [["attention+mlp"], ["attn.to_q", "add_k_proj", "norm1_context.linear"]])
@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_are_whole_differences(base: Base, tmp_path: Path, kind: str, layers: list[str]) -> None:
    """For ComfyUI and Forge, in 16 bits; and we read them ourselves."""
    lora = trained(base, tmp_path, layers, 4, 4, OTHER_KINDS[kind])
    tensors = exported(base, lora, "kohya")
    assert {key.split(".")[-1] for key in tensors} == {"diff"}
    merged = in_diffusers(apply_by_comfyui(base.original, tensors), CONFIG)
    expected = base.drawn(lora)
    torch.testing.assert_close(velocity(merged), expected, atol=2e-3, rtol=2e-3)
    assert (expected - velocity(base.transformer())).abs().max() > 0.05
    save_file(tensors, tmp_path / "again.safetensors")
    again = base.drawn(read_lora_file(tmp_path / "again.safetensors", CONFIG))
    torch.testing.assert_close(again, velocity(merged), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_a1111_reads_plain_loras_alone(base: Base, tmp_path: Path, kind: str) -> None:
    lora = trained(base, tmp_path, None, 4, 4, OTHER_KINDS[kind])
    with pytest.raises(
        UserError, match=r"A1111 reads plain LoRAs alone, .*: leave out a1111; `python -m sd3_lora\.merge "
    ):
        export_lora(lora, "a1111", tmp_path / "no.safetensors", base.files)
    assert not (tmp_path / "no.safetensors").exists()


# Metadata


def test_the_metadata(base: Base, tmp_path: Path) -> None:
    lora = trained(base, tmp_path, None, 4, 4, LoraKind())
    path = tmp_path / "exported.safetensors"
    export_lora(lora, "kohya", path, base.files)
    with safe_open(path, "pt") as handle:
        metadata = handle.metadata()
    expected = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-3/lora",
        "modelspec.title": "a photo of sks dog",
        "modelspec.trigger_phrase": "a photo of sks dog",
        "modelspec.resolution": "1024x1024",
        "ss_network_module": "networks.lora_sd3",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_base_model_version": "sd3",
        "ss_sd_model_name": "somebody/sd3",
        "ss_steps": "800",
        "ss_seed": "0",
    }
    assert expected.items() <= metadata.items()
    assert json.loads(metadata["sd3_lora"])["trigger"] == "a photo of sks dog"
    before = path.read_bytes()
    export_lora(lora, "kohya", path, base.files)
    assert path.read_bytes() == before


# Full size


@pytest.mark.parametrize(
    ("model", "architecture"),
    [("SD3-Medium", "medium"), ("SD3.5-Medium", "5-medium"), ("SD3.5-Large", "5-large")],
)
def test_names_and_shapes_at_full_size(model: str, architecture: str) -> None:
    """Every linear layer of the model is rows of a layer of the original, and all of the original's rows are taken."""
    from sd3_lora.transformer.lora_exports import _model_version

    config: dict[str, Any] = SHARED | MODELS[model]
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(config)
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    places = original_places(dict(transformer.named_modules()))
    assert places.keys() == linears.keys()
    shapes = {
        name.removesuffix(".weight"): shape
        for name, shape in original_shapes(dict(transformer.config)).items()
        if name.endswith(".weight") and len(shape) == 2
    }
    heights = dict.fromkeys(shapes, 0)
    for name, place in places.items():
        height, width = shapes[place.layer]
        assert tuple(linears[name].weight.shape) == (height // place.parts, width)
        heights[place.layer] += height // place.parts
    assert heights == {name: shape[0] for name, shape in shapes.items()}
    assert len({(place.layer, place.part) for place in places.values()}) == len(places)
    assert _model_version(transformer.config) == architecture
