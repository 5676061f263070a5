"""The one way in which the transformer is called."""

from __future__ import annotations

from sd3_lora.transformer.velocity import VelocityModel

import pytest
import torch
from small_transformer import CPU, inputs, make_transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_velocity_is_the_transformers(dtype: torch.dtype) -> None:
    """Of latents in float32, with an adapter in float32 in a base of any precision."""
    transformer = make_transformer(dtype=dtype)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    arguments = inputs(0, CPU)
    latents, timesteps, prompt_embeds, pooled = arguments.values()
    velocity = VelocityModel(transformer, dtype)(latents, timesteps, prompt_embeds.to(dtype), pooled.to(dtype))
    arguments["encoder_hidden_states"] = prompt_embeds.to(dtype)
    arguments["pooled_projections"] = pooled.to(dtype)
    arguments["hidden_states"] = latents.to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = transformer(**arguments, return_dict=False)[0]
    assert velocity.shape == latents.shape
    assert velocity.dtype == dtype
    assert torch.equal(velocity, expected)


def test_autocast_is_for_lower_precisions_alone() -> None:
    for dtype, device, is_on in (
        (torch.bfloat16, CPU, True),
        (torch.float32, CPU, False),
        (torch.bfloat16, torch.device("meta"), False),
    ):
        with VelocityModel(make_transformer(layers=1, dual=()), dtype).precision(device):
            assert torch.is_autocast_enabled("cpu") == is_on
