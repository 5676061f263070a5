"""Stage one shared out over two processes: every item once, and what one process would have written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compute_embeddings import PROMPTS_PER_CHUNK, chunk_size
from sd3_lora.common.command_line import UserError
from sd3_lora.common.processes import Processes, open_processes
from sd3_lora.stage_one.embedding_store import EmbeddingStore

import pytest
import torch
from conftest import PROJECT, PROMPT, Result, save_pictures, torchrun
from safetensors.torch import load


def test_embeddings_of_two_processes_are_those_of_one(
    script: Callable[..., Result], tiny_sd3: Path, tmp_path: Path
) -> None:
    save_pictures(tmp_path / "pictures", [(64, 64), (64, 64)])
    (tmp_path / "prompts.txt").write_text("\n".join(f"sks robot {index}" for index in range(70)))
    words = ["--instance_prompt", PROMPT, "--max_sequence_length", 20, "--prompts_file", tmp_path / "prompts.txt"]
    words += ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", tmp_path / "pictures"]
    two = torchrun("compute_embeddings.py", *words, "--device", "cpu", "--output_path", tmp_path / "two.parquet")
    assert two.code == 0, two.err
    assert script("compute_embeddings", *words, "--device", "cpu", "--output_path", tmp_path / "one.parquet").code == 0
    with EmbeddingStore(tmp_path / "one.parquet") as one, EmbeddingStore(tmp_path / "two.parquet") as other:
        assert len(one) == 72
        assert other.prompts == one.prompts
        assert other.provenance == one.provenance
        for mine, theirs in zip(one.read_all(), other.read_all(), strict=True):
            assert (mine.roles, mine.image_ids) == (theirs.roles, theirs.image_ids)
            assert torch.equal(mine.prompt_embeds, theirs.prompt_embeds)
            assert torch.equal(mine.pooled_prompt_embeds, theirs.pooled_prompt_embeds)
    assert two.out.count("72 prompts, 0 of them done before") == 1
    assert two.out.count("encode with CLIP-L") == 1  # of 64 prompts; the other one has the rest
    assert two.out.count("wrote ") == 1
    assert {path.name for path in tmp_path.glob("two*")} == {"two.parquet", "two.json"}


def test_latents_of_two_processes_are_those_of_one(
    script: Callable[..., Result], tiny_sd3: Path, tmp_path: Path
) -> None:
    paths = save_pictures(
        tmp_path / "pictures", [(96, 64), (64, 64), (64, 90), (70, 64), (64, 100), (64, 64), (64, 64)]
    )
    for path in paths[-2:]:  # one in the share of each
        path.write_bytes(b"no picture at all" + path.name.encode())
    words = ["--skip_broken", "--vae_batch_size", 1]
    words += ["--pretrained_model_name_or_path", tiny_sd3, "--instance_data_dir", tmp_path / "pictures"]
    two = torchrun("precompute_latents.py", *words, "--device", "cpu", "--output_path", tmp_path / "two")
    assert two.code == 0, two.err
    assert script("precompute_latents", *words, "--device", "cpu", "--output_path", tmp_path / "one").code == 0
    one, other = ({path.name: path for path in (tmp_path / name).glob("*.safetensors")} for name in ("one", "two"))
    assert one.keys() == other.keys()
    assert len(one) == 5
    for name in one:
        mine, theirs = load(one[name].read_bytes()), load(other[name].read_bytes())
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert two.out.count("wrote 13 crops of 5 pictures") == 1
    assert two.out.count("7 pictures in") == 1
    assert two.out.count("skipped: ") == 2  # also that of the process which does not speak
    assert not list((tmp_path / "two").glob(".*"))


FAILING = """
import sys
sys.path.insert(0, sys.argv[1])
from sd3_lora.common.command_line import UserError, exit_code
from sd3_lora.common.processes import in_processes

def run(argv, processes):
    print("begun")
    if processes.rank == 1 or argv == ["both"]:
        raise UserError("it cannot be") if argv != ["crash"] else ValueError("a mistake of ours")
    processes.gather(None)
    print("done")

sys.exit(exit_code(in_processes(run), sys.argv[2:]))
"""


@pytest.mark.parametrize("how", ["second", "both", "crash"])
def test_an_error_ends_both_and_is_said_once(tmp_path: Path, how: str) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    result = torchrun(tmp_path / "failing.py", PROJECT, how)
    assert result.code != 0
    assert result.out == "begun\n"
    if how == "crash":
        assert result.err.count("ValueError: a mistake of ours\n") == 1
        assert "error: " not in result.err
    else:
        assert [line for line in result.err.splitlines() if line.startswith("error: ")] == ["error: it cannot be"]


def test_shares_have_every_item_once() -> None:
    shares = [Processes(index, 3).share(range(10)) for index in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(10))
    assert max(map(len, shares)) - min(map(len, shares)) == 1


def test_chunks_are_whole_batches_for_every_process() -> None:
    assert chunk_size(1000, 1) == PROMPTS_PER_CHUNK == 512
    assert chunk_size(5, 1) == chunk_size(0, 1) == 32
    assert chunk_size(1000, 4) == 256
    assert chunk_size(100, 2) == 64


def test_without_torchrun_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with open_processes() as processes:
        assert processes == Processes(0, 1)
        assert processes.gather("mine") == ["mine"]
        assert processes.from_rank_0(lambda: "its") == "its"
        assert processes.cpu_cores >= 1


def test_the_cores_of_a_machine_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sd3_lora.common.processes.cpu_cores", lambda: 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of two machines
    assert Processes(5, 8).cpu_cores == 4


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Processes(3, 4).choose_device("auto") == torch.device("cuda", 1)
    assert Processes(3, 4).choose_device("cpu") == torch.device("cpu")
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="there are 2 GPUs here, one for each process: type --nproc-per-node 2"):
        Processes(2, 4).choose_device("auto")
