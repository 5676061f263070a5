"""Prompt embeddings in parquet: one row, and one row group, for each distinct prompt.

Columns: prompt (string), roles and image_ids (lists of strings), prompt_embeds (fixed-size list of S·D float16),
pooled_prompt_embeds (fixed-size list of P float16). The shapes and the provenance are in the schema's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.command_line import UserError
from sd3_lora.common.records import PromptEmbedding, Provenance
from sd3_lora.gpu.read_ahead import read_ahead

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

UNCAPTIONED = "uncaptioned"  # the role of the prompt of pictures without a caption; earlier builds did not write it
_METADATA_KEY = b"sd3_lora"


class EmbeddingStore:
    """An embeddings file opened for reading; a row is read when it is asked for, never the whole file.

    Args:
        path: the parquet file.

    Raises:
        UserError: no such file, truncated, or not written by `write_embeddings`.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the name of a file, such as {path / 'embeddings.parquet'}")
        if not path.is_file():
            raise UserError(f"{path} is not there: type `python compute_embeddings.py --output_path {path}` first")
        try:
            self._file = pq.ParquetFile(path)
            metadata = json.loads((self._file.schema_arrow.metadata or {})[_METADATA_KEY])
            self.provenance = Provenance.from_dict(metadata["provenance"])
            self._shape = tuple(metadata["prompt_embeds_shape"])  # (S, D)
            index = self._file.read(columns=["prompt", "roles", "image_ids"]).to_pydict()
            if self._file.metadata.num_row_groups != len(index["prompt"]):
                raise KeyError("row groups")
        except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
            raise self._not_whole(error) from error
        self._row = {prompt: row for row, prompt in enumerate(index["prompt"])}
        self._roles = dict(zip(index["prompt"], map(tuple, index["roles"]), strict=True))
        self._image_ids = dict(zip(index["prompt"], map(tuple, index["image_ids"]), strict=True))

    def _not_whole(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path} is not a whole embeddings file of this project ({type(error).__name__}): delete it and run "
            "compute_embeddings.py again"
        )

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # Windows does not replace an open file

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._row

    def __len__(self) -> int:
        return len(self._row)

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts, in the file's order."""
        return tuple(self._row)

    @property
    def joint_width(self) -> int:
        """D, the width that the transformer must take."""
        return self._shape[1]

    @property
    def pooled_width(self) -> int:
        """P, the pooled width that the transformer must take."""
        return self._file.schema_arrow.field("pooled_prompt_embeds").type.list_size

    def prompts_with_role(self, role: str) -> tuple[str, ...]:
        """The prompts that stage one was given for `role`."""
        return tuple(prompt for prompt, roles in self._roles.items() if role in roles)

    @property
    def uncaptioned_prompt(self) -> str | None:
        """The prompt of pictures without a caption; None where stage one had none, or noted none and had captions."""
        known = self.prompts_with_role(UNCAPTIONED) or self.prompts_with_role("instance")
        return known[0] if len(known) == 1 else None

    @property
    def uncaptioned_prompts(self) -> tuple[str, ...]:
        """The prompts of pictures without a caption: one for each concept; empty where none is known."""
        one = self.uncaptioned_prompt
        return self.prompts_with_role(UNCAPTIONED) if one is None else (one,)

    def prompts_of_images(self) -> dict[str, tuple[str, ...]]:
        """The prompts that describe each image id, sorted."""
        prompts: dict[str, list[str]] = {}
        for prompt, ids in self._image_ids.items():
            for image_id in ids:
                prompts.setdefault(image_id, []).append(prompt)
        return {image_id: tuple(sorted(texts)) for image_id, texts in prompts.items()}

    def read(self, prompt: str) -> PromptEmbedding:
        """The row of `prompt`.

        Raises:
            KeyError: the file has no such prompt.
            UserError: the row does not decode, or its numbers are not finite.
        """
        row = self._row[prompt]
        try:
            table = self._file.read_row_group(row, columns=["prompt_embeds", "pooled_prompt_embeds"])
        except (pa.ArrowException, OSError) as error:  # damaged, although the footer is intact
            raise self._not_whole(error) from error

        def tensor(column: str) -> torch.Tensor:
            values = table.column(column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            return torch.from_numpy(np.array(values, dtype=np.float16))

        prompt_embeds, pooled = tensor("prompt_embeds").reshape(self._shape), tensor("pooled_prompt_embeds")
        # The largest is NaN where any number is; testing each number takes ten times as long.
        if not (torch.isfinite(prompt_embeds.abs().max()) and torch.isfinite(pooled.abs().max())):
            raise UserError(
                f"{self.path} holds a NaN or infinity for {prompt!r}: delete it and run compute_embeddings.py again"
            )
        return PromptEmbedding(prompt, self._roles[prompt], self._image_ids[prompt], prompt_embeds, pooled)

    def read_all(self, prompts: Iterable[str] | None = None) -> Iterator[PromptEmbedding]:
        """Yields rows; while one is used, a thread reads the next."""
        yield from read_ahead(self.read(prompt) for prompt in (self.prompts if prompts is None else prompts))


def find_embeddings(paths: Iterable[Path], image_ids: Iterable[str]) -> Path | None:
    """The first of these files that is an embeddings file with a prompt for each of the pictures; None without one."""
    ids = set(image_ids)
    for path in paths:
        try:
            with EmbeddingStore(path) as store:
                if ids <= store.prompts_of_images().keys():
                    return path
        except UserError:  # not there, or another program's
            continue
    return None


def write_embeddings(path: Path, provenance: Provenance, embeddings: Iterable[PromptEmbedding]) -> int:
    """Writes the rows to a temporary name and renames it; returns how many.

    Raises:
        ValueError: there is none, or their shapes differ.
    """
    rows = iter(embeddings)
    first = next(rows, None)
    if first is None:
        raise ValueError("no embeddings to write")
    shapes, count = (first.prompt_embeds.shape, first.pooled_prompt_embeds.shape), 0
    schema = _schema(*shapes, provenance)
    # Statistics over a row's 600,000 numbers would double the time of writing it.
    columns = {"compression": "zstd", "use_dictionary": ["prompt"], "write_statistics": ["prompt"]}
    with replacing(path) as unfinished, pq.ParquetWriter(unfinished, schema, **columns) as writer:
        for embedding in chain([first], rows):
            if (embedding.prompt_embeds.shape, embedding.pooled_prompt_embeds.shape) != shapes:
                raise ValueError(f"shapes differ at {embedding.prompt!r}")
            writer.write_table(_row_table(embedding, schema), row_group_size=1)
            count += 1
    return count


def _schema(shape: Sequence[int], pooled_shape: Sequence[int], provenance: Provenance) -> pa.Schema:
    metadata = {
        "provenance": provenance.to_dict(),
        "prompt_embeds_shape": list(shape),
        "pooled_prompt_embeds_shape": list(pooled_shape),
    }
    return pa.schema(
        [
            ("prompt", pa.string()),
            ("roles", pa.list_(pa.string())),
            ("image_ids", pa.list_(pa.string())),
            ("prompt_embeds", pa.list_(pa.float16(), shape[0] * shape[1])),
            ("pooled_prompt_embeds", pa.list_(pa.float16(), pooled_shape[0])),
        ],
        metadata={_METADATA_KEY: json.dumps(metadata)},
    )


def _row_table(embedding: PromptEmbedding, schema: pa.Schema) -> pa.Table:
    def fixed(tensor: torch.Tensor) -> pa.Array:
        values = tensor.to(torch.float16).flatten().numpy()
        return pa.FixedSizeListArray.from_arrays(pa.array(values, pa.float16()), len(values))

    columns = [
        pa.array([embedding.prompt]),
        pa.array([list(embedding.roles)], pa.list_(pa.string())),
        pa.array([list(embedding.image_ids)], pa.list_(pa.string())),
        fixed(embedding.prompt_embeds),
        fixed(embedding.pooled_prompt_embeds),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def with_uses(
    embeddings: Iterable[PromptEmbedding], roles: dict[str, tuple[str, ...]], image_ids: dict[str, tuple[str, ...]]
) -> Iterator[PromptEmbedding]:
    """The same rows with this run's roles and image ids; a prompt of earlier runs keeps its row, without any."""
    seen: set[str] = set()
    for embedding in embeddings:
        if embedding.prompt not in seen:
            seen.add(embedding.prompt)
            yield replace(
                embedding, roles=roles.get(embedding.prompt, ()), image_ids=image_ids.get(embedding.prompt, ())
            )
