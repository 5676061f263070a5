"""Tensors by name: shapes from headers, rows without the rest, and no name that means two tensors."""

from __future__ import annotations

import os
from pathlib import Path

from sd3_lora.common.checksums import with_checksums
from sd3_lora.common.command_line import UserError
from sd3_lora.common.tensor_files import TensorFiles, write_tensors

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two shards: one matrix, one vector in float16."""
    generator = torch.Generator().manual_seed(0)
    shards = [{"matrix": torch.randn(1000, 4, generator=generator)}, {"vector": torch.arange(3).half()}]
    found = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for path, shard in zip(found, shards, strict=True):
        save_file(shard, path)
    return found


def test_all_files_tensors_have_shapes_and_values(paths: list[Path]) -> None:
    with TensorFiles(paths) as weights:
        assert weights.shapes() == {"matrix": torch.Size([1000, 4]), "vector": torch.Size([3])}
        assert weights.tensor("matrix").std().item() == pytest.approx(1, abs=0.05)
        assert torch.equal(weights.tensor("vector"), torch.tensor([0.0, 1, 2], dtype=torch.float16))


def test_only_the_rows_asked_for_are_read(paths: list[Path]) -> None:
    ids = torch.tensor([[5, 3, 5], [900, 0, 3]])
    with TensorFiles(paths) as weights:
        matrix = weights.tensor("matrix")

        class Slice:
            rows: list[slice] = []  # noqa: RUF012

            def __getitem__(self, index: slice) -> torch.Tensor:
                self.rows.append(index)
                return matrix[index]

        class Handle:
            def get_slice(self, _: str) -> Slice:
                return Slice()

        assert torch.equal(weights.rows("matrix", ids), matrix[ids])
        weights._handles = {"matrix": Handle()}
        assert torch.equal(weights.rows("matrix", ids), matrix[ids])
    assert Slice.rows == [slice(i, i + 1) for i in (0, 3, 5, 900)]


@pytest.mark.parametrize("how", ["removed", "written to", "replaced"])
def test_files_that_are_not_those_that_were_opened_are_refused(paths: list[Path], how: str) -> None:
    with TensorFiles(paths) as weights:
        weights.require_unchanged()
        if how == "removed":
            paths[1].unlink()
        elif how == "written to":
            with paths[1].open("r+b") as file:
                file.truncate(9)
        else:
            save_file({"vector": torch.arange(3).half()}, paths[1].with_name("new"))
            os.utime(paths[1].with_name("new"), ns=(0, 1))
            paths[1].with_name("new").rename(paths[1])
        with pytest.raises(UserError, match=f"^{paths[1]} was removed or changed while it was read: put it back"):
            weights.require_unchanged()


def test_a_name_in_two_files_is_refused(paths: list[Path]) -> None:
    save_file({"other": torch.zeros(2), "vector": torch.ones(3)}, paths[0].with_name("whole.safetensors"))
    with pytest.raises(UserError) as caught:
        TensorFiles([*paths, paths[0].with_name("whole.safetensors")])
    assert str(caught.value) == (
        f"{paths[0].parent} holds vector twice, in model-00002-of-00002.safetensors and in whole.safetensors: "
        "delete the file that is not of this model, or check --variant"
    )


METADATA = {"sd3_lora": '{"trigger": "ein Hündchen \\"x\\""}', "format": "pt", "lora_adapter_metadata": "{}", "a": ""}


@pytest.mark.parametrize("metadata", [METADATA, {}], ids=["some", "none"])
def test_equal_files_have_equal_bytes(tmp_path: Path, metadata: dict[str, str]) -> None:
    """safetensors itself writes the metadata in another order in each process, and in each file."""
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.int64), "c": torch.randn(2).half()}
    for number in range(20):
        entries = list(metadata.items())[:: 1 if number % 2 else -1]
        write_tensors(tmp_path / str(number), tensors, dict(entries))
    contents = {(tmp_path / str(number)).read_bytes() for number in range(20)}
    assert len(contents) == 1
    with safe_open(tmp_path / "0", "pt") as handle:
        assert handle.metadata() == with_checksums(tensors, metadata)
        assert all(torch.equal(handle.get_tensor(name), tensor) for name, tensor in tensors.items())
    assert int.from_bytes(contents.pop()[:8], "little") % 8 == 0
