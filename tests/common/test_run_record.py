"""What is written of a run: identity, facts and results, each once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from sd3_lora.common.run_record import RunFacts, RunIdentity, RunRecord, RunResults, flag_defaults
from sd3_lora.common.stage_report import StageReport

import pytest


@dataclass(frozen=True)
class Flags:
    """Three kinds."""

    steps: int
    names: list[str] = field(default_factory=list)
    on: bool = False


FACTS = RunFacts("some/model", None, {"torch": "2"}, "fp16", plan={"buffers": 6}, predicted_parts={"a": 2, "b": 3})


def test_a_run_is_saved_with_its_flags_and_stages(tmp_path: Path) -> None:
    results = RunResults("a", [StageReport("train", 1.5)], loss=0.5)
    RunRecord([Flags(3)], FACTS, RunIdentity({"--rank": 4})).save(tmp_path / "run.json", results)
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["flags"] == {"steps": 3, "names": [], "on": False}
    assert (saved["stages"][0]["name"], saved["stages"][0]["elapsed_s"], saved["wrote"]) == ("train", 1.5, "a")
    assert saved["identity"] == {"--rank": 4}
    assert (saved["plan"], saved["predicted_parts"]) == ({"buffers": 6}, {"a": 2, "b": 3})
    assert (saved["predicted_bytes"], saved["measured_bytes"], saved["loss"]) == (5, 0, 0.5)
    assert (saved["model"], saved["precision"], saved["processes"]) == ("some/model", "fp16", 1)


def test_what_a_script_does_not_have_is_not_written(tmp_path: Path) -> None:
    found = RunRecord([], FACTS).to_dict(RunResults("a", []))
    assert found.keys() & {"identity", "trigger", "seed", "ms_a_step", "skipped", "revision"} == set()
    assert found["stages"] == []


def test_defaults_of_flags() -> None:
    assert flag_defaults([Flags]) == {"--names": [], "--on": False}


@pytest.mark.parametrize(
    ("saved", "changed", "unknown"),
    [
        ({"--rank": 4, "--new": 1}, [], []),
        ({"--rank": 4}, [], []),
        ({"--rank": 4, "--new": 2}, [("--new", 2, 1)], []),
        ({"--new": 1}, [("--rank", None, 4)], []),
        ({"--rank": 4, "--newer": 0}, [], [("--newer", 0)]),
    ],
)
def test_an_identity_beside_an_earlier_one(saved: dict, changed: list, unknown: list) -> None:
    identity = RunIdentity({"--rank": 4, "--new": 1}, {"--new": 1})
    assert identity.changed(saved) == changed
    assert identity.unknown(saved) == unknown
