"""Saves an SD3 with random weights: of full size, so that memory and speed can be measured without the gated ones.

Both depend on shapes and dtypes, not on values. The shapes are those of the published model configurations; the
tokenizers are the miniature's, whose ids are valid in the larger vocabularies.

    python benchmarks/random_sd3.py sd3-medium /tmp/sd3-medium
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

MINIATURE = Path(__file__).resolve().parent.parent / "miniature"
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "sd3-medium": {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    "sd3.5-medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd3.5-large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
}
CLIPS = {
    "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "text_encoder_2": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20},
}
T5: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
VAE: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024}

COMPONENTS = ("transformer", "vae", "text", "clips")  # clips: of the text encoders those two alone
TEXT = (*CLIPS, "text_encoder_3")


def make_transformer(size: str) -> SD3Transformer2DModel:
    """Of random weights, on the default device."""
    shapes = {"sample_size": 128, "joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 192}
    return SD3Transformer2DModel(**shapes | TRANSFORMERS[size])


def make(component: str) -> torch.nn.Module:
    """The VAE or a text encoder, of random weights on the default device in the default dtype."""
    if component == "vae":  # the miniature's VAE and CLIPs are SD3's but for their sizes
        return AutoencoderKL.from_config({**AutoencoderKL.load_config(MINIATURE / "vae"), **VAE})
    if component == "text_encoder_3":
        return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5))
    sizes, width = CLIPS[component], CLIPS[component]["hidden_size"]
    shapes = {"vocab_size": 49408, "intermediate_size": 4 * width, "projection_dim": width, **sizes}
    return CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(MINIATURE / component, **shapes))


def save(size: str, folder: Path, components: Sequence[str] = COMPONENTS) -> None:
    """Saves the components in float16, as the published files are; those not asked for are the miniature's.

    What is in the folder already, and not asked for, is left.
    """
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        if "transformer" in components:
            transformer = make_transformer(size).half()
            transformer.save_pretrained(folder / "transformer", max_shard_size="20GB")
            del transformer
        small = {"vae": "vae" in components, **dict.fromkeys(CLIPS, "clips" in components)}
        small |= dict.fromkeys(TEXT, True) if "text" in components else {}
        for name in (name for name, is_asked in small.items() if is_asked):
            make(name).half().save_pretrained(folder / name, max_shard_size="5GB")
    torch.set_default_dtype(torch.float32)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    for name in ("transformer", "vae", *TEXT, "tokenizer", "tokenizer_2", "tokenizer_3"):
        if not (folder / name).is_dir():
            shutil.copytree(MINIATURE / name, folder / name)
    shutil.copy(MINIATURE / "model_index.json", folder)


# Tiny: for the tests and for long jobs


def smaller_transformer(**sizes: object) -> SD3Transformer2DModel:
    """Random weights in the miniature's transformer, but narrower, for 8 × 8 latents, and with these sizes."""
    config = SD3Transformer2DModel.load_config(MINIATURE / "transformer")
    config |= {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    return SD3Transformer2DModel.from_config(config | sizes)


def save_tiny_sd3(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """A random SD3 of real classes and few weights for pictures of 64 px, with the miniature's tokenizers.

    Args:
        folder: to write.
        seed: of its weights.
        width: of the joint attention. 48 is no multiple of the CLIPs' widths (8 + 16), so that a hard-coded 4096, 2048
            or 77 cannot hide.

    Returns:
        The folder.
    """
    torch.manual_seed(seed)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(MINIATURE / name, folder / name)
    sizes: dict[str, Any] = {"num_layers": 2, "joint_attention_dim": width, "pooled_projection_dim": 24}
    smaller_transformer(**sizes, pos_embed_max_size=16).save_pretrained(folder / "transformer")
    # Likewise the miniature's VAE and text encoders, but smaller still.
    vae = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": 64}
    AutoencoderKL.from_config({**AutoencoderKL.load_config(MINIATURE / "vae"), **vae}).save_pretrained(folder / "vae")
    for name, size in (("text_encoder", 8), ("text_encoder_2", 16)):
        sizes = {"hidden_size": size, "projection_dim": size, "intermediate_size": 2 * size, "num_hidden_layers": 2}
        config = CLIPTextConfig.from_pretrained(MINIATURE / name, **sizes, num_attention_heads=2)
        CLIPTextModelWithProjection(config).save_pretrained(folder / name)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_heads": 2}
    t5 = T5Config.from_pretrained(MINIATURE / "text_encoder_3", **sizes)
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_3")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    shutil.copy(MINIATURE / "model_index.json", folder / "model_index.json")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=TRANSFORMERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--components", nargs="+", choices=COMPONENTS, default=COMPONENTS)
    arguments = parser.parse_args(argv)
    save(arguments.size, arguments.folder, arguments.components)
    return 0


if __name__ == "__main__":
    sys.exit(main())
