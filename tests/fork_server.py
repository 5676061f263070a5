"""Runs the scripts in processes that are forked from one that has imported them all, and kills them where it is told.

    python tests/fork_server.py      reads an order from each line of its input, a JSON object, and answers with one

The orders are those of `killed_runs.ForkServer`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

MODULES = (
    "compute_embeddings",
    "precompute_latents",
    "draw_class_pictures",
    "train_dreambooth_sd3_lora_miniature",
    "inference",
    "sd3_lora.convert",
    "sd3_lora.export",
    "sd3_lora.losses",
    "sd3_lora.merge",
    "sd3_lora.report",
    "sd3_lora.reporting.page",
)
CHANGES = {
    "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.copyfile",
    "shutil.rmtree",
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
TIMEOUT_S = 120


def count_operations(act: Callable[[int], None]) -> None:
    """Has `act` called before each operation that changes a file or a folder, with its number from 1.

    Those of Python's are seen, not those of the compiled writers of parquet and safetensors: for them there is
    "write" (`arm`).
    """
    number, watching = 0, True

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal number, watching
        opens = event == "open" and isinstance(details[2], int) and details[2] & WRITES and details[0] != os.devnull
        if watching and (opens or event in CHANGES):
            watching, number = False, number + 1  # what `act` does is not counted
            act(number)
            watching = True

    sys.addaudithook(hook)


def data_bytes(process: int) -> int:
    """What RLIMIT_DATA limits: memory of its own that a process may write."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended


def arm(kill: dict[str, Any], count_path: str | None) -> None:
    """In the forked process: dies before the file operation `operation`, or as soon as a file has `write` bytes.

    With `limit` it lives, and no file takes more bytes; with `memory` it gets no more of it than so many bytes.
    """

    def act(number: int) -> None:
        if number == kill.get("operation"):
            os.kill(os.getpid(), signal.SIGKILL)
        if count_path:
            Path(count_path).write_text(str(number))

    if "operation" in kill or count_path:
        count_operations(act)
    if "write" in kill:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill["write"], resource.RLIM_INFINITY))
    if "memory" in kill:
        most = data_bytes(os.getpid()) + kill["memory"]
        resource.setrlimit(resource.RLIMIT_DATA, (most, resource.RLIM_INFINITY))
    if "limit" in kill:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill["limit"], resource.RLIM_INFINITY))


def run(order: dict[str, Any], output: int) -> int:
    """The forked process: one script; what it prints goes to a pipe, which no limit on files concerns."""
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(order["folder"])
    for name, value in order["settings"].items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    arm(order["kill"], order.get("count_path"))
    code = importlib.import_module(order["module"]).main(order["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


class Child:
    """A forked process.

    Args:
        order: what it runs, and how it is killed.
    """

    def __init__(self, order: dict[str, Any]):
        self.kill_after_s: float | None = order["kill"].get("after_s")
        self.output, written = os.pipe()
        self.start_s, self.log = time.monotonic(), b""
        self.ended: list[Any] | None = None
        self.before_bytes, self.most_bytes = data_bytes(os.getpid()), 0
        self.number = os.fork()
        if self.number == 0:
            code = 70
            try:
                code = run(order, written)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(code)
        os.close(written)
        os.set_blocking(self.output, False)

    def look(self) -> None:
        """Reads what it printed, kills it if it is time to, and notes its end.

        Its exit code is negative for a signal, and None where it took too long and was killed for that.
        """
        elapsed_s = time.monotonic() - self.start_s
        self.most_bytes = max(self.most_bytes, data_bytes(self.number))
        ended, status = os.waitpid(self.number, os.WNOHANG)
        code: int | None = os.waitstatus_to_exitcode(status) if ended else 0
        if not ended and elapsed_s > (TIMEOUT_S if self.kill_after_s is None else self.kill_after_s):
            os.kill(self.number, signal.SIGKILL)
            os.waitpid(self.number, 0)
            ended, code = self.number, None if self.kill_after_s is None else -signal.SIGKILL
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.output, 65536):
                self.log += part
        if ended:
            os.close(self.output)
            taken = max(0, self.most_bytes - self.before_bytes)
            self.ended = [code, elapsed_s, self.log.decode(errors="replace"), taken]


def main() -> None:
    """Answers until its input ends."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # another reserves a GiB at once, of which it uses little
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from diffusers import StableDiffusion3Pipeline  # noqa: F401

    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        children = [Child(order) for order in json.loads(line)]
        while waiting := [child for child in children if child.ended is None]:
            for child in waiting:
                child.look()
            time.sleep(0.002)
        print(json.dumps([child.ended for child in children]), file=answers, flush=True)


if __name__ == "__main__":
    main()
