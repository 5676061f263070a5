"""Which room of the package may import which, and which of training's parts: pyproject.toml has the rules, and
import-linter holds them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import PROJECT

CONFIG = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["importlinter"]
ROOMS = ["common", "gpu", "stage_one", "transformer", "plan", "training", "drawing", "reporting", "projects"]
MAY_IMPORT = {
    "common": [],
    "gpu": ["common"],
    "stage_one": ["common", "gpu"],
    "transformer": ["common", "gpu"],
    "plan": ["transformer", "common", "gpu"],
    "training": ["stage_one", "transformer", "common", "gpu"],
    "drawing": ["stage_one", "transformer", "common", "gpu"],
    "reporting": ["plan", "training", "drawing", "stage_one", "transformer", "common", "gpu"],
    "projects": ["reporting", "plan", "training", "drawing", "stage_one", "transformer", "common", "gpu"],
}
COMMANDS = ["convert", "export", "losses", "merge", "report", "tricks", "verify"]  # python -m sd3_lora.NAME
FORBIDDEN = [(room, other) for room in ROOMS for other in ROOMS if other != room and other not in MAY_IMPORT[room]]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """What import-linter says of the package in a folder."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", folder / "pyproject.toml"]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its rule, to break one import at a time."""
    folder = tmp_path_factory.mktemp("rooms")
    shutil.copytree(PROJECT / "sd3_lora", folder / "sd3_lora", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", folder)
    return folder


def test_every_room_imports_what_it_may() -> None:
    result = lint(PROJECT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_there_are_no_other_rooms_and_no_exceptions() -> None:
    folders = [path.parent.name for path in (PROJECT / "sd3_lora").glob("*/__init__.py")]
    assert sorted(folders) == sorted(ROOMS)
    assert sorted(path.stem for path in (PROJECT / "sd3_lora").glob("*.py")) == sorted([*COMMANDS, "__init__"])
    assert not [name for contract in CONFIG["contracts"] for name in contract if "ignore" in name or "allow" in name]
    (scripts,) = (contract for contract in CONFIG["contracts"] if contract["id"] == "scripts")
    assert sorted(scripts["forbidden_modules"]) == sorted(path.stem for path in PROJECT.glob("*.py"))


def broken_by(copy: Path, room: str, line: str, file: str = "__init__.py") -> str:
    """The report on the package with one more import in a room, within a function: there too it counts."""
    module = copy / "sd3_lora" / room / file
    before = module.read_text()
    module.write_text(f"{before}\n\ndef use() -> None:\n    {line}\n")
    try:
        result = lint(copy)
    finally:
        module.write_text(before)
    return result.stdout if result.returncode else ""


@pytest.mark.parametrize(("room", "other"), FORBIDDEN, ids=[f"{room} imports {other}" for room, other in FORBIDDEN])
def test_a_forbidden_import_is_found(copy: Path, room: str, other: str) -> None:
    said = broken_by(copy, room, f"import sd3_lora.{other}")
    assert f"sd3_lora.{room} -> sd3_lora.{other}" in said


@pytest.mark.parametrize("script", [path.stem for path in PROJECT.glob("*.py")])
def test_no_room_imports_a_script(copy: Path, script: str) -> None:
    assert f"sd3_lora.training -> {script}" in broken_by(copy, "training", f"import {script}")


@pytest.mark.parametrize("command", COMMANDS)
def test_no_room_imports_a_command(copy: Path, command: str) -> None:
    assert f"sd3_lora.transformer -> sd3_lora.{command}" in broken_by(copy, "transformer", f"import sd3_lora.{command}")


@pytest.mark.parametrize(("room", "other"), [("plan", "transformer"), ("drawing", "gpu"), ("training", "stage_one")])
def test_an_import_that_is_allowed_is_not_refused(copy: Path, room: str, other: str) -> None:
    assert broken_by(copy, room, f"import sd3_lora.{other}") == ""


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("micro_batches", "training.state"),
        ("micro_batches", "training.artefacts"),
        ("micro_batches", "training.stage_one_request"),
        ("state", "training.config"),
        ("state", "training.run_flags"),
        ("loss_log", "gpu.copy_stream"),
    ],
)
def test_a_forbidden_import_of_trainings_parts_is_found(copy: Path, part: str, other: str) -> None:
    report = broken_by(copy, "training", f"import sd3_lora.{other}", f"{part}.py")
    assert f"sd3_lora.training.{part} -> sd3_lora.{other}" in report
