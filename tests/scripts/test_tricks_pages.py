"""The pages of docs/tricks: four parts each, linked names that are there, commands that run, committed results."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

from sd3_lora.transformer.lora import LORA_FILE

import pytest
import torch
from conftest import PROJECT
from safetensors.torch import load_file

sys.path.insert(0, str(PROJECT / "benchmarks"))

import memory
import tables

FOLDER = PROJECT / "docs" / "tricks"
PAGES = sorted(path.name for path in FOLDER.glob("*.md") if path.name != "README.md")
PARTS = ["What takes the memory", "The idea", "The code", "Off and on"]
LONGEST_LINE, WIDEST_DRAWING = 100, 100
SMALLER = {"512": "64", "256": "32", "3": "1"}


def text_of(page: str) -> str:
    return (FOLDER / page).read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page, without the interpreter."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    assert all(line.startswith("python ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def test_the_index_names_every_page_and_no_other() -> None:
    assert sorted(re.findall(r"^\| \[.*?\]\((.*?)\)", text_of("README.md"), re.MULTILINE)) == PAGES
    assert len(PAGES) == 13


@pytest.mark.parametrize("page", PAGES)
def test_each_page_has_the_four_parts(page: str) -> None:
    text = text_of(page)
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == PARTS
    (drawing,) = re.findall(r"^```text\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert drawing.count("\n") >= 2
    assert max(map(len, drawing.splitlines())) <= WIDEST_DRAWING
    assert text.count("<!-- end -->") >= 1
    assert "[All tricks](README.md)" in text


def names_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("page", PAGES)
def test_each_linked_name_is_in_its_file(page: str) -> None:
    linked = re.findall(r"\[`(\w+)`\]\(\.\./\.\./(\S+?\.py)\)", text_of(page))
    assert len(linked) >= 2
    for name, path in linked:
        assert name in names_in(PROJECT / path), (name, path)


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_each_other_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text_of(page)):
        name, _, anchor = link.partition("#")
        target = (FOLDER / name).resolve()
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^##+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_each_table_is_that_of_its_result(page: str) -> None:
    assert tables.filled(text_of(page)) == text_of(page)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "two-stages.md"])
def test_off_and_on_differ_in_the_trick_alone(page: str) -> None:
    off, on = commands(page)
    assert off[0] == on[0]
    (off_only,), (on_only,) = ([word for word in words if word.startswith("outputs/")] for words in (off, on))
    assert off_only.replace("-off", "-on") == on_only
    assert len(set(off) - set(on)) <= 3, (off, on)


def test_the_commands_run(script, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model, in one folder, as somebody would type them one after another."""
    monkeypatch.chdir(tmp_path)
    model = ["--pretrained_model_name_or_path", str(tiny_sd3), "--device", "cpu"]
    blocks = str(count_blocks(tiny_sd3))
    ran = 0
    for page in ["README.md", *PAGES]:
        for name, *words in commands(page):
            if name == "-m" or name.startswith("benchmarks/"):
                continue
            if page == "two-stages.md" and ran:
                continue  # those of the index
            small = [SMALLER.get(word, blocks if word in ("5", "6") else word) for word in words]
            result = script(name.removesuffix(".py"), *model, *small)
            assert result.code == 0, (page, name, small, result.err)
            ran += 1
    assert ran == 2 + 2 * (len(PAGES) - 1)
    off, on = (load_file(tmp_path / "outputs" / f"recompute-{way}" / LORA_FILE) for way in ("off", "on"))
    assert all(torch.equal(on[key], off[key]) for key in off)


def count_blocks(model: Path) -> int:
    return json.loads((model / "transformer" / "config.json").read_text())["num_layers"]


def test_the_other_commands_are_taken() -> None:
    others = [words for page in ["README.md", *PAGES] for words in commands(page) if not words[0].endswith(".py")]
    assert [words[:2] for words in others] == [["-m", "sd3_lora.tricks"]] * 3
    for words in others:
        importlib.import_module("sd3_lora.tricks").COMMAND_LINE.parse(words[2:])
    (benchmark,) = [words for page in PAGES for words in commands(page) if words[0].startswith("benchmarks/")]
    assert benchmark[:2] == ["benchmarks/memory.py", "ladder"]
    assert "ladder" in memory.SETS


def test_commands_are_on_short_lines() -> None:
    for page in [*PAGES, "README.md"]:
        blocks = re.findall(r"^```bash\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
        assert [line for block in blocks for line in block.splitlines() if len(line) > LONGEST_LINE] == [], page


def test_the_miniature_has_the_six_blocks_that_the_pages_speak_of() -> None:
    assert count_blocks(PROJECT / "miniature") == 6
