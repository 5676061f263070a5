"""The benchmark of imports: what runs in a round, how it is timed, and its table."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import imports
import pytest
from tables import imports_table


def test_both_builds_run_every_script_one_after_the_other(tmp_path: Path) -> None:
    found = imports.cases({"before": tmp_path / "old", "now": PROJECT}, tmp_path / "jobs")
    assert [case.build for case in found] == [
        "",
        "",
        "",
        *["before", "now"] * (len(imports.SCRIPTS) + len(imports.JOB)),
    ]
    assert all((PROJECT / script).is_file() for script in imports.SCRIPTS)
    jobs = [case for case in found if case.name.startswith("job: ")]
    assert {case.folder for case in jobs} == {tmp_path / "jobs" / "before", tmp_path / "jobs" / "now"}


def test_a_process_that_works_takes_cpu_seconds_and_one_that_fails_is_told(tmp_path: Path) -> None:
    busy = "import time\nwhile time.process_time() < 0.2: pass"
    elapsed, cpu = imports.run(imports.Case("busy", ("-c", busy), "", tmp_path))
    assert 0.2 <= cpu <= elapsed + 1
    with pytest.raises(RuntimeError, match=r"broken \(now\): no luck"):
        imports.run(imports.Case("broken", ("-c", "raise SystemExit('no luck')"), "now", tmp_path))


def test_a_script_ends_where_its_work_would_begin() -> None:
    code = imports.until_work("inference.py", ["--prompt", "a robot"])
    assert imports.run(imports.Case("inference.py", ("-c", code), "now", PROJECT))[1] > 0


def test_the_table_has_a_column_for_each_build() -> None:
    rows = [
        {"name": "libraries", "build": "", "cpu_s": 2.0, "of_typed": 1.0},
        {"name": "a.py", "build": "before", "cpu_s": 3.0, "of_typed": 1.5},
        {"name": "a.py", "build": "now", "cpu_s": 1.0, "of_typed": 0.5},
    ]
    versions = dict.fromkeys(("torch", "diffusers", "transformers", "peft"), "1")
    facts = {"date": "", "machine": "", "python": "", "rounds": 1, "training_steps": "3", "drawing_steps": "4"}
    lines = imports_table({**facts, "versions": versions, "rows": rows}).splitlines()
    assert lines[0] == "| CPU seconds | before | now | of the first row's |"
    assert lines[2:4] == ["| libraries |  | 2.00 | 1.00 |", "| a.py | 3.00 | 1.00 | 0.50 |"]
