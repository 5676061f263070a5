"""What LoRAs change in the two CLIPs: merged into their weights before they encode; and identifiers' embeddings.

A CLIP is loaded, used and freed, so its weights can hold the LoRA: no layer is added, and a streamed CLIP has it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sd3_lora.common.identifier_embedding import IdentifierEmbedding
from sd3_lora.transformer.lora_files import LoraFile

import torch


@dataclass(frozen=True)
class ClipLoras:
    """LoRAs that change a CLIP, each with its strength, and identifiers' embeddings. It is false where there is none.

    Attributes:
        scaled: the LoRAs and their strengths, none of which is zero.
        identifiers: whose vectors the CLIPs read.
    """

    scaled: tuple[tuple[LoraFile, float], ...] = ()
    identifiers: tuple[IdentifierEmbedding, ...] = ()

    @classmethod
    def of(
        cls,
        loras: Sequence[LoraFile],
        scales: Sequence[float] | None,
        identifiers: tuple[IdentifierEmbedding, ...] = (),
    ) -> ClipLoras:
        """Those of a run's LoRAs.

        Args:
            loras: of the run.
            scales: one for each; None for the base alone.
            identifiers: that stand in the prompts.
        """
        if scales is None:
            return cls()
        pairs = zip(loras, scales, strict=True)
        return cls(tuple((lora, scale) for lora, scale in pairs if scale and lora.clips), identifiers)

    def __bool__(self) -> bool:
        return bool(self.scaled or self.identifiers)

    @property
    def key(self) -> tuple[tuple[str, float], ...]:
        """Which they are: equal for equal embeddings."""
        loras = tuple((str(lora.path), scale) for lora, scale in self.scaled)
        return loras + tuple((identifier.identity, 1.0) for identifier in self.identifiers)

    def merge_into(self, name: str, clip: torch.nn.Module) -> None:
        """Adds what the LoRAs have of a CLIP to its weights.

        Args:
            name: of the CLIP, one of `CLIPS`.
            clip: the encoder, with its weights.
        """
        for lora, scale in self.scaled:
            if name in lora.clips:
                lora.clips[name].merge_into(clip, scale)
