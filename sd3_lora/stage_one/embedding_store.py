"""Prompt embeddings in parquet: one row, and one row group, for each distinct prompt.

Columns: prompt (string), roles and image_ids (lists of strings), prompt_embeds (fixed-size list of S·D float16),
pooled_prompt_embeds (fixed-size list of P float16), use_checksum and embeds_checksum (strings; files of earlier builds
have none). The shapes and the provenance are in the schema's metadata, and their checksum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.checksums import CHECKSUMS_KEY, DamagedError, checksum, tensor_checksum
from sd3_lora.common.command_line import UserError
from sd3_lora.common.records import PromptEmbedding, Provenance
from sd3_lora.gpu.read_ahead import read_ahead

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

CLASS_CAPTION = "class_caption"  # beside "class", which is the class prompt's alone
UNCAPTIONED = "uncaptioned"  # the role of the prompt of pictures without a caption; earlier builds did not write it
_METADATA_KEY, _CHECKSUM_KEY = b"sd3_lora", CHECKSUMS_KEY.encode()
_NUMBERS = ("prompt_embeds", "pooled_prompt_embeds")
_USE, _EMBEDS = "use_checksum", "embeds_checksum"


class EmbeddingStore:
    """An embeddings file opened for reading; a row is read when it is asked for, never the whole file.

    Args:
        path: the parquet file.

    Raises:
        UserError: no such file, truncated, damaged, or not written by `write_embeddings`.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the name of a file, such as {path / 'embeddings.parquet'}")
        if not path.is_file():
            raise UserError(f"{path} is not there: type `python compute_embeddings.py --output_path {path}` first")
        try:
            self._file = pq.ParquetFile(path)
            metadata = self._read_metadata()
            self.provenance = Provenance.from_dict(metadata["provenance"])
            self._shape = tuple(metadata["prompt_embeds_shape"])  # (S, D)
            index = self._read_index()
            if self._file.metadata.num_row_groups != len(index["prompt"]):
                raise KeyError("row groups")
            self._checksums = index.get(_EMBEDS)
            self._row = {prompt: row for row, prompt in enumerate(index["prompt"])}
            self._roles = dict(zip(index["prompt"], map(tuple, index["roles"]), strict=True))
            self._image_ids = dict(zip(index["prompt"], map(tuple, index["image_ids"]), strict=True))
            self._require_types()
        except (pa.ArrowException, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise self._not_whole(error) from error

    def _read_metadata(self) -> dict[str, Any]:
        metadata = self._file.schema_arrow.metadata or {}
        text = metadata[_METADATA_KEY]
        if metadata.get(_CHECKSUM_KEY, checksum(text).encode()) != checksum(text).encode():
            raise DamagedError("its metadata have another checksum than when they were written")
        return dict(json.loads(text))

    def _read_index(self) -> dict[str, list[Any]]:
        """All columns but the embeddings themselves; that of the checksums only where the file has it."""
        known = self._file.schema_arrow.names
        columns = ["prompt", "roles", "image_ids", *(name for name in (_USE, _EMBEDS) if name in known)]
        index: dict[str, list[Any]] = self._file.read(columns=columns).to_pydict()
        for row, noted in enumerate(index.get(_USE, ())):
            if noted != _checksum_of_use(*(index[name][row] for name in ("prompt", "roles", "image_ids"))):
                raise DamagedError(f"its row {row} has another checksum than when it was written")
        return index

    def _require_types(self) -> None:
        """A file that another program made may have our names and other values."""
        texts = [*self._row, *chain(*self._roles.values()), *chain(*self._image_ids.values())]
        lengths = [self._file.schema_arrow.field(name).type.list_size for name in _NUMBERS]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a prompt, role or picture is no text")
        if len(self._shape) != 2 or math.prod(self._shape) != lengths[0] or min(*self._shape, *lengths) < 1:
            raise ValueError("its shapes do not fit")

    def _not_whole(self, error: Exception) -> UserError:
        if isinstance(error, DamagedError):
            return UserError(f"{self.path} is damaged, {error}: delete it and run compute_embeddings.py again")
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
            UserError: the row does not decode, is not what was written, or its numbers are not finite.
        """
        row = self._row[prompt]
        try:
            table = self._file.read_row_group(row, columns=list(_NUMBERS))
            prompt_embeds = _tensor(table, "prompt_embeds").reshape(self._shape)
            pooled = _tensor(table, "pooled_prompt_embeds")
            if self._checksums and self._checksums[row] != _checksum_of_embeds(prompt, prompt_embeds, pooled):
                raise DamagedError(f"the embedding of {prompt!r} has another checksum than when it was written")
        except (pa.ArrowException, AttributeError, KeyError, RuntimeError, TypeError, ValueError, OSError) as error:
            raise self._not_whole(error) from error  # damaged, although the footer is intact
        # The largest is NaN where any number is; testing each number takes ten times as long.
        if not (torch.isfinite(prompt_embeds.abs().max()) and torch.isfinite(pooled.abs().max())):
            raise UserError(
                f"{self.path} holds a NaN or infinity for {prompt!r}: delete it and run compute_embeddings.py again"
            )
        return PromptEmbedding(prompt, self._roles[prompt], self._image_ids[prompt], prompt_embeds, pooled)

    def read_all(self, prompts: Iterable[str] | None = None) -> Iterator[PromptEmbedding]:
        """Yields rows; while one is used, a thread reads the next."""
        yield from read_ahead(self.read(prompt) for prompt in (self.prompts if prompts is None else prompts))


def _tensor(table: pa.Table, column: str) -> torch.Tensor:
    values = table.column(column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(values, dtype=np.float16))


def _checksum_of_use(prompt: str, roles: Sequence[str], image_ids: Sequence[str]) -> str:
    return checksum(json.dumps([prompt, list(roles), list(image_ids)]).encode())


def _checksum_of_embeds(prompt: str, prompt_embeds: torch.Tensor, pooled: torch.Tensor) -> str:
    return tensor_checksum(prompt, prompt_embeds) + tensor_checksum(prompt, pooled)


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
    text = json.dumps(metadata).encode()
    return pa.schema(
        [
            ("prompt", pa.string()),
            ("roles", pa.list_(pa.string())),
            ("image_ids", pa.list_(pa.string())),
            ("prompt_embeds", pa.list_(pa.float16(), shape[0] * shape[1])),
            ("pooled_prompt_embeds", pa.list_(pa.float16(), pooled_shape[0])),
            (_USE, pa.string()),
            (_EMBEDS, pa.string()),
        ],
        metadata={_METADATA_KEY: text, _CHECKSUM_KEY: checksum(text).encode()},
    )


def _row_table(embedding: PromptEmbedding, schema: pa.Schema) -> pa.Table:
    embeds, pooled = embedding.prompt_embeds.to(torch.float16), embedding.pooled_prompt_embeds.to(torch.float16)

    def fixed(tensor: torch.Tensor) -> pa.Array:
        values = tensor.flatten().numpy()
        return pa.FixedSizeListArray.from_arrays(pa.array(values, pa.float16()), len(values))

    columns = [
        pa.array([embedding.prompt]),
        pa.array([list(embedding.roles)], pa.list_(pa.string())),
        pa.array([list(embedding.image_ids)], pa.list_(pa.string())),
        fixed(embeds),
        fixed(pooled),
        pa.array([_checksum_of_use(embedding.prompt, embedding.roles, embedding.image_ids)]),
        pa.array([_checksum_of_embeds(embedding.prompt, embeds, pooled)]),
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
