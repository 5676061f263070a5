"""What Windows and macOS do otherwise than Linux, as far as Linux can act it: docs/systems.md has the table."""

from __future__ import annotations

import ast
import os
import re
import signal
from pathlib import Path

import sd3_lora.common.memory

import pytest
import torch
from conftest import PROJECT, PROMPT, Prepared
from safetensors.torch import load_file, save_file
from training_runs import Script, train
from windows_files import forbid_files_in_use

# Of a name on Windows: these characters, a dot or space at the end, and devices with any ending.
FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def test_the_rule_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is open or mapped can be neither replaced nor deleted; after that it can."""
    forbid_files_in_use(monkeypatch)
    path, other = tmp_path / "a.safetensors", tmp_path / "b"
    save_file({"a": torch.ones(4096)}, path)
    other.write_bytes(b"b")
    tensors = load_file(path)
    for act in (path.unlink, lambda: os.replace(other, path), lambda: tmp_path.rename(tmp_path.parent / "moved")):
        with pytest.raises(PermissionError, match="in use"):
            act()
    del tensors
    with open(path), pytest.raises(PermissionError, match="in use"):
        path.unlink()
    os.replace(other, path)
    assert path.read_bytes() == b"b"


def test_no_file_in_use_is_replaced_or_deleted(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every script, and what each does the second time: go on, overwrite, resume, forget old checkpoints."""
    forbid_files_in_use(monkeypatch)
    monkeypatch.chdir(tmp_path)
    model = ["--pretrained_model_name_or_path", prepared.model]
    stage_one = Prepared(prepared.model, prepared.pictures, Path("e.parquet"), Path("latents"))
    text = [*model, "--instance_data_dir", prepared.pictures, "--instance_prompt", PROMPT, "--max_sequence_length", 20]
    text += ["--validation_prompt", "a dog"]
    pictures = [*model, "--instance_data_dir", prepared.pictures, "--output_path", "latents"]

    def run(name: str, *words: object) -> None:
        result = script(name, *words)
        assert result.code == 0, result.err

    for more in (["--prompt", "a cat"], [], ["--overwrite"]):
        run("compute_embeddings", *text, "--output_path", "e.parquet", *more)
    for more in ([], ["--random_flip"], ["--overwrite"]):
        run("precompute_latents", *pictures, *more)
    saves = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 1, "--use_ema", "--validation_steps", 2]
    saves += ["--validation_prompt", "a dog", "--validation_num_steps", 2, "--export", "kohya"]
    train(script, stage_one, Path("lora"), *saves)
    train(script, stage_one, Path("lora"), *saves, "--resume_from_checkpoint", "latest", "--max_train_steps", 4)
    drawn = [*model, "--lora", "lora", "--prompt", "a dog", "--num_steps", 2, "--outdir", "drawn"]
    run("inference", *drawn, "--data_df_path", "e.parquet")
    run("sd3_lora.merge", "lora", "--output_dir", "merged")
    run("sd3_lora.report", "lora")
    run("sd3_lora.losses", *stage_one.flags[:10], "--output_dir", "losses")
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name or path.name.endswith(".parts")]


def test_the_names_of_all_files_are_names_on_windows(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a prompt has what a name cannot have, is a device, or is longer than any name may be."""
    monkeypatch.chdir(tmp_path)
    prompts = ['a: "b" <c>|d?*', "nul", "con.", "a dog ...", "C:\\dog", "a " * 150]
    model = ["--pretrained_model_name_or_path", prepared.model, "--max_sequence_length", 20]
    words = [*model, "--num_steps", 1, "--guidance", 1, "--outdir", "drawn"]
    result = script("inference", *words, *(word for prompt in prompts for word in ("--prompt", prompt)))
    assert result.code == 0, result.err
    train(script, prepared, Path("lora"), "--max_train_steps", 1, "--checkpointing_steps", 1)
    paths = [path.relative_to(tmp_path) for path in tmp_path.rglob("*")]
    assert len([path for path in paths if path.name == "img_00.png"]) == len(prompts)
    assert not [path for path in paths if any(FORBIDDEN.search(part) for part in path.parts)]
    assert max(len(str(path)) for path in paths) < 120  # of 260, less the folder's


def test_training_without_what_only_linux_has(
    script: Script, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No SIGHUP, no list of cores, no hard links, no /proc and no control groups: the same LoRA."""
    with_all = train(script, prepared, tmp_path / "linux")
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    asked: list[str] = []

    def elsewhere(name: str) -> Path:
        asked.append(name)
        return tmp_path / "nowhere" / name.lstrip("/")

    monkeypatch.setattr(sd3_lora.common.memory, "Path", elsewhere)
    without = train(script, prepared, tmp_path / "windows")
    assert "/proc/self/status" in asked
    assert (without.folder / "pytorch_lora_weights.safetensors").read_bytes() == (
        with_all.folder / "pytorch_lora_weights.safetensors"
    ).read_bytes()


POSIX_ONLY = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty", "posix", "curses", "readline"}
PYTHON = [*PROJECT.glob("*.py"), *(PROJECT / "sd3_lora").rglob("*.py"), *(PROJECT / "examples").rglob("*.py")]


def test_no_module_that_only_linux_has_is_imported() -> None:
    """triton neither, but in the file that is imported where triton was found."""
    for path in PYTHON:
        names = {name.name.split(".")[0] for node in ast.walk(ast.parse(path.read_text("utf-8")))
                 for name in (node.names if isinstance(node, ast.Import) else ())}  # fmt: skip
        names |= {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.ImportFrom)
        }
        assert not names & POSIX_ONLY, path
        assert "triton" not in names or path.name == "triton_attention.py", path


def test_the_oldest_python_reads_every_file() -> None:
    """3.11's grammar, whichever Python runs this."""
    for path in [*PYTHON, *(PROJECT / "tests").rglob("*.py"), *(PROJECT / "benchmarks").rglob("*.py")]:
        ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 11))
