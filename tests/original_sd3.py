"""The original SD3 (MMDiT) as other programs know it: its tensors by name, and how those programs apply a LoRA to them.

How they read is written from their rules, and knows nothing of the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import MINIATURE, ModelFiles
from sd3_lora.transformer.lora_files import LoraFile

import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from small_transformer import inputs

Tensors = dict[str, torch.Tensor]
PREFIX = "lora_unet_"


WIDTH = 32
CONFIG = SD3Transformer2DModel.load_config(MINIATURE / "transformer") | {
    **{"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": WIDTH},
    **{"in_channels": 4, "out_channels": 4, "num_layers": 3, "joint_attention_dim": WIDTH, "pooled_projection_dim": 8},
    **{"pos_embed_max_size": 8, "dual_attention_layers": (0, 1)},
}


@dataclass
class Base:
    """A small SD3.5-Medium of random weights in the original's layout, and its files in diffusers'."""

    original: Tensors
    files: ModelFiles

    @classmethod
    def saved(cls, folder: Path) -> Base:
        original = random_original(CONFIG)
        in_diffusers(original, CONFIG).save_pretrained(folder / "transformer")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
        return cls(original, ModelFiles(ModelConfig(str(folder))))

    def transformer(self) -> SD3Transformer2DModel:
        return in_diffusers(self.original, CONFIG)

    def drawn(self, lora: LoraFile) -> torch.Tensor:
        """What we draw with a LoRA."""
        transformer = self.transformer()
        lora.attach(transformer, "lora_0")
        return velocity(transformer)


def velocity(transformer: SD3Transformer2DModel) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs(0, torch.device("cpu"))).sample


def _linear(name: str, width_out: int, width_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width_out, width_in), f"{name}.bias": (width_out,)}


def original_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of an SD3 of these sizes, given in diffusers' terms."""
    heads, head, layers = config["num_attention_heads"], config["attention_head_dim"], config["num_layers"]
    width, patch, channels = heads * head, config["patch_size"], config["in_channels"]
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config["pos_embed_max_size"] ** 2, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        **_linear("t_embedder.mlp.0", width, 256),
        **_linear("t_embedder.mlp.2", width, width),
        **_linear("y_embedder.mlp.0", width, config["pooled_projection_dim"]),
        **_linear("y_embedder.mlp.2", width, width),
        **_linear("context_embedder", width, config["joint_attention_dim"]),
        **_linear("final_layer.adaLN_modulation.1", 2 * width, width),
        **_linear("final_layer.linear", patch * patch * config["out_channels"], width),
    }
    dual = config.get("dual_attention_layers") or ()
    for index in range(layers):
        for stream in ("context_block", "x_block"):
            block, is_short = f"joint_blocks.{index}.{stream}.", stream == "context_block" and index == layers - 1
            has_second = stream == "x_block" and index in dual
            parts = 2 if is_short else 9 if has_second else 6
            shapes |= _linear(block + "adaLN_modulation.1", parts * width, width)
            for attention in ("attn", "attn2") if has_second else ("attn",):
                shapes |= _linear(f"{block}{attention}.qkv", 3 * width, width)
                shapes |= {} if is_short else _linear(f"{block}{attention}.proj", width, width)
                if config.get("qk_norm"):
                    shapes |= {f"{block}{attention}.ln_{letter}.weight": (head,) for letter in "qk"}
            if not is_short:
                shapes |= _linear(block + "mlp.fc1", 4 * width, width) | _linear(block + "mlp.fc2", width, 4 * width)
    return shapes


def random_original(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """An SD3 of random weights in the original's names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in original_shapes(config).items():
        tensor = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.1 * tensor if ".ln_" in name else tensor / shape[-1] ** 0.5
    return tensors


def in_diffusers(original: Tensors, config: Mapping[str, Any]) -> SD3Transformer2DModel:
    """The same model as diffusers' class, by diffusers' own conversion."""
    transformer = SD3Transformer2DModel.from_config(dict(config))
    transformer.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(dict(original)))
    return transformer.eval()


def apply_by_sd_scripts(original: Tensors, lora: Tensors) -> Tensors:
    """As sd-scripts does: a module for each layer that has a lora_down, whose alpha must be there."""
    lora, merged = dict(lora), dict(original)
    for name, weight in original.items():
        key = PREFIX + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_down.weight" in lora:
            down, up = lora.pop(f"{key}.lora_down.weight"), lora.pop(f"{key}.lora_up.weight")
            alpha = float(lora.pop(f"{key}.alpha")) or len(down)
            merged[name] = weight + up @ down * (alpha / len(down))
    assert not lora, sorted(lora)  # sd-scripts leaves these out, and says nothing
    return merged


def apply_by_comfyui(original: Tensors, lora: Tensors) -> Tensors:
    """As ComfyUI and Forge do: without an alpha the strength is 1; `.diff` and `.diff_b` are added as they are."""
    lora, merged = dict(lora), dict(original)
    for name, weight in original.items():
        key = PREFIX + name.removesuffix(".weight").replace(".", "_")
        alpha = lora.pop(f"{key}.alpha", None)
        for part, changed in (("diff", name), ("diff_b", name.removesuffix("weight") + "bias")):
            if f"{key}.{part}" in lora:
                merged[changed] = merged[changed] + lora.pop(f"{key}.{part}").float()
        if f"{key}.lora_up.weight" in lora:
            up, down = lora.pop(f"{key}.lora_up.weight"), lora.pop(f"{key}.lora_down.weight")
            merged[name] = weight + up @ down * (1.0 if alpha is None else float(alpha) / len(down))
    assert not lora, sorted(lora)
    return merged


def apply_by_a1111(original: Tensors, lora: Tensors) -> Tensors:
    """As A1111 does for SD3: keys are cut at their last two dots, which fails where there is but one."""
    layers = {f"diffusion_model.{name.removesuffix('.weight')}".replace(".", "_"): name for name in original}
    merged, parts = dict(original), dict[str, Tensors]()
    for key, tensor in lora.items():
        layer, kind, kind_too = key.rsplit(".", 2)
        parts.setdefault(layers[layer.replace("lora_unet", "diffusion_model")], {})[f"{kind}.{kind_too}"] = tensor
    for name, own in parts.items():
        assert own.keys() == {"lora_up.weight", "lora_down.weight"}
        merged[name] = merged[name] + own["lora_up.weight"] @ own["lora_down.weight"]
    return merged
