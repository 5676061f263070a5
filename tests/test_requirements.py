"""The libraries' versions: what each of the files says, and that they agree."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import PROJECT
from packaging.requirements import Requirement


def read(name: str) -> dict[str, Requirement]:
    lines = (PROJECT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line.partition(" #")[0]) for line in lines if line and line[0].isalpha()]
    return {each.name.lower(): each for each in found}


def test_the_versions_of_the_tests_are_in_the_ranges() -> None:
    ranges = read("requirements.txt")
    for name, pinned in read("constraints.txt").items():
        (version,) = (each.version for each in pinned.specifier)
        assert name not in ranges or ranges[name].specifier.contains(version), f"{pinned}, not {ranges[name]}"


def test_no_line_has_a_comment_behind_it() -> None:
    """The notebook gives each line to pip as a word."""
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if "#" in line.lstrip("#")]


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_the_ends_of_the_ranges(end: str) -> None:
    """`make test-oldest` takes the lower bound of each range; neither end takes another torch than the tests'."""
    command = ["make", "--no-print-directory", "-n", "-B", f".venv-{end}/installed"]
    lines = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout.splitlines()
    (torch,) = (line for line in lines if line.startswith("echo"))
    assert torch.startswith(f"echo '{read('constraints.txt')['torch']}' >")
    derived = [line.partition(" >> ")[0] for line in lines if line.startswith("sed")]
    assert len(derived) == (end == "oldest")
    for line in derived:
        made = subprocess.run(line, shell=True, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
        lowest = {
            name.lower(): each.version
            for name, requirement in read("requirements.txt").items()
            for each in requirement.specifier
            if each.operator == ">=" and name != "torch"
        }
        assert dict(re.split("==", line.lower()) for line in made.splitlines()) == lowest


LOCKS = ["requirements", "requirements-dev"]
UNHASHED = re.compile(r"torch|triton|cuda-.*|nvidia-.*")  # the Makefile says why


def locked(name: str) -> dict[str, set[str]]:
    """Each package's versions: a lock for all systems may have one for each of two Pythons."""
    versions: dict[str, set[str]] = {}
    for entry in re.split(r"\n(?=\S)", (PROJECT / f"{name}.lock").read_text(encoding="utf-8")):
        if not entry.startswith("#"):
            requirement = Requirement(re.split(r"\s*\\\n", entry)[0])
            assert re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry), f"{requirement.name} has no hash"
            versions.setdefault(requirement.name, set()).add(str(requirement.specifier).removeprefix("=="))
    return versions


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", LOCKS)
def test_the_lock_holds_every_library_at_the_version_of_the_tests(name: str) -> None:
    """Where this fails, type `make lock`."""
    versions = locked(name)
    asked = read("requirements.txt") | (read("requirements-dev.txt") if name == "requirements-dev" else {})
    for requirement in asked.values():
        if requirement.name != "torch":
            found = versions[normal(requirement.name)]
            assert all(requirement.specifier.contains(version) for version in found), requirement
    for requirement in read("constraints.txt").values():
        if requirement.name != "torch":
            assert versions[normal(requirement.name)] == {str(requirement.specifier).removeprefix("==")}
    assert not [package for package in versions if UNHASHED.fullmatch(package)]


def test_the_locks_agree() -> None:
    few, all_of_them = map(locked, LOCKS)
    assert {package: all_of_them[package] for package in few} == few


@pytest.mark.parametrize(
    ("system", "minor", "hashed"),
    [("Linux-x86_64", 11, True), ("Linux-x86_64", 14, False), ("Darwin-arm64", 12, False)],
)
def test_where_the_lock_does_not_hold_make_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, minor: int, hashed: bool
) -> None:
    kernel, machine = system.split("-")
    for name, script in (("uname", f'[ "$1" = -s ] && echo {kernel} || echo {machine}'), ("apython", f"echo {minor}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    command = ["make", "--no-print-directory", "-n", "-B", ".venv/installed", "PYTHON=apython"]
    made = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True).stdout
    assert ("--require-hashes -r requirements.lock" in made) is hashed
    assert ("no lock for this system or Python" in made) is not hashed
    assert "install -r requirements.txt -c constraints.txt" in made
