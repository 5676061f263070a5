"""The prior prompts, on which a term keeps what the base predicts: which pictures come once more with which prompt.

Shapes: B batch, E pictures that come once more, S text tokens, D joint attention width, P pooled width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from sd3_lora.common.records import PromptEmbedding
from sd3_lora.training.draws import GlobalDraws

import torch


class PriorPrompts:
    """Some prompts, and the share of the pictures that come once more with one of them.

    Args:
        embeddings: of the prompts, at least one.
        share: of the pictures, more than 0 and at most 1.
        clip_tokens: of each prompt `(2, C)`, where the CLIPs are trained.
    """

    def __init__(
        self, embeddings: Sequence[PromptEmbedding], share: Fraction, clip_tokens: Sequence[torch.Tensor] = ()
    ):
        self._share = share
        self._clip_tokens = torch.stack(list(clip_tokens)) if clip_tokens else None
        self._prompt_embeds = torch.stack([one.prompt_embeds for one in embeddings])
        self._pooled = torch.stack([one.pooled_prompt_embeds for one in embeddings])

    def rows(self, number: int, draws: GlobalDraws, count: int) -> torch.Tensor:
        """Which of this rank's pictures in a micro-batch come once more, evenly spread over the pictures of a run.

        Args:
            number: of the micro-batch in the run, from 0.
            draws: of the run.
            count: this rank's pictures.

        Returns:
            `(E,)` int64.
        """
        first = number * draws.global_batch_size + draws.rows(count).start
        turns = [math.floor(self._share * place) for place in range(first, first + count + 1)]
        return torch.tensor([row for row in range(count) if turns[row + 1] > turns[row]], dtype=torch.long)

    def draw(
        self, rows: torch.Tensor, draws: GlobalDraws, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """A prompt at random for each of these rows; nothing is drawn where there is one.

        Args:
            rows: as `rows` has them.
            draws: of the run.
            count: this rank's pictures.

        Returns:
            `(E, S, D)`, `(E, P)`, and `(E, 2, C)` where the CLIPs are trained.
        """
        prompts = torch.zeros(len(rows), dtype=torch.long)
        if len(self._pooled) > 1:
            prompts = (draws.uniform(count)[rows] * len(self._pooled)).long()
        tokens = None if self._clip_tokens is None else self._clip_tokens[prompts]
        return self._prompt_embeds[prompts], self._pooled[prompts], tokens
