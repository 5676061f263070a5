"""One picture by diffusers' own pipeline with model offload, as its documentation has it: what inference.py is beside.

python benchmarks/stock_picture.py --model /tmp/models/sd3-medium-with-text --output_path picture.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", default="a photo of sks dog")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, default=1024, help="Height and width in pixels.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="A CPU offloads nothing.")
    parser.add_argument("--embeds", type=Path, help="The prompts' embeddings: no text encoder is loaded.")
    parser.add_argument("--lora", help="A folder.")
    parser.add_argument("--output_path", type=Path, required=True)
    flags = parser.parse_args(argv)
    dtype = torch.float16 if flags.device == "cuda" else torch.float32
    nothing = dict.fromkeys(TEXT) if flags.embeds else {}
    pipeline = StableDiffusion3Pipeline.from_pretrained(flags.model, torch_dtype=dtype, **nothing)
    if flags.lora:
        pipeline.load_lora_weights(flags.lora)
    if flags.device == "cuda":
        pipeline.enable_model_cpu_offload()
    given = {"prompt": flags.prompt, "max_sequence_length": 77}
    if flags.embeds:
        given = {name: each.to(flags.device, dtype) for name, each in load_file(flags.embeds).items()}
    picture = pipeline(
        **given,
        num_inference_steps=flags.steps,
        guidance_scale=7.0,
        height=flags.size,
        width=flags.size,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    picture.save(flags.output_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
