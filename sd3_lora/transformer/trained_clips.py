"""The two CLIPs with a LoRA that is trained: they encode the prompts inside the step, and T5's part stays cached.

Every layer is recomputed in backward: with 77 tokens that takes little time, and the layers would keep more than the
CLIPs' LoRA and its optimizer take.

The tokens' frozen embeddings stay on the host, where 77 rows a prompt are looked up.

Shapes: R rows of the model's batch, C CLIP tokens, S text tokens, d width of a CLIP, D joint attention width, P pooled
width of both CLIPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sd3_lora.common.joined_embeddings import join_embeddings
from sd3_lora.gpu.simulation import stand_in_for_gpu
from sd3_lora.transformer.lora import attach_lora
from sd3_lora.transformer.lora_keys import CLIPS
from sd3_lora.transformer.recompute import recomputed

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# As in diffusers' train_dreambooth_lora_sd3.py.
CLIP_LAYERS = ("k_proj", "out_proj", "q_proj", "v_proj")


@dataclass(frozen=True)
class ClipLora:
    """The LoRA of the CLIPs: a plain one, whose alpha is its rank.

    Attributes:
        configs: of each CLIP, by the names of `CLIPS`.
        rank: of every layer.
        dropout: of its inputs.
        seed: of `lora_A`, which is drawn as diffusers draws it; each CLIP's is the one before plus 1.
    """

    configs: Mapping[str, Mapping[str, Any]]
    rank: int
    dropout: float = 0.0
    seed: int = 0

    def attach(self, clips: Mapping[str, Any]) -> list[torch.nn.Parameter]:
        """Freezes the CLIPs, adds the LoRA, and returns its parameters, in float32."""
        parameters = []
        for place, clip in enumerate(clips.values(), start=1):
            targets = [
                name
                for name, module in clip.named_modules()
                if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in CLIP_LAYERS
            ]
            parameters += attach_lora(clip, targets, self.rank, float(self.rank), self.dropout, self.seed + place)
        return parameters

    @property
    def states_shape(self) -> tuple[int, int]:
        """`(C, d1 + d2)`: the tokens of a prompt, and both CLIPs' widths."""
        config = self.configs[CLIPS[0]]
        return config["max_position_embeddings"], sum(each["hidden_size"] for each in self.configs.values())

    def hollow(self, dtype: torch.dtype) -> TrainedClips:
        """The CLIPs with this LoRA on the meta device, which compute as on a GPU; weights in `dtype`."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # takes a second, and few need it

        with torch.device("meta"):
            clips = {}
            for name, config in self.configs.items():
                clips[name] = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config))).to(dtype)
            self.attach(clips)
        trained = TrainedClips(clips)
        for module in (trained, *(layer for clip in clips.values() for layer in clip.text_model.encoder.layers)):
            stand_in_for_gpu(module, dtype, attention_kernel="math")
        return trained.train()


class TrainedClips(torch.nn.Module):
    """Both CLIPs.

    Args:
        clips: by the names of `CLIPS`, each with its LoRA attached. Their embeddings are taken from them.
    """

    def __init__(self, clips: Mapping[str, Any]):
        super().__init__()
        self.clips = torch.nn.ModuleDict({name: clips[name] for name in CLIPS})
        self._embeddings = [clip.text_model.embeddings for clip in clips.values()]  # in a list they are not moved
        for clip in clips.values():
            clip.text_model.embeddings = None
        self._widths = [clip.config.hidden_size for clip in clips.values()]
        # The generators' states are needed only where dropout draws, and cannot be read in a capture.
        self._draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in self.modules())

    def by_name(self) -> dict[str, torch.nn.Module]:
        """The CLIPs by the names of `CLIPS`."""
        return dict(self.clips.items())

    @property
    def frozen_bytes(self) -> int:
        """Of the weights that are not trained."""
        return sum(parameter.nbytes for parameter in self.parameters() if not parameter.requires_grad)

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` begins with, on the host.

        Args:
            tokens: `(R, 2, C)` int64, of each CLIP.

        Returns:
            `(R, C, d1 + d2)`, each CLIP's embeddings of tokens and places side by side; and `(R, 2)` int64, where the
            text ends for each.
        """
        states, places = [], []
        for place, (embeddings, clip) in enumerate(zip(self._embeddings, self.clips.values(), strict=True)):
            ids = tokens[:, place]
            states.append(embeddings(input_ids=ids))
            # Its id; or in configurations from before that was noted there, the largest id.
            text: Any = clip.text_model
            end = text.eos_token_id
            places.append((ids if end == 2 else (ids == end)).int().argmax(dim=-1))
        return torch.cat(states, dim=-1), torch.stack(places, dim=1)

    def forward(
        self, prompt_embeds: torch.Tensor, states: torch.Tensor, ends: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts' embeddings, as `StableDiffusion3Pipeline.encode_prompt` arranges them.

        Args:
            prompt_embeds: `(R, S, D)`, of which T5's part is taken.
            states: `(R, C, d1 + d2)`, as `embed` gives them.
            ends: `(R, 2)` int64, likewise.
            kept: `(R, 2)`, 0 where a CLIP's part of a prompt is dropped, else 1.

        Returns:
            `(R, S, D)` and `(R, P)` in the dtype of `prompt_embeds`.
        """
        hidden, pooled = [], []
        parts = states.split(self._widths, dim=-1)
        for place, (clip, part) in enumerate(zip(self.clips.values(), parts, strict=True)):
            penultimate, projected = self._encode(clip, part, ends[:, place])
            share = kept[:, place].to(penultimate.dtype)
            hidden.append(penultimate * share[:, None, None])
            pooled.append(projected * share[:, None].to(projected.dtype))
        t5_hidden = prompt_embeds[:, states.shape[1] :]
        return join_embeddings(hidden, t5_hidden), torch.cat(pooled, dim=-1).to(t5_hidden.dtype)

    def _encode(self, clip: Any, states: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The penultimate hidden states `(R, C, d)` and the pooled projection `(R, p)`.

        The layers are called one by one, since transformers' own forward knows no recompute without a generator's
        state, which cannot be read in a capture.
        """
        text = clip.text_model
        for layer in text.encoder.layers[:-1]:
            states = recomputed(partial(_run, layer), (states,), self._draws)
        last = recomputed(partial(_run, text.encoder.layers[-1]), (states,), self._draws)
        last = text.final_layer_norm(last)
        return states, clip.text_projection(last[torch.arange(len(ends), device=ends.device), ends])


def _run(layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """A layer of a CLIP. torch's plain attention: the exact backward pass of the fused ones knows no causal order."""
    with sdpa_kernel(SDPBackend.MATH):
        return layer(states, None, is_causal=True)
