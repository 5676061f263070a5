#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.0, torch 2.13.0: load_lora_weights of an SD3 pipeline takes whole LoRA files of other
# programs, raises nothing, and draws without them.
#
# One would have sworn that a LoRA file of which no tensor is applied is an error, as a file with one `.alpha` too many is.
# Seen instead: the layers' names decide. Where none begins with `transformer.`, nothing is loaded, and a warning says that
# this "is safe to ignore if LoRA state dict didn't originally have any SD3Transformer2DModel related params". So it is
# with the files of sd-scripts (kohya), OneTrainer, PEFT (save_pretrained), and with bare names. A file in diffusers' own
# names with `.alpha` beside them, as SimpleTuner's ComfyUI form, is refused with the reason that its names lack "lora".
#
# Output seen (the largest change of the velocity):
#   diffusers: 0.067
#   sd-scripts (kohya): 0.000
#   OneTrainer: 0.000
#   PEFT, an adapter: 0.000
#   without a prefix: 0.000
#   diffusers with .alpha: ValueError, Invalid LoRA checkpoint. Make sure all LoRA param names contain `'lora'` substring.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 diffusers==0.42.1 peft==0.21.0 transformers==5.23.0
FOLDER=$folder "$folder/venv/bin/python" - <<'PYTHON'
import os

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import save_file

SIZES = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 8}
SIZES |= {"attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32, "pooled_projection_dim": 8}
OTHERS = ("scheduler", "vae", *(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
NAMES = {  # of the layer, and of the two matrices
    "diffusers": ("transformer.transformer_blocks.0.attn.to_q", "lora_A", "lora_B"),
    "sd-scripts (kohya)": ("lora_unet_joint_blocks_0_x_block_attn_qkv", "lora_down", "lora_up"),
    "OneTrainer": ("lora_transformer_transformer_blocks_0_attn_to_q", "lora_down", "lora_up"),
    "PEFT, an adapter": ("base_model.model.transformer_blocks.0.attn.to_q", "lora_A", "lora_B"),
    "without a prefix": ("transformer_blocks.0.attn.to_q", "lora_A", "lora_B"),
    "diffusers with .alpha": ("transformer.transformer_blocks.0.attn.to_q", "lora_A", "lora_B"),
}


@torch.no_grad()
def velocity(transformer: SD3Transformer2DModel) -> torch.Tensor:
    torch.manual_seed(1)
    latents, text, pooled = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32), torch.randn(1, 8)
    return transformer(latents, text, pooled, torch.tensor([500.0])).sample


for form, (layer, down, up) in NAMES.items():
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(**SIZES, joint_attention_dim=32)
    before = velocity(transformer)
    pipeline = StableDiffusion3Pipeline(transformer, **dict.fromkeys(OTHERS))
    height = 96 if "qkv" in layer else 32
    tensors = {f"{layer}.{down}.weight": torch.randn(4, 32), f"{layer}.{up}.weight": torch.randn(height, 4)}
    if "alpha" in form or "down" in down:
        tensors[f"{layer}.alpha"] = torch.tensor(4.0)
    path = os.path.join(os.environ["FOLDER"], "lora.safetensors")
    save_file(tensors, path)
    try:
        pipeline.load_lora_weights(path)
    except ValueError as error:
        print(f"{form}: ValueError, {error}")
        assert form == "diffusers with .alpha"
        continue
    change = float((velocity(transformer) - before).abs().max())
    print(f"{form}: {change:.3f}")
    assert (change > 0.01) == (form == "diffusers")
PYTHON
