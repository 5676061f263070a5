"""The finished chunks of a stage one under way, each in a file of its own beside the output.

A part is a safetensors file: `prompt_embeds` (N, S, D) and `pooled_prompt_embeds` (N, P), float16; the prompts and the
provenance are in its metadata. It is written as fast as the disk takes it. A row of the output takes some 10 ms, and
those of one chunk are written while the next is encoded.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd3_lora.common.records import PromptEmbedding, Provenance

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

_METADATA_KEY = "sd3_lora"
_LOOK_AGAIN_S = 0.05


class GivenUpError(Exception):
    """The rows that are asked for will not come, or are not wanted any more."""


class EmbeddingParts:
    """The parts in a folder beside the output; several processes may add to them.

    Args:
        output_path: the embeddings file that the parts will become.
        provenance: parts of any other are discarded.
    """

    def __init__(self, output_path: Path, provenance: Provenance):
        self.folder = output_path.with_name(f"{output_path.name}.parts")
        self.provenance = provenance
        for path in self._paths():
            try:
                with _open(path) as (_, metadata):
                    made_with = Provenance.from_dict(metadata["provenance"])
                usable = made_with.difference(provenance, "max_sequence_length") is None
            except (SafetensorError, KeyError, TypeError, ValueError):
                usable = False
            if not usable:
                path.unlink(missing_ok=True)  # another process may have been faster

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.safetensors"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.safetensors"))

    def numbers(self) -> list[int]:
        """Those of the parts that are there, in order."""
        return [int(path.stem.removeprefix("part-")) for path in self._paths()]

    def prompts(self) -> set[str]:
        """The prompts that are done."""
        done: set[str] = set()
        for path in self._paths():
            with _open(path) as (_, metadata):
                done.update(metadata["prompts"])
        return done

    def add(self, number: int, prompts: Sequence[str], prompt_embeds: torch.Tensor, pooled: torch.Tensor) -> None:
        """Stores one chunk under a number that no other has.

        Args:
            number: they are read in the order of the numbers.
            prompts: N.
            prompt_embeds: `(N, S, D)` float16.
            pooled: `(N, P)` float16.
        """
        self.folder.mkdir(exist_ok=True)
        metadata = {"provenance": self.provenance.to_dict(), "prompts": list(prompts)}
        tensors = {"prompt_embeds": prompt_embeds.contiguous(), "pooled_prompt_embeds": pooled.contiguous()}
        unfinished = self.folder / f".{number:06d}.{os.getpid()}.unfinished"
        try:
            save_file(tensors, unfinished, {_METADATA_KEY: json.dumps(metadata)})
            os.replace(unfinished, self._path(number))
        finally:
            unfinished.unlink(missing_ok=True)

    def read(self, numbers: Sequence[int], given_up: threading.Event) -> Iterator[PromptEmbedding]:
        """The rows of these parts, which may still have to be added: each is waited for.

        Args:
            numbers: of the parts, in the order of the rows.
            given_up: set when no more parts will be added, or nobody wants the rows any more.

        Raises:
            GivenUpError: it was set before the last row.
        """
        for number in numbers:
            while not self._path(number).exists():
                if given_up.wait(_LOOK_AGAIN_S):
                    raise GivenUpError
            with _open(self._path(number)) as (tensors, metadata):
                embeds, pooled = tensors.get_slice("prompt_embeds"), tensors.get_slice("pooled_prompt_embeds")
                for row, prompt in enumerate(metadata["prompts"]):
                    if given_up.is_set():
                        raise GivenUpError
                    yield PromptEmbedding(prompt, (), (), embeds[row], pooled[row])

    def remove(self) -> None:
        """Deletes the parts, once the output is written."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A part's tensors and its metadata."""
    with safe_open(path, "pt") as tensors:
        yield tensors, json.loads((tensors.metadata() or {})[_METADATA_KEY])
