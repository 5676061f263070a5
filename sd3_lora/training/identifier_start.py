"""What the identifier's embedding begins as: the embeddings of the tokens of a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd3_lora.common.command_line import UserError, shown
from sd3_lora.common.identifier_embedding import KEYS, stands_in
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.training.identifier_flags import IdentifierFlags
from sd3_lora.transformer.identifier_vectors import IdentifierVectors, vectors_from

import torch


@dataclass(frozen=True)
class IdentifierStart:
    """The identifier, and how its vectors begin.

    Attributes:
        word: the identifier.
        tokens: the ids of the word that its vectors begin as, for each CLIP by its name.
        count: how many vectors there are.
    """

    word: str
    tokens: Mapping[str, Sequence[int]]
    count: int

    @classmethod
    def of(cls, flags: IdentifierFlags, files: ModelFiles) -> IdentifierStart | None:
        """As the flags say; None where no embedding is trained.

        Raises:
            UserError: the tokenizers make nothing of the word.
        """
        if flags.word is None:
            return None
        from sd3_lora.stage_one.text_encoders import clip_tokenizers  # imports all of transformers' encoders

        begins_as = flags.initializer_word or flags.word
        ids = [tokenizer(begins_as, add_special_tokens=False).input_ids for tokenizer in clip_tokenizers(files)]
        if not all(ids):
            raise UserError(f"the CLIPs' tokenizers make no token of {begins_as!r}: type another word")
        tokens = dict(zip(KEYS, ids, strict=True))
        return cls(flags.word, tokens, flags.num_vectors or max(map(len, ids)))

    def require_in(self, prompts: Sequence[str]) -> None:
        """Checks that the identifier stands in a caption.

        Raises:
            UserError: it stands in none.
        """
        if not any(stands_in(self.word, prompt) for prompt in prompts):
            raise UserError(
                f"--train_identifier_embedding {self.word}: no prompt of the subject's pictures has that word "
                f"({shown([repr(prompt) for prompt in dict.fromkeys(prompts)])}): type the identifier that they have"
            )

    def vectors_of(self, clips: Mapping[str, Any]) -> IdentifierVectors:
        """The vectors to train, of CLIPs whose embeddings are still theirs."""
        starts, spreads = {}, {}
        for name, clip in clips.items():
            embeddings = clip.text_model.embeddings.token_embedding.weight.detach().float()
            starts[name] = vectors_from(embeddings[torch.tensor(self.tokens[name])], self.count)
            spreads[name] = float(embeddings.std())
        return IdentifierVectors(starts, spreads)
