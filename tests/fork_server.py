"""Runs the scripts in processes that are forked from one that has imported them all, and kills them where it is told.

    python tests/fork_server.py      reads an order from each line of its input, a JSON object, and answers with one

The orders are those of `killed_runs.ForkServer`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
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


def arm(kill: dict[str, Any], count_path: str | None) -> None:
    """In the forked process: dies before the file operation `operation`, or as soon as a file has `write` bytes."""

    def act(number: int) -> None:
        if number == kill.get("operation"):
            os.kill(os.getpid(), signal.SIGKILL)
        if count_path:
            Path(count_path).write_text(str(number))

    if "operation" in kill or count_path:
        count_operations(act)
    if "write" in kill:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill["write"], resource.RLIM_INFINITY))


def run(order: dict[str, Any]) -> int:
    """The forked process: one script, with what it prints in a file."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(order["folder"])
    os.environ.update(order.get("environment", {}))
    for name, value in order.get("settings", {}).items():
        module, _, attribute = name.rpartition(".")
        setattr(importlib.import_module(module), attribute, value)
    arm(order.get("kill", {}), order.get("count_path"))
    code = importlib.import_module(order["module"]).main(order["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code)


def wait_for(child: int, kill_after_s: float | None) -> tuple[int | None, float]:
    """The exit code of a child (negative for a signal), and its seconds; None where it was killed for taking too long.

    Args:
        child: its process id.
        kill_after_s: when it is killed, if it is to be.
    """
    start = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        elapsed_s = time.monotonic() - start
        if ended:
            return os.waitstatus_to_exitcode(status), elapsed_s
        if elapsed_s > (TIMEOUT_S if kill_after_s is None else kill_after_s):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None if kill_after_s is None else -signal.SIGKILL, elapsed_s
        time.sleep(0.002)


def start(order: dict[str, Any]) -> int:
    """Forks; returns the child's process id."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            code = run(order)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    return child


def main() -> None:
    """Answers until its input ends."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from diffusers import StableDiffusion3Pipeline  # noqa: F401

    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        orders = json.loads(line)
        children = [start(order) for order in orders]
        ended = [
            wait_for(child, order.get("kill", {}).get("after_s")) for child, order in zip(children, orders, strict=True)
        ]
        print(json.dumps(ended), file=answers, flush=True)


if __name__ == "__main__":
    main()
