"""What the identifier's embedding begins as: the embeddings of the tokens of a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd3_lora.common.command_line import UserError, counted, quoted, shown
from sd3_lora.common.identifier_embedding import KEYS, IdentifierEmbedding, stands_in
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.training.identifier_flags import IdentifierFlags
from sd3_lora.transformer.identifier_vectors import IdentifierVectors, vectors_from
from sd3_lora.transformer.lora_files import LoraFile, identifier_beside

import torch


@dataclass(frozen=True)
class IdentifierStart:
    """The identifier, and how its vectors begin.

    Attributes:
        word: the identifier.
        tokens: the ids of the word that its vectors begin as, for each CLIP by its name.
        count: how many vectors there are.
        trained: the vectors of the LoRA to begin with, if that has any: what they begin as in place of the tokens.
    """

    word: str
    tokens: Mapping[str, Sequence[int]]
    count: int
    trained: IdentifierEmbedding | None = None

    @classmethod
    def of(cls, flags: IdentifierFlags, files: ModelFiles, lora: LoraFile | None = None) -> IdentifierStart | None:
        """As the flags say; None where no embedding is trained.

        Args:
            flags: of the run.
            files: the model.
            lora: to begin with.

        Raises:
            UserError: the tokenizers make nothing of the word; or the LoRA was trained with another embedding.
        """
        trained = _trained_with(lora, flags, files) if lora else None
        if flags.word is None:
            return None
        from sd3_lora.stage_one.text_encoders import clip_tokenizers  # imports all of transformers' encoders

        begins_as = flags.initializer_word or flags.word
        ids = [tokenizer(begins_as, add_special_tokens=False).input_ids for tokenizer in clip_tokenizers(files)]
        if not all(ids):
            raise UserError(f"the CLIPs' tokenizers make no token of {begins_as!r}: type another word")
        count = flags.num_vectors or max(map(len, ids))
        if trained and trained.count != count:  # the count of a run that is resumed comes from its flags
            raise UserError(
                f"--init_lora has {counted(trained.count, 'vector')} in place of {flags.word!r}, and this command "
                f"{count}: type --num_vectors {trained.count}"
            )
        return cls(flags.word, dict(zip(KEYS, ids, strict=True)), count, trained)

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
            pieces = embeddings[torch.tensor(self.tokens[name])]
            starts[name] = self.trained.vectors[name] if self.trained else vectors_from(pieces, self.count)
            spreads[name] = float(embeddings.std())
        return IdentifierVectors(starts, spreads)


def _trained_with(lora: LoraFile, flags: IdentifierFlags, files: ModelFiles) -> IdentifierEmbedding | None:
    """The embedding that a LoRA was trained with, if any."""
    word = lora.identifier
    if word is None:
        return None
    if flags.word != word:
        raise UserError(
            f"--init_lora {lora.path} was trained with an embedding of {word!r}, without which it is another LoRA: "
            f"type --train_identifier_embedding {quoted([word])}"
        )
    if flags.initializer_word is not None:
        raise UserError(f"--init_lora has vectors of {word!r} to begin as: leave out --initializer_word")
    return identifier_beside(lora, {name: int(files.read_config(name)["hidden_size"]) for name in KEYS})
