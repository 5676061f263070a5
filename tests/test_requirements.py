"""The libraries' versions: what each of the files says, and that they agree."""

from __future__ import annotations

import re
import subprocess

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
