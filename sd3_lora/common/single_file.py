"""A base in one safetensors file, as ComfyUI's users have it: its parts, and their tensors by diffusers' names.

Names are those of Stability's own files: `model.diffusion_model.joint_blocks…` (or without the prefix),
`first_stage_model…`, `text_encoders.clip_l.transformer…`, `clip_g` and `t5xxl`. No such file holds a tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3_lora.common.command_line import UserError, quoted
from sd3_lora.common.tensor_files import TensorFiles

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

SOURCE_FILE = "single_file.json"  # in a converted folder: which file it is of
TRANSFORMER, VAE = "transformer", "vae"
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
_BARE_TRANSFORMER = ("joint_blocks.", "x_embedder.", "t_embedder.", "y_embedder.", "context_embedder.", "final_layer.")
_PREFIXES = {
    "model.diffusion_model.": TRANSFORMER,
    "first_stage_model.": VAE,
    **{f"text_encoders.{name}.transformer.": component for component, name in ENCODERS.items()},
}
# What no part of the pipeline reads.
_IDLE_ENDINGS = (".logit_scale", ".position_ids", "model_ema.decay", "model_ema.num_updates")
_SCALED_ENDINGS = (".scale_weight", ".scale_input", "scaled_fp8", ".weight_scale", ".input_scale")
_SHARD_BYTES = 1024**3
_NARROW = {torch.float8_e4m3fn: torch.float16, torch.float8_e5m2: torch.float16}  # which nothing here computes in


def converted_folder(path: Path) -> Path:
    """The folder beside a single file in which its parts are, by diffusers' names."""
    return path.with_name(f"{path.stem}-diffusers")


def source_of(path: Path) -> dict[str, Any]:
    """By what a file is known, for `SOURCE_FILE`."""
    return {"name": path.name, "bytes": path.stat().st_size}


def require_converted(path: Path) -> Path:
    """The converted folder of a single file.

    Raises:
        UserError: it was not converted yet, or was replaced since.
    """
    folder = converted_folder(path)
    remedy = f"type `{quoted(['python', '-m', 'sd3_lora.convert', str(path)])}` once"
    try:
        noted = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is one file, which is first laid out as a diffusers folder: {remedy}") from error
    if noted != source_of(path):
        raise UserError(f"{folder} was made of another file than {path} is now: delete it, and {remedy}")
    return folder


class SingleFile:
    """A single file's tensors, by component.

    Args:
        path: the file.

    Attributes:
        components: component → the names of its tensors in the file, by their names without the prefix.

    Raises:
        UserError: it is no SD3 in one file, is not whole, or holds tensors of something else.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._tensors = TensorFiles([path])
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from error
        self.components: dict[str, dict[str, str]] = {}
        self.shapes = self._tensors.shapes()
        for name in self.shapes:
            if name.endswith(_IDLE_ENDINGS):
                continue
            if name.endswith(_SCALED_ENDINGS):
                raise UserError(f"{path} holds scaled 8-bit weights ({name}): give the file in 16 bits")
            component, inner = _place_of(name)
            if component is None:
                raise UserError(
                    f"{path} holds {name}, which is no part of a Stable Diffusion 3 model: give the file of one"
                )
            self.components.setdefault(component, {})[inner] = name
        if "joint_blocks.0.x_block.attn.qkv.weight" not in self.components.get(TRANSFORMER, {}):
            raise UserError(f"{path} holds no transformer of Stable Diffusion 3: give a file with joint_blocks in it")

    def shape(self, component: str, name: str) -> torch.Size | None:
        """Of a tensor; None where there is none."""
        full = self.components[component].get(name)
        return None if full is None else self.shapes[full]

    def transformer_config(self, like: Mapping[str, Any]) -> dict[str, Any]:
        """The transformer's configuration, by the shapes of its tensors.

        Args:
            like: another SD3's, for what shapes do not say: the width of a head that is not normalized, and the
                model's own resolution.
        """

        def shape(name: str) -> torch.Size:
            found = self.shape(TRANSFORMER, name)
            if found is None:
                raise UserError(f"{self.path} lacks {name}: download it again")
            return found

        names = self.components[TRANSFORMER]
        width, channels, patch, _ = shape("x_embedder.proj.weight")
        norm = self.shape(TRANSFORMER, "joint_blocks.0.x_block.attn.ln_q.weight")
        head = norm[0] if norm else like["attention_head_dim"]
        dual = {int(name.split(".")[1]) for name in names if ".attn2." in name}
        return {
            **like,
            "num_layers": 1 + max(int(name.split(".")[1]) for name in names if name.startswith("joint_blocks.")),
            "patch_size": patch,
            "in_channels": channels,
            "out_channels": shape("final_layer.linear.weight")[0] // patch**2,
            "attention_head_dim": head,
            "num_attention_heads": width // head,
            "joint_attention_dim": shape("context_embedder.weight")[1],
            "caption_projection_dim": shape("context_embedder.weight")[0],
            "pooled_projection_dim": shape("y_embedder.mlp.0.weight")[1],
            "pos_embed_max_size": math.isqrt(shape("pos_embed")[1]),
            "dual_attention_layers": sorted(dual),
            "qk_norm": "rms_norm" if norm else None,
        }

    def tensors(self, component: str, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """A component's tensors by diffusers' names; most of them views of the mapped file.

        Args:
            component: one of `components`.
            config: of the component.

        Raises:
            UserError: there are tensors that it does not have.
        """
        from diffusers.loaders import single_file_utils as diffusers_names

        inner = {name: self._tensors.tensor(full) for name, full in self.components[component].items()}
        if component == TRANSFORMER:
            made = diffusers_names.convert_sd3_transformer_checkpoint_to_diffusers(inner)
            left = list(inner)  # it has taken what it knows
        elif component == VAE:
            made = diffusers_names.convert_ldm_vae_checkpoint(inner, config)
            taken = {tensor.data_ptr() for tensor in made.values()}  # as it is, or as a view
            left = [name for name, tensor in inner.items() if tensor.data_ptr() not in taken]
        else:
            made, left = inner, []
        if left:
            raise UserError(f"{self.path} holds {left[0]}, which the {component} of Stable Diffusion 3 has not")
        if component == "text_encoder":  # SD3 projects CLIP-L's pooled vector by itself
            made.setdefault("text_projection.weight", torch.eye(config["hidden_size"], dtype=torch.float16))
        if component == "text_encoder_3" and "shared.weight" in made:
            made.pop("encoder.embed_tokens.weight", None)  # the same
        return made

    def write(self, component: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Writes a component's configuration and weights, a shard at a time."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        stem = "model" if component in ENCODERS else "diffusion_pytorch_model"
        shards = list(_shards(self.tensors(component, config)))
        index: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            index |= dict.fromkeys(names, f"{stem}{suffix}.safetensors")
            tensors = {name: tensor.to(_NARROW.get(tensor.dtype, tensor.dtype)) for name, tensor in names.items()}
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, folder / f"{stem}{suffix}.safetensors", {"format": "pt"})
        if len(shards) > 1:
            content = {"metadata": {}, "weight_map": index}
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def _place_of(name: str) -> tuple[str | None, str]:
    """The component of a tensor, and its name there; None where it is of none."""
    for prefix, component in _PREFIXES.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    return (TRANSFORMER, name) if name == "pos_embed" or name.startswith(_BARE_TRANSFORMER) else (None, name)


def _shards(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """In their order, at most `_SHARD_BYTES` together, but one at least."""
    shard, size = dict[str, torch.Tensor](), 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard
