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
    """

    def __init__(self, embeddings: Sequence[PromptEmbedding], share: Fraction):
        self._share = share
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

    def draw(self, rows: torch.Tensor, draws: GlobalDraws, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt at random for each of these rows, `(E, S, D)` and `(E, P)`; nothing is drawn where there is one.

        Args:
            rows: as `rows` has them.
            draws: of the run.
            count: this rank's pictures.
        """
        prompts = torch.zeros(len(rows), dtype=torch.long)
        if len(self._pooled) > 1:
            prompts = (draws.uniform(count)[rows] * len(self._pooled)).long()
        return self._prompt_embeds[prompts], self._pooled[prompts]
