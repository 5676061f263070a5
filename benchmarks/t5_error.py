"""How far T5's hidden states move in each precision, relative to fp32: ‖x - fp32‖ / ‖fp32‖ over all prompts.

python benchmarks/t5_error.py --model stabilityai/stable-diffusion-3-medium-diffusers
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.common.command_line import read_text_lines
from sd3_lora.common.config import ModelConfig
from sd3_lora.common.defaults import EXAMPLE_PROMPTS_FILE
from sd3_lora.common.devices import choose_device
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one.text_encoder_plan import TextEncoderPlan
from sd3_lora.stage_one.text_encoders import encode_prompts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id; default: the bundled miniature")
    parser.add_argument("--max_sequence_length", type=int, default=77)
    parser.add_argument("--precisions", nargs="+", default=["fp16", "int8", "nf4"])
    arguments = parser.parse_args(argv)
    files = ModelFiles(ModelConfig(pretrained_model_name_or_path=arguments.model))
    prompts, device = read_text_lines(EXAMPLE_PROMPTS_FILE), choose_device("auto")

    def t5_tokens(precision: str, stream: bool):
        plan = TextEncoderPlan(precision, stream, arguments.max_sequence_length, device)
        prompt_embeds, _ = encode_prompts(files, prompts, plan, [])  # (N, S, D)
        return prompt_embeds[:, -arguments.max_sequence_length :].double()

    exact = t5_tokens("fp32", True)
    for precision in arguments.precisions:
        error = (t5_tokens(precision, False) - exact).norm() / exact.norm()
        print(json.dumps({"model": files.name, "precision": precision, "relative_error": round(error.item(), 6)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
