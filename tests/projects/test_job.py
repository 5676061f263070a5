"""Commands in a process of their own, and what their folder tells of them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from sd3_lora.projects.job import Job

import psutil
import pytest

WAIT_S = 30
SLEEPS = "import time; print('asleep', flush=True); time.sleep(60)"
# As training does: it ends in good order at Ctrl-C.
SAVES = """
import sys, time
try:
    print("asleep", flush=True); time.sleep(60)
except KeyboardInterrupt:
    print("saved"); sys.exit(130)
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a job is stopped otherwise there")


def until(said: str, job: Job) -> None:
    deadline = time.monotonic() + WAIT_S
    while said not in job.log():
        assert time.monotonic() < deadline, job.log()
        time.sleep(0.05)


@pytest.fixture
def job(tmp_path: Path):  # type: ignore[no-untyped-def]
    job = Job(tmp_path / "01")
    yield job
    job.stop()
    job.wait(WAIT_S)


def test_it_runs_in_order_and_says_what(job: Job) -> None:
    job.start("train", [["-c", "print('one')"], ["-c", "print('two: ä')"]])
    assert job.wait(WAIT_S) == "finished"
    assert job.exit_code == 0
    lines = job.log().splitlines()
    assert [line for line in lines if not line.startswith("$ python -c ")] == ["one", "two: ä"]
    assert len(lines) == 4
    assert (job.kind, len(job.commands)) == ("train", 2)


def test_the_first_that_fails_ends_it(job: Job) -> None:
    fails = "import sys; print('note: x'); print('error: there is no dog', file=sys.stderr); sys.exit(2)"
    job.start("train", [["-c", fails], ["-c", "print('never')"]])
    assert job.wait(WAIT_S) == "failed"
    assert job.exit_code == 2
    assert job.last_sentence == "there is no dog"
    assert "never'" not in job.log()


def test_a_stop_is_ctrl_c_for_the_script_and_ends_the_rest(job: Job) -> None:
    job.start("train", [["-c", SAVES], ["-c", "print('never')"]])
    until("asleep\n", job)
    assert job.state == "running"
    job.stop()
    assert job.wait(WAIT_S) == "stopped"
    assert job.log().rstrip().endswith("saved")
    job.start("train", [["-c", "print('again')"]])
    assert job.wait(WAIT_S) == "finished"
    assert "saved" in job.log()  # the log goes on


def test_it_is_in_a_session_of_its_own(job: Job) -> None:
    """The end of the page's terminal, and Ctrl-C there, do not reach it."""
    job.start("train", [["-c", SLEEPS]])
    until("asleep\n", job)
    pids = [known["pid"] for known in job._processes]
    assert len({os.getsid(pid) for pid in pids}) == 1
    assert os.getsid(pids[0]) == pids[0] != os.getsid(0)


def test_its_state_is_read_from_files_alone(job: Job) -> None:
    """By another page, and after each of its processes was killed."""
    job.start("train", [["-c", SLEEPS]])
    until("asleep\n", job)
    runner, _ = (known["pid"] for known in job._processes)
    os.kill(runner, signal.SIGKILL)
    deadline = time.monotonic() + WAIT_S
    while psutil.pid_exists(runner) and psutil.Process(runner).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Job(job.folder).state == "running"
    Job(job.folder).stop()
    assert job.wait(WAIT_S) == "stopped"
    assert job.exit_code is None


def test_another_process_of_the_same_number_is_not_it(job: Job) -> None:
    job.folder.mkdir()
    (job.folder / "runner.json").write_text(f'{{"pid": {os.getpid()}, "created_s": 1.0}}')
    assert job.state == "stopped"
    job.stop()  # and is not stopped: this test goes on


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pid": "x"}', '{"exit_code": "0"}'])
def test_damaged_files_are_no_error(job: Job, content: str) -> None:
    job.folder.mkdir()
    for name in ("job.json", "runner.json", "script.json", "ended.json"):
        (job.folder / name).write_text(content)
    assert (job.state, job.kind, job.commands, job.log()) == ("stopped", "", [], "")


def test_the_time_left_is_the_scripts_own(job: Job) -> None:
    job.folder.mkdir()
    line = "steps: {} of 500, {} left, host 1.2 GiB, loss 0.2143\n"
    job.log_path.write_text("$ python a.py\n" + line.format(1, "99:00") + "$ python b.py --x\n")
    assert (job.at_work, job.time_left) == ("b.py", "")
    job.log_path.write_text(job.log() + line.format(250, "00:41") + "wrote x\n")
    assert job.time_left == "00:41"
