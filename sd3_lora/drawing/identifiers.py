"""Which identifiers' embeddings pictures are drawn with: those that are named, and those of the LoRAs' training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import UserError
from sd3_lora.common.identifier_embedding import (
    EMBEDDING_FILE,
    IdentifierEmbedding,
    counts_of,
    read_identifier_embedding,
    stands_in,
)
from sd3_lora.common.model_files import ModelFiles
from sd3_lora.transformer.lora_files import LoraFile, identifier_beside
from sd3_lora.transformer.lora_keys import CLIPS

_OR_ELSE = ", or type --identifier_embedding FILE"


@dataclass(frozen=True)
class Identifiers:
    """All of a run.

    Attributes:
        asked: by --identifier_embedding.
        of_loras: of each LoRA, the one beside it that it was trained with; None where it was trained with none, or
            with the word of one that is asked for.
    """

    asked: tuple[IdentifierEmbedding, ...] = ()
    of_loras: tuple[IdentifierEmbedding | None, ...] = ()

    @property
    def all(self) -> tuple[IdentifierEmbedding, ...]:
        """Each once."""
        return (*self.asked, *(identifier for identifier in self.of_loras if identifier))

    def used(self, scales: Sequence[float] | None) -> tuple[IdentifierEmbedding, ...]:
        """Those that are drawn with where the LoRAs have these strengths: none for the base, or a strength of zero."""
        if scales is None:
            return ()
        pairs = zip(self.of_loras, scales, strict=True)
        return (*self.asked, *(identifier for identifier, scale in pairs if identifier and scale))

    def require_in(self, prompts: Sequence[str]) -> None:
        """Checks that each one that was asked for has an effect.

        Raises:
            UserError: no prompt has its word.
        """
        for identifier in self.asked:
            if not any(stands_in(identifier.word, prompt) for prompt in prompts):
                raise UserError(
                    f"--identifier_embedding is of {identifier.word!r}, which stands in no prompt: put it into --prompt"
                )


def find_identifiers(names: Sequence[str], loras: Sequence[LoraFile], files: ModelFiles) -> Identifiers:
    """Those that are named, and those beside LoRAs.

    Args:
        names: files, or folders that hold one.
        loras: to draw with.
        files: the model.

    Raises:
        UserError: one is missing, is not that of its LoRA, or does not fit the model; or two are of one word.
    """
    if not names and all(lora.identifier is None for lora in loras):
        return Identifiers((), (None,) * len(loras))
    widths = {name: int(files.read_config(name)["hidden_size"]) for name in CLIPS}
    paths = (Path(name).expanduser() for name in names)
    asked = tuple(read_identifier_embedding(p / EMBEDDING_FILE if p.is_dir() else p, widths) for p in paths)
    words = {identifier.word for identifier in asked}
    of_loras = []
    for lora in loras:
        is_beside = lora.identifier is not None and lora.identifier not in words
        of_loras.append(identifier_beside(lora, widths, _OR_ELSE) if is_beside else None)
    found = Identifiers(asked, tuple(of_loras))
    counts_of(found.all)
    return found
