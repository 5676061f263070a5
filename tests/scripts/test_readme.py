"""Every command of the README runs: on the tiny model, with small numbers in place of its large ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import PROJECT, save_pictures

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
SMALLER = {"1024": "64", "500": "3", "150": "3", SD3: "TINY"}


def blocks(language: str) -> list[str]:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def bash_lines() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines()]


def test_the_python_commands(script, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line)[1:] for line in bash_lines() if line.startswith("python ")]
    bare, sd3 = [c for c in commands if SD3 not in c], [c for c in commands if SD3 in c]
    assert [len(bare), len(sd3)] == [4, 5]
    said = ""
    for folder, group in (("miniature", bare), ("sd3", sd3)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        if folder == "sd3":
            save_pictures(Path("dog"), [(64, 64), (80, 64)])
        for name, *words in group:
            words = [str(tiny_sd3) if SMALLER.get(w) == "TINY" else SMALLER.get(w, w) for w in words]
            few = ["--num_steps", "1"] if name == "inference.py" else []
            result = script(name.removesuffix(".py"), *words, *few)
            assert result.code == 0, (name, result.err)
            said += result.out
    assert (tmp_path / "sd3" / "sd3-dreambooth-lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list((tmp_path / "sd3").glob("images/000_a-photo-of-sks-dog-in-a-bucket/img_00.png"))) == 1
    assert len(list((tmp_path / "miniature").glob("images/*/img_00.png"))) == 4
    assert said.count("no text encoder is loaded") == 2  # the README's own prompts were embedded by its first commands


def test_the_other_commands() -> None:
    others = [line for line in bash_lines() if not line.startswith("python ")]
    targets = re.findall(r"^(\w+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    for line in others:
        if line.startswith("make "):
            assert line.split()[1] in targets, line
        elif line.startswith("pip install"):
            named = re.findall(r"-[rc] (\S+)", line)
            assert named == ["requirements.txt", "constraints.txt"]
            assert all((PROJECT / name).is_file() for name in named)
        else:
            assert line == "hf auth login"
    assert len(others) == 5


def test_the_python_code(script, tiny_sd3: Path, prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import TRAINING_SCRIPT

    flags = [*prepared.flags, "--output_dir", tmp_path / "sd3-dreambooth-lora", "--max_train_steps", 1]
    assert script(TRAINING_SCRIPT, *flags).code == 0
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    lines = "\n".join(line.strip() for line in code.splitlines()).replace(SD3, str(tiny_sd3))
    names: dict[str, object] = {}
    exec(lines, names)
    assert names["pipeline"].get_active_adapters() == ["default_0"]


def test_links_lead_somewhere() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)h][^)]*)\)", text)
    assert len(links) >= 4
    assert [link for link in links if not (PROJECT / link).exists()] in ([], ["colab/sd3_dreambooth_lora_16gb.ipynb"])
