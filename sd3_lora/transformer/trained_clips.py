"""The two CLIPs with what is trained of them: they encode the prompts inside the step, and T5's part stays cached.

That is a LoRA, or the identifier's embedding, or both.

Every layer is recomputed in backward: with 77 tokens that takes little time, and the layers would keep more than the
CLIPs' LoRA and its optimizer take.

The tokens' frozen embeddings stay on the host, where 77 rows a prompt are looked up. The identifier's vectors are on
the device, and are put in place there.

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
from sd3_lora.transformer.identifier_vectors import IdentifierVectors
from sd3_lora.transformer.lora import attach_lora
from sd3_lora.transformer.lora_keys import CLIPS
from sd3_lora.transformer.recompute import recomputed
from sd3_lora.transformer.streaming import Piece, StreamedBlocks, move_the_rest, pieces_of

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

# As in diffusers' train_dreambooth_lora_sd3.py.
CLIP_LAYERS = ("k_proj", "out_proj", "q_proj", "v_proj")
# Of streamed CLIPs, on the device: the three of a layer, which backward needs twice, and one to prefetch into.
CLIP_BUFFERS = 4


@dataclass(frozen=True)
class ClipTraining:
    """What is trained of the CLIPs: a plain LoRA, whose alpha is its rank; and vectors in the identifier's place.

    Attributes:
        configs: of each CLIP, by the names of `CLIPS`.
        rank: of the LoRA, in every layer; None where there is none.
        dropout: of its inputs.
        seed: of `lora_A`, which is drawn as diffusers draws it; each CLIP's is the one before plus 1.
        vectors: of the identifier's embedding; 0 where it is not trained.
    """

    configs: Mapping[str, Mapping[str, Any]]
    rank: int | None
    dropout: float = 0.0
    seed: int = 0
    vectors: int = 0

    def attach(self, clips: Mapping[str, Any]) -> list[torch.nn.Parameter]:
        """Freezes the CLIPs, adds the LoRA if there is one, and returns its parameters, in float32."""
        parameters = []
        for place, clip in enumerate(clips.values(), start=1):
            if self.rank is None:
                clip.requires_grad_(False)
                continue
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
        """The CLIPs so trained on the meta device, which compute as on a GPU; weights in `dtype`."""
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection  # takes a second, and few need it

        with torch.device("meta"):
            clips = {}
            for name, config in self.configs.items():
                clips[name] = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config))).to(dtype)
            self.attach(clips)
            starts = {name: torch.empty(self.vectors, clip.config.hidden_size) for name, clip in clips.items()}
            identifier = IdentifierVectors(starts, dict.fromkeys(clips, 1.0)) if self.vectors else None
        trained = TrainedClips(clips, identifier)
        for module in (trained, *(layer for clip in clips.values() for layer in clip.text_model.encoder.layers)):
            stand_in_for_gpu(module, dtype, attention_kernel="math")
        return trained.train()


class TrainedClips(torch.nn.Module):
    """Both CLIPs.

    Args:
        clips: by the names of `CLIPS`, each with its LoRA attached. Their embeddings are taken from them.
        identifier: the vectors that stand in place of the identifier, if they are trained.
    """

    def __init__(self, clips: Mapping[str, Any], identifier: IdentifierVectors | None = None):
        super().__init__()
        self.identifier = identifier
        self.clips = torch.nn.ModuleDict({name: clips[name] for name in CLIPS})
        self._embeddings = [clip.text_model.embeddings for clip in clips.values()]  # in a list they are not moved
        for clip in clips.values():
            clip.text_model.embeddings = None
        self._widths = [clip.config.hidden_size for clip in clips.values()]
        # The generators' states are needed only where dropout draws, and cannot be read in a capture.
        self._draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in self.modules())

    def with_lora(self) -> dict[str, torch.nn.Module]:
        """The CLIPs by the names of `CLIPS`, where they have a LoRA; else none."""
        return {name: clip for name, clip in self.clips.items() if hasattr(clip, "peft_config")}

    def lora_parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """Those of the LoRA."""
        return tuple(parameter for parameter in self.clips.parameters() if parameter.requires_grad)

    @property
    def frozen_bytes(self) -> int:
        """Of the weights that are not trained."""
        return sum(parameter.nbytes for parameter in self.parameters() if not parameter.requires_grad)

    def pieces(self) -> list[Piece]:
        """The layers' frozen matrices, in the order in which forward needs them."""
        return [
            piece
            for name, clip in self.clips.items()
            for piece in pieces_of(list(_layers(clip)), prefix=f"{name}.text_model.encoder.layers")
        ]

    def stream(self, device: torch.device) -> StreamedBlocks:
        """Moves all to the device but the layers' frozen matrices, which are streamed from pinned host memory.

        The results are those of resident ones, bit for bit. It must not be moved afterwards.

        Raises:
            UserError: the driver does not pin so much host memory.
        """
        pieces = self.pieces()
        streamed = StreamedBlocks(pieces, device, buffers=CLIP_BUFFERS)
        move_the_rest(self, pieces, device, streamed)
        return streamed

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` begins with, on the host.

        Args:
            tokens: `(R, 2, C)` int64, of each CLIP; negative in the identifier's place.

        Returns:
            `(R, C, d1 + d2)`, each CLIP's embeddings of tokens and places side by side, of places alone where the
            identifier stands; and `(R, 2)` int64, where the text ends for each.
        """
        states, places = [], []
        for place, (embeddings, clip) in enumerate(zip(self._embeddings, self.clips.values(), strict=True)):
            stands = tokens[:, place] < 0  # the identifier
            ids = tokens[:, place].clamp(min=0)
            of_tokens = embeddings.token_embedding(ids).masked_fill(stands[..., None], 0)
            states.append(embeddings(inputs_embeds=of_tokens))
            # Its id; or in configurations from before that was noted there, the largest id.
            text: Any = clip.text_model
            end = text.eos_token_id
            places.append((ids if end == 2 else (ids == end)).int().argmax(dim=-1))
        return torch.cat(states, dim=-1), torch.stack(places, dim=1)

    @staticmethod
    def places(tokens: torch.Tensor) -> torch.Tensor:
        """Which of the identifier's vectors stands where, `(R, 2, C)` int64; -1 for none."""
        return torch.where(tokens < 0, -1 - tokens, -1)

    def forward(
        self,
        prompt_embeds: torch.Tensor,
        states: torch.Tensor,
        ends: torch.Tensor,
        kept: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts' embeddings, as `StableDiffusion3Pipeline.encode_prompt` arranges them.

        Args:
            prompt_embeds: `(R, S, D)`, of which T5's part is taken.
            states: `(R, C, d1 + d2)`, as `embed` gives them.
            ends: `(R, 2)` int64, likewise.
            kept: `(R, 2)`, 0 where a CLIP's part of a prompt is dropped, else 1.
            places: `(R, 2, C)`, of the method of that name, where the identifier's embedding is trained.

        Returns:
            `(R, S, D)` and `(R, P)` in the dtype of `prompt_embeds`.
        """
        hidden, pooled = [], []
        parts = states.split(self._widths, dim=-1)
        for place, ((name, clip), part) in enumerate(zip(self.clips.items(), parts, strict=True)):
            if self.identifier is not None and places is not None:
                part = part + self.identifier.at(name, places[:, place]).to(part.dtype)
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


def _layers(clip: Any) -> torch.nn.ModuleList:
    layers: torch.nn.ModuleList = clip.text_model.encoder.layers
    return layers


def _run(layer: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """A layer of a CLIP. torch's plain attention: the exact backward pass of the fused ones knows no causal order."""
    with sdpa_kernel(SDPBackend.MATH):
        return layer(states, None, is_causal=True)
