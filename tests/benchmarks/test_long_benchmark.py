"""The benchmark of long jobs: how growth is told, and a process watched."""

from __future__ import annotations

import sys
from pathlib import Path

from conftest import PROJECT

sys.path.insert(0, str(PROJECT / "benchmarks"))

import long

MIB = 1024**2


def test_growth_is_that_of_the_end_over_the_time_after_the_warm_up() -> None:
    flat = [(step, (50 if step < 20 else 100) * MIB) for step in range(101)]
    assert long.growth(flat, 100) == {"early_mib": 100.0, "late_mib": 100.0, "growth_percent": 0.0}
    leaking = [(step, (100 + step) * MIB) for step in range(101)]
    assert long.growth(leaking, 100) == {"early_mib": 125.0, "late_mib": 195.0, "growth_percent": 56.0}
    assert long.growth([], 100)["growth_percent"] == 0.0


def test_a_process_is_watched_to_its_end(tmp_path: Path) -> None:
    code = "import time; held = bytearray(64 * 2**20); print('held'); time.sleep(1.2); raise SystemExit(3)"
    watched = long.watch(["-c", code], tmp_path / "log.txt", lambda: 7)
    assert (watched.code, watched.out) == (3, "held\n")
    assert watched.peak > 64 * MIB
    assert {place for place, _ in watched.host} == {7}
