"""The CLIP text encoders: what a streamed one copies."""

from __future__ import annotations

from pathlib import Path

from sd3_lora.common.config import ModelConfig
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.stage_one.text_encoder_plan import CLIP_BATCH_SIZE, TextEncoderPlan
from sd3_lora.stage_one.text_encoders import encode_clip, load_clip

import pytest
import torch
from transformers import CLIPTokenizer


@torch.no_grad()
@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_pass_through_a_clip_at_a_time(tiny_sd3: Path, stream: bool) -> None:
    files, device = ModelFiles(ModelConfig(str(tiny_sd3))), torch.device("cpu")
    tokenizer = CLIPTokenizer.from_pretrained(files.component("tokenizer"))
    prompts = [f"robot {index}" for index in range(2 * CLIP_BATCH_SIZE + 1)]
    sizes: list[int] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if type(module).__name__ == "Embedding" else None
    )
    try:
        plan = TextEncoderPlan("fp32", stream, 77, device)
        found = list(encode_clip(load_clip(files, "text_encoder", plan), tokenizer, prompts, 77, plan))
    finally:
        handle.remove()
    # A streamed encoder comes to the device once for each of these, whatever their size.
    assert [size for size in sizes if size > 1] == [CLIP_BATCH_SIZE, CLIP_BATCH_SIZE]
    assert sum(len(hidden) for hidden, _ in found) == sum(len(pooled) for _, pooled in found) == len(prompts)
