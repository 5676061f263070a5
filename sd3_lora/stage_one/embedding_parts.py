"""The finished chunks of a stage one that is running, each in a file beside the output.

A part is a safetensors file: `prompt_embeds` (N, S, D) and `pooled_prompt_embeds` (N, P), float16; the prompts and the
provenance are in its metadata. A part is written at the disk's speed. A row of the output takes some 10 ms, so the rows
of one chunk are written while the next chunk is encoded.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.checksums import Checksums, with_checksums
from sd3_lora.common.records import PromptEmbedding, Provenance

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_METADATA_KEY = "sd3_lora"
_POLL_S = 0.05


class CancelledError(Exception):
    """The reader was cancelled before the last row."""


class EmbeddingParts:
    """The parts in a folder beside the output; several processes may add to them.

    Args:
        output_path: the embeddings file that the parts will become.
        provenance: parts with another provenance are deleted, and damaged ones.
    """

    def __init__(self, output_path: Path, provenance: Provenance):
        self.folder = output_path.with_name(f"{output_path.name}.parts")
        self.provenance = provenance
        for path in self._paths():
            try:
                with _open(path) as (tensors, metadata):
                    Checksums(tensors).require_all(tensors)
                    made_with = Provenance.from_dict(metadata["provenance"])
                    is_whole = _is_whole(tensors, metadata["prompts"])
                usable = is_whole and made_with.difference(provenance, "max_sequence_length") is None
            except (SafetensorError, KeyError, TypeError, ValueError):
                usable = False
            if not usable:
                path.unlink(missing_ok=True)  # another process may have been faster

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.safetensors"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.safetensors"))

    def numbers(self) -> list[int]:
        """The numbers of the existing parts, in order."""
        return [int(path.stem.removeprefix("part-")) for path in self._paths()]

    def prompts(self) -> set[str]:
        """The prompts that are done."""
        done: set[str] = set()
        for path in self._paths():
            with _open(path) as (_, metadata):
                done.update(metadata["prompts"])
        return done

    def add(self, number: int, prompts: Sequence[str], prompt_embeds: torch.Tensor, pooled: torch.Tensor) -> None:
        """Stores one chunk under a number that no other part has.

        Args:
            number: parts are read in the order of their numbers.
            prompts: N.
            prompt_embeds: `(N, S, D)` float16.
            pooled: `(N, P)` float16.
        """
        self.folder.mkdir(exist_ok=True)
        metadata = {"provenance": self.provenance.to_dict(), "prompts": list(prompts)}
        tensors = {"prompt_embeds": prompt_embeds.contiguous(), "pooled_prompt_embeds": pooled.contiguous()}
        with replacing(self._path(number)) as unfinished:
            save_file(tensors, unfinished, with_checksums(tensors, {_METADATA_KEY: json.dumps(metadata)}))

    def read(self, numbers: Sequence[int], cancelled: threading.Event) -> Iterator[PromptEmbedding]:
        """Yields the rows of these parts, and waits for those that are still to be added.

        Args:
            numbers: of the parts, in the order of the rows.
            cancelled: set when no more parts will be added, or the rows are no longer needed.

        Raises:
            CancelledError: the event was set before the last row.
        """
        for number in numbers:
            while not self._path(number).exists():
                if cancelled.wait(_POLL_S):
                    raise CancelledError
            with _open(self._path(number)) as (tensors, metadata):
                embeds, pooled = tensors.get_slice("prompt_embeds"), tensors.get_slice("pooled_prompt_embeds")
                for row, prompt in enumerate(metadata["prompts"]):
                    if cancelled.is_set():
                        raise CancelledError
                    yield PromptEmbedding(prompt, (), (), embeds[row], pooled[row])

    def remove(self) -> None:
        """Deletes the parts, once the output is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_whole(tensors: Any, prompts: Any) -> bool:
    """Whether an open part has prompts, and a row for each."""
    rows = [(tensors.get_slice(name).get_shape() or [0])[0] for name in ("prompt_embeds", "pooled_prompt_embeds")]
    return isinstance(prompts, list) and all(isinstance(p, str) for p in prompts) and rows == [len(prompts)] * 2


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A part's tensors and its metadata."""
    with safe_open(path, "pt") as tensors:
        yield tensors, json.loads((tensors.metadata() or {})[_METADATA_KEY])
