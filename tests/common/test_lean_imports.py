"""What the scripts' processes do not import, and that it can be imported all the same."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
from pathlib import Path

from sd3_lora.common import lean_imports

import pytest
from conftest import PROJECT


def run(code: str) -> str:
    """What a process of its own prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True, timeout=120).stdout


def test_what_was_left_out_of_diffusers_is_there_for_all_others() -> None:
    found = run(
        "import importlib.metadata, sys\n"
        "find = importlib.metadata.packages_distributions\n"
        "from sd3_lora.common.lean_imports import import_diffusers\n"
        "import_diffusers()\n"
        "assert importlib.metadata.packages_distributions is find\n"
        "print(*sorted({'diffusers', 'transformers', 'peft', 'bitsandbytes', 'torch._dynamo'} & set(sys.modules)))\n"
        "import torch._dynamo\n"
        "assert torch.compiler.disable.__module__ == 'torch.compiler'\n"
        "from diffusers import AutoencoderKL, SD3Transformer2DModel\n"
        "import peft\n"
        "from transformers.utils import is_bitsandbytes_available\n"
        "print(is_bitsandbytes_available(), peft.import_utils.is_bnb_4bit_available())"
    )
    assert found == "diffusers\nTrue True\n"


def test_what_is_imported_is_not_looked_through_for_garbage() -> None:
    """But all that is made later is."""
    found = run(
        "import gc\n"
        "from sd3_lora.common.lean_imports import import_diffusers\n"
        "import_diffusers()\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 50_000)"
    )
    assert found == "True True True\n"


def test_bitsandbytes_for_a_gpu_is_imported_without_the_compiler() -> None:
    found = run(
        "import sys\n"
        "from sd3_lora.common.lean_imports import import_bitsandbytes\n"
        "import_bitsandbytes()\n"
        "import os\n"
        "print('bitsandbytes' in sys.modules, 'torch._inductor.compile_fx' in sys.modules)\n"
        "print(os.environ.get('TORCHDYNAMO_DISABLE'))"
    )
    assert found == "True False\nNone\n"


@pytest.mark.parametrize("script", ["compute_embeddings", "precompute_latents"])
def test_stage_one_imports_no_library_that_it_does_not_use(script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", f"{script}.py", "--device", "cpu", "--output_path", tmp_path / "a"]
    finished = subprocess.run(command, cwd=PROJECT, check=True, capture_output=True, text=True, timeout=120)
    imported = {line.rsplit("|", 1)[1].strip() for line in finished.stderr.splitlines() if "import time:" in line}
    assert "torch" in imported
    needless = {"pandas.core", "peft", "bitsandbytes", "torch._inductor.compile_fx"}
    assert not imported & (needless | ({"diffusers"} if script == "compute_embeddings" else set()))


def test_packages_are_looked_up_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def find() -> dict[str, list[str]]:
        calls.append(None)
        return {"a": ["b"]}

    monkeypatch.setattr(importlib.metadata, "packages_distributions", find)
    with lean_imports._packages_on_demand():
        packages = importlib.metadata.packages_distributions()
    assert importlib.metadata.packages_distributions is find
    assert not calls
    assert "a" in packages
    assert "c" not in packages
    assert (dict(packages), len(packages)) == ({"a": ["b"]}, 1)
    assert len(calls) == 1


def test_a_machine_without_a_driver_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for by the system's name for it, in a thread too, and its absence is no error."""
    sought: list[str] = []

    def absent(name: str) -> None:
        sought.append(name)
        raise OSError(name)

    monkeypatch.setattr(lean_imports.ctypes, "CDLL", absent)
    lean_imports._start_driver()
    before = set(threading.enumerate())
    lean_imports.start_driver()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert sought == 2 * ["nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"]


def test_threads_of_a_cpu_do_not_wait_busily(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other work that costs a step of the miniature ten times its time. What the user sets is kept."""
    code = "import os, sd3_lora; print(os.environ['OMP_WAIT_POLICY'])"
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert run(code) == "PASSIVE\n"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert run(code) == "ACTIVE\n"
