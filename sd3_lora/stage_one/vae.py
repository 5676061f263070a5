"""The VAE, loaded as both of its tasks use it: pictures → latents in stage one, latents → pictures in drawing."""

from __future__ import annotations

from sd3_lora.common.devices import DTYPES
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one.vae_norms import arrange_vae
from sd3_lora.stage_one.vae_tiles import VaeTile

import torch
from diffusers import AutoencoderKL


def load_vae(files: ModelFiles, precision: str, device: torch.device, tile: VaeTile | None = None) -> AutoencoderKL:
    """Loads the VAE.

    Args:
        files: the model.
        precision: fp32, fp16 or bf16.
        device: where it runs.
        tile: what it takes at a time; None for whole pictures.
    """
    vae = AutoencoderKL.from_pretrained(
        files.component("vae"),
        variant=files.config.variant,
        torch_dtype=DTYPES[precision],
        use_safetensors=True,
    ).to(device)
    arrange_vae(vae)
    if tile is not None:
        tile.apply(vae)
    return vae
