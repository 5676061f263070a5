"""Every command of the README runs: on the tiny model, with small numbers in place of its large ones."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from sd3_lora.common.devices import cuda_install
from sd3_lora.common.placement_flags import BaseFlags, StepFlags

import pytest
from conftest import PROJECT, save_pictures
from packaging.specifiers import SpecifierSet

SD3 = "stabilityai/stable-diffusion-3-medium-diffusers"
ROBOT = str(PROJECT / "examples" / "robot")
SMALLER = {"1024": "64", "500": "3", "150": "3", "200": "2", SD3: "TINY", "examples/robot": ROBOT}
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in sorted((PROJECT / "docs").glob("*.md")))]
LONGEST_COMMAND_LINE = 100
PACKAGE = PROJECT / "sd3_lora"
STAGES = ["compute_embeddings.py", "precompute_latents.py", "train_dreambooth_sd3_lora_miniature.py", "inference.py"]


def blocks(language: str, document: str = "README.md") -> list[str]:
    text = (PROJECT / document).read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def bash_lines() -> list[str]:
    """The commands, each on one line."""
    joined = [re.sub(r" *\\\n *", " ", block) for block in blocks("bash")]
    return [line.strip() for block in joined for line in block.splitlines()]


def test_the_python_commands(script, tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line)[1:] for line in bash_lines() if line.startswith("python ")]
    assert commands.pop(0)[:1] == ["examples/demo.py"]  # which test_demo.py runs
    bare, sd3 = [c for c in commands if SD3 not in c], [c for c in commands if SD3 in c]
    assert [len(bare), len(sd3)] == [4, 10]
    said = ""
    save_pictures(Path("dog"), [(64, 64), (80, 64)])
    for name, *words in [*bare, *sd3]:  # in one folder, as a newcomer types them
        words = [str(tiny_sd3) if SMALLER.get(w) == "TINY" else SMALLER.get(w, w) for w in words]
        few = ["--num_steps", "1"] if name == "inference.py" else []
        result = script(name.removesuffix(".py"), *words, *few)
        assert result.code == 0, (name, result.err)
        said += result.out
    outputs = tmp_path / "outputs" / "dog"
    assert (outputs / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert len(list(outputs.glob("pictures/000_a-photo-of-sks-dog-in-a-bucket/img_00.png"))) == 1
    assert len(list((tmp_path / "outputs" / "dog-pictures").glob("*/img_00.png"))) == 1
    assert (outputs / "lora-with-prior" / "pytorch_lora_weights.safetensors").is_file()
    assert [path.name for path in sorted((outputs / "watched" / "samples").iterdir())] == [
        "sheet.webp",
        "step_000000",
        "step_000003",
    ]
    assert [path.name for path in sorted(Path("dogs").glob("*.png"))] == ["class_0000.png", "class_0001.png"]
    assert len(list((tmp_path / "outputs" / "miniature").glob("pictures/*/img_00.png"))) == 4
    assert said.count("no text encoder is loaded") == 3  # the README's own prompts were embedded by its first commands


def test_the_other_commands() -> None:
    others = [line for line in bash_lines() if not line.startswith("python ")]
    targets = re.findall(r"^(\w+):", (PROJECT / "Makefile").read_text(), re.MULTILINE)
    for line in others:
        if line.startswith("make "):
            assert line.split()[1] in targets, line
        elif line.startswith("pip install torch"):
            assert_right_torch(line)
        elif line.startswith("pip install"):
            named = re.findall(r"-[rc] (\S+)", line)
            assert named == ["requirements.txt", "constraints.txt"]
            assert all((PROJECT / name).is_file() for name in named)
        else:
            assert line in ("python3 -m venv .venv", "source .venv/bin/activate", "hf auth login")
    assert len(others) == 15
    assert others[:3] == ["make demo", "python3 -m venv .venv", "source .venv/bin/activate"]


def assert_right_torch(line: str) -> None:
    """The tests' version, of the build that its index has, which constraints.txt lets stay."""
    (pinned,) = re.findall(r"^torch==(\S+)", (PROJECT / "constraints.txt").read_text(), re.MULTILINE)
    ((version, build, index),) = re.findall(r"^pip install torch==(\S+)\+(\w+) --index-url \S+/whl/(\w+)$", line)
    assert (version, build) == (pinned, index)
    assert SpecifierSet(f"=={pinned}").contains(f"{version}+{build}")


def test_the_commands_for_windows_are_the_same_on_one_line() -> None:
    """In cmd and in PowerShell: without `\\` at the end of a line, and without single quotes."""
    install, photos = blocks("bat")
    commands = [line for line in bash_lines() if SD3 in line and "--plan" not in line]
    assert photos.splitlines() == commands[:6]
    assert [line.split()[1] for line in commands[:6]] == [*STAGES[2:], *STAGES]
    assert "'" not in install + photos
    make_environment, activate, torch, libraries = install.splitlines()
    assert (make_environment, activate) == ("py -m venv .venv", r".venv\Scripts\activate")
    assert_right_torch(torch)
    assert torch == cuda_install(torch.split("==")[1].split("+")[0])
    assert libraries in bash_lines()


def test_the_miniature_s_figures_are_those_of_its_results() -> None:
    result = json.loads((PROJECT / "benchmarks" / "results" / "dreambooth-miniature-h100.json").read_text())
    subject = {name: f"{100 * means['subject']:.0f} %" for name, means in result["means"].items()}
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    assert f"shows the subject in {subject['diffusers_defaults']} of pictures" in text
    assert f"it is {subject['diffusers']}, and {subject['ours']} with ours" in text


def result_of(name: str) -> dict[str, Any]:
    return json.loads((PROJECT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_the_times_are_those_of_their_results() -> None:
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    step = {(row["name"], row["resolution"]): row["ms"] for row in result_of("step-h200")["rows"]}
    first = {size: step["diffusers' sd3_lora_colab", size] for size in (1024, 512)}
    for name, at_1024, at_512 in (("replayed", 5, 12), ("compiled and replayed", 7, 17)):
        assert [round(first[size] / step[f"ours, {name}", size]) for size in (1024, 512)] == [at_1024, at_512]
    assert "takes a fifth of the time of the script that this project follows, and a twelfth at 512 px" in text
    assert "compiled, a seventh and a seventeenth" in text
    job = {row["name"]: row["job_s"] for row in result_of("stages-job-h100")["rows"] if "job_s" in row}
    ours, reference = (round(job[f"{who}: photos to LoRA"]) for who in ("ours", "the reference"))
    assert f"the three scripts took {ours} s on an H100. The reference's two take {reference}" in text
    assert f"five photos, 500 steps of four at 1024 px: {ours} s on an H100" in text
    one, two = (row["images_per_s"] for row in result_of("step-gpus-h200")["rows"][:2])
    assert f"{two / one:.2f} times as many pictures a second" in text


def test_what_is_said_of_prior_terms_is_as_measured() -> None:
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    step = {row["name"]: row["ms"] for row in result_of("prior-h200")["rows"]}
    assert f"at {step['`prediction`'] / step['no prior term']:.1f} times the time of a step" in text
    means = {method["name"]: method["means"] for method in result_of("methods-miniature-h200")["methods"]}
    best, plain = max(means.values(), key=lambda scores: scores["subject"] + scores["drift"]), means["baseline"]
    assert f"shows the subject in {best['subject']:.0f} % of pictures and forgets {100 - best['drift']:.0f} %" in text
    assert f"without a prior term it is {plain['subject']:.0f} and {100 - plain['drift']:.0f}" in text
    assert f"of {len(result_of('methods-one-seed-miniature-h200')['methods'])} methods the best" in text


def test_commands_are_on_short_lines() -> None:
    lines = [line for document in DOCUMENTS for block in blocks("bash", document) for line in block.splitlines()]
    assert [line for line in lines if len(line) > LONGEST_COMMAND_LINE] == []


def test_no_command_recomputes_all_blocks_whatever_fits() -> None:
    """The plan recomputes as few as it must: --gradient_checkpointing is explained, and typed nowhere."""
    for document in DOCUMENTS:
        text = (PROJECT / document).read_text(encoding="utf-8")
        commands = [
            *blocks("bash", document),
            *re.findall(r"^(?: {4}|\t)(?:python|torchrun|accelerate) .*", text, re.MULTILINE),
        ]
        assert not any("--gradient_checkpointing" in command for command in commands), document


@pytest.mark.parametrize("group", [BaseFlags, StepFlags])
def test_every_trick_has_its_flag_in_the_documents(group: type) -> None:
    text = (PROJECT / "docs" / "memory.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"^## The flags.*?(?=^## )", text, re.DOTALL | re.MULTILINE)
    for flag in fields(group):
        assert f"`--{flag.name}" in found, flag.name


def test_the_architecture_names_every_file_and_no_other() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\*\*`(\w+)/`\*\*.*?\n\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    assert sorted(room for room, _ in rooms) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
    for room, table in rooms:
        named = {name for line in table.splitlines() for name in re.findall(r"`(\w+\.py)`", line.split("|")[1])}
        assert named == {path.name for path in (PACKAGE / room).glob("*.py")} - {"__init__.py"}, room


def test_the_python_code(script, tiny_sd3: Path, prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import TRAINING_SCRIPT

    flags = [*prepared.flags, "--output_dir", tmp_path / "outputs/dog/lora", "--max_train_steps", 1]
    assert script(TRAINING_SCRIPT, *flags).code == 0
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    lines = "\n".join(line.strip() for line in code.splitlines()).replace(SD3, str(tiny_sd3))
    names: dict[str, object] = {}
    exec(lines, names)
    assert names["pipeline"].get_active_adapters() == ["default_0"]


def rows_of(document: str) -> dict[str, str]:
    """The tables' rows of six trainers by their first cell, without the numbers of sources."""
    text = re.sub(r" \[\d\]", "", (PROJECT / document).read_text(encoding="utf-8"))
    return {
        line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ") and line.count(" | ") == 6
    }


def test_other_trainers_are_told_alike_in_both_documents() -> None:
    short, long = rows_of("README.md"), rows_of("docs/comparison.md")
    assert len(short) >= 10
    assert all(long.get(name) == line for name, line in short.items() if not name.startswith(("| |", "| ---"))), short
    read_on = r"ead from their code and documents on (\d{4}-\d\d-\d\d)"
    dates = [re.findall(read_on, (PROJECT / name).read_text()) for name in ("README.md", "docs/comparison.md")]
    assert dates[0] == dates[1]
    assert len(dates[0]) == 1


def test_the_readme_fits_in_as_many_lines_as_before() -> None:
    """Evidence belongs into docs/."""
    assert (PROJECT / "README.md").read_text(encoding="utf-8").count("\n") <= 500


@pytest.mark.parametrize("document", ["glossary.md", "comparison.md", "memory.md"])
def test_links_of_new_documents_lead_somewhere(document: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", (PROJECT / "docs" / document).read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = PROJECT / "docs" / (name or document)
        assert target.exists(), link
        titles = re.findall(r"^##+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, link


def test_links_lead_somewhere() -> None:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)h][^)]*)\)", text)
    assert len(links) >= 4
    for link in links:
        name, _, anchor = link.partition("#")
        assert (PROJECT / name).exists(), link
        titles = re.findall(r"^##+ (.*)", (PROJECT / (name or "README.md")).read_text(), re.MULTILINE) if anchor else []
        named = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
        assert not anchor or anchor in named, link
