"""Which identifiers' embeddings are drawn with, at which strengths of the LoRAs."""

from __future__ import annotations

from sd3_lora.common.command_line import UserError
from sd3_lora.common.identifier_embedding import IdentifierEmbedding
from sd3_lora.drawing.identifiers import Identifiers

import pytest
import torch


def embedding(word: str) -> IdentifierEmbedding:
    return IdentifierEmbedding(word, {"text_encoder": torch.zeros(1, 2), "text_encoder_2": torch.zeros(1, 3)})


ASKED, FIRST = embedding("ohwx"), embedding("sks")
IDENTIFIERS = Identifiers((ASKED,), (FIRST, None))


def test_a_lora_of_strength_zero_takes_its_embedding_away() -> None:
    assert IDENTIFIERS.used((1.0, 1.0)) == (ASKED, FIRST)
    assert IDENTIFIERS.used((0.0, 1.0)) == (ASKED,)
    assert IDENTIFIERS.used(None) == ()
    assert IDENTIFIERS.all == (ASKED, FIRST)


def test_one_that_was_asked_for_must_stand_in_a_prompt() -> None:
    IDENTIFIERS.require_in(["a cat", "a photo of ohwx"])
    with pytest.raises(UserError, match="--identifier_embedding is of 'ohwx', which stands in no prompt"):
        IDENTIFIERS.require_in(["a photo of sks dog"])
