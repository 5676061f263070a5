"""`Job`: commands one after another in a process of their own, which goes on when the page is closed or restarted.

Its folder holds all that is known of it: `job.json` (the commands), `log.txt` (what they print), `runner.json` and
`script.json` (the processes at work), and at the end `ended.json` (the exit code). Whoever
reads it knows the job's state.

    python -m sd3_lora.projects.job FOLDER     is what the page starts; nobody needs to type it
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd3_lora.common.atomic_files import replacing
from sd3_lora.common.command_line import quoted
from sd3_lora.common.defaults import PROJECT_FOLDER

import psutil

State = Literal["running", "finished", "stopped", "failed"]
_STOPPED_CODES = {128 + number for number in (signal.SIGINT, signal.SIGTERM, 1)} | {-signal.SIGINT, -signal.SIGTERM}
_PROCESS_FILES = ("runner.json", "script.json")
_STARTED = "$ python "  # before each command in a log
_LEFT = re.compile(r"^\w+: \d+ of \d+, ([\d:]+) left", re.MULTILINE)
_LOG_BYTES = 20_000  # that are shown of a log


@dataclass(frozen=True)
class Job:
    """Commands in order; the first that fails ends them.

    Attributes:
        folder: of the job.
    """

    folder: Path

    @property
    def log_path(self) -> Path:
        """What the commands print."""
        return self.folder / "log.txt"

    @property
    def commands(self) -> list[list[str]]:
        """Each a script with its arguments, as for Python."""
        return list(_read(self.folder / "job.json").get("commands", ()))

    @property
    def kind(self) -> str:
        """What it does: train, draw, export."""
        return str(_read(self.folder / "job.json").get("kind", ""))

    @property
    def exit_code(self) -> int | None:
        """That of the last command; None while it runs, and where it was killed."""
        code = _read(self.folder / "ended.json").get("exit_code")
        return code if isinstance(code, int) else None

    @property
    def state(self) -> State:
        """Read from the folder and the system's list of processes, so that a restart of the page changes nothing."""
        code = self.exit_code
        if code is not None:
            return "finished" if code == 0 else "stopped" if code in _STOPPED_CODES else "failed"
        return "running" if any(map(_is_alive, self._processes)) else "stopped"

    @property
    def _processes(self) -> list[dict[str, Any]]:
        """The process that runs the commands, and that of the command at work: either may be killed alone."""
        return [_read(self.folder / name) for name in _PROCESS_FILES]

    def log(self) -> str:
        """The end of what was printed."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, self.log_path.stat().st_size - _LOG_BYTES))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    @property
    def at_work(self) -> str:
        """The script that was started last."""
        started = [line for line in self.log().splitlines() if line.startswith(_STARTED)]
        return started[-1].removeprefix(_STARTED).split()[0] if started else ""

    @property
    def time_left(self) -> str:
        """What the script at work says of it: 00:41; empty where it says nothing."""
        said = _LEFT.findall(self.log().rpartition(f"\n{_STARTED}")[2])
        return said[-1] if said else ""

    @property
    def last_sentence(self) -> str:
        """The error of a command that failed, as it printed it; else its last line."""
        lines = [line for line in self.log().splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (errors or lines or ["it ended without a word"])[-1]

    def start(self, kind: str, commands: Sequence[Sequence[str]]) -> None:
        """Starts them in a session of their own, and returns at once.

        The caller sees to it that no other job works in the same place.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("ended.json", *_PROCESS_FILES):
            (self.folder / name).unlink(missing_ok=True)
        _write(self.folder / "job.json", {"kind": kind, "commands": [list(words) for words in commands]})
        runner = subprocess.Popen(
            [sys.executable, "-m", "sd3_lora.projects.job", str(self.folder.resolve())],
            cwd=PROJECT_FOLDER,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **_own_session(),
        )
        _write(self.folder / "runner.json", _known(runner.pid))
        threading.Thread(target=runner.wait, daemon=True).start()  # or it would stay as a zombie

    def stop(self) -> None:
        """Asks the command at work to end in good order, as Ctrl-C does; returns at once.

        Windows has no such request between sessions: there it ends at once, and goes on from its last checkpoint.
        """
        alive = [process for process in self._processes if _is_alive(process)]
        if not alive:
            return
        if os.name == "nt":
            os.kill(alive[0]["pid"], signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined,unused-ignore]
        else:  # the job's first process leads the group, which outlives it
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(_read(self.folder / "runner.json")["pid"], signal.SIGINT)

    def wait(self, timeout_s: float) -> State:
        """Its state once it has ended, or after that time."""
        deadline = time.monotonic() + timeout_s
        while self.state == "running" and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.state


def _own_session() -> dict[str, Any]:
    """For Popen: neither the page's Ctrl-C nor the end of its terminal reaches the job."""
    if os.name == "nt":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined,unused-ignore]
    return {"start_new_session": True}


def _known(pid: int) -> dict[str, Any]:
    """A process, told apart from a later one of the same number."""
    try:
        return {"pid": pid, "created_s": psutil.Process(pid).create_time()}
    except psutil.Error:  # it has ended already
        return {"pid": pid, "created_s": 0}


def _is_alive(known: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(known["pid"])
        return process.create_time() == known["created_s"] and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, TypeError):
        return False


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run_commands(folder: Path) -> int:
    """Runs a job's commands; what they print goes to its log. Returns the exit code of the last one that ran."""
    job, code = Job(folder), 0
    # Taken, and not ignored: an ignored signal would be ignored by the commands too, which are to end in good order.
    received = list[int]()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, _: received.append(number))
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    with job.log_path.open("ab", buffering=0) as log:
        for words in job.commands:
            log.write(f"{_STARTED}{quoted(words)}\n".encode())
            script = subprocess.Popen(
                [sys.executable, *words], cwd=PROJECT_FOLDER, env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
            _write(folder / "script.json", _known(script.pid))
            code = script.wait() or (128 + received[0] if received else 0)
            if code:
                break
    _write(folder / "ended.json", {"exit_code": code})
    return code


if __name__ == "__main__":
    sys.exit(run_commands(Path(sys.argv[1])))
