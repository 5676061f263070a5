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


HEAVY = {
    *("accelerate", "bitsandbytes", "datasets", "diffusers", "diffusers.pipelines.pipeline_utils", "jinja2"),
    *("pandas.core", "peft", "scipy", "sklearn", "sympy", "torch", "torch._dynamo", "torch._inductor.compile_fx"),
    *("torchvision", "transformers", "transformers.generation.utils", "transformers.modeling_utils"),
}
NEEDS = {
    "precompute_latents": {"accelerate", "diffusers", "torch"},
    "inference": {"accelerate", "diffusers", "torch"},
    "draw_class_pictures": {"accelerate", "diffusers", "torch"},
    "train_dreambooth_sd3_lora_miniature": {
        *("accelerate", "diffusers", "diffusers.pipelines.pipeline_utils", "sympy", "torch"),
    },
}


def imported_by(script: str, *arguments: str, runs: bool = False) -> tuple[set[str], set[str]]:
    """What of HEAVY a script has imported when its work begins, and when it ends."""
    code = f"""
import runpy, sys
from sd3_lora.common import command_line
heavy = lambda: " ".join(sorted({HEAVY!r} & sys.modules.keys()))
run_script = command_line.exit_code
def exit_code(*call):
    print("at start:", heavy())
    return run_script(*call) if {runs} else 0
command_line.exit_code = exit_code
sys.argv = {[f"{script}.py", *arguments]!r}
try:
    runpy.run_path("{script}.py", run_name="__main__")
finally:
    print("at end:", heavy())
"""
    lines = run(code).splitlines()
    at_start, at_end = (next(line for line in lines if line.startswith(when)) for when in ("at start:", "at end:"))
    return set(at_start.split()[2:]), set(at_end.split()[2:])


@pytest.mark.parametrize("script", ["draw_class_pictures", "train_dreambooth_sd3_lora_miniature"])
def test_a_script_begins_with_what_it_needs_from_the_start(script: str) -> None:
    arguments = ["--class_prompt", "a robot", "--class_data_dir", "x"] if script == "draw_class_pictures" else []
    at_start, _ = imported_by(script, *arguments)
    assert at_start == NEEDS[script]


def test_drawing_with_a_lora_merged_into_the_weights_never_imports_peft() -> None:
    """Nor transformers, where no prompt is encoded. Counting a step's memory has torch import its compiler."""
    lora = "tests/data/cc752f5/adamw/pytorch_lora_weights.safetensors"
    at_start, at_end = imported_by("inference", "--lora", lora, "--prompt", "a robot", "--plan", runs=True)
    assert at_start == NEEDS["inference"]
    assert at_end - at_start == {"sympy", "torch._dynamo"}


def test_captioning_imports_transformers_alone() -> None:
    at_start, _ = imported_by("caption_images", "--instance_data_dir", "examples/robot")
    assert not at_start & {"bitsandbytes", "datasets", "diffusers", "pandas.core", "peft", "scipy", "sklearn"}


def test_a_lora_is_attached_without_bitsandbytes_and_then_to_a_base_in_4_bits() -> None:
    found = run(
        "import sys\n"
        "sys.path[:0] = ['tests', 'benchmarks']\n"
        "from sd3_lora.common.lean_imports import import_diffusers\n"
        "import_diffusers()\n"
        "from random_sd3 import smaller_transformer\n"
        "from sd3_lora.transformer.lora import attach_lora, target_modules\n"
        "import torch\n"
        "def attached():\n"
        "    torch.manual_seed(0)\n"
        "    transformer = smaller_transformer(num_layers=2)\n"
        "    names = target_modules(transformer, None, None)\n"
        "    if 'bitsandbytes' in sys.modules:\n"
        "        from bitsandbytes.nn import Linear4bit\n"
        "        for name in names:\n"
        "            parent, _, leaf = name.rpartition('.')\n"
        "            layer = transformer.get_submodule(name)\n"
        "            new = Linear4bit(layer.in_features, layer.out_features)\n"
        "            setattr(transformer.get_submodule(parent), leaf, new)\n"
        "    attach_lora(transformer, names, 4, 4, 0.0, 0)\n"
        "    layer = transformer.get_submodule(names[0])\n"
        "    return type(layer).__name__, type(layer.get_base_layer()).__name__\n"
        "print(*attached(), *sorted({'bitsandbytes', 'torch._inductor.compile_fx'} & sys.modules.keys()))\n"
        "import bitsandbytes\n"
        "print(*attached())"
    )
    assert found == "AddedLora Linear\nAddedLora Linear4bit\n"


def test_blocks_compile_to_the_same_graphs_without_diffusers_marks() -> None:
    """Without the compiler at its import, diffusers marks none of its layers as one that a graph takes whole."""
    found = run(
        "import sys\n"
        "sys.path[:0] = ['tests', 'benchmarks']\n"
        "from sd3_lora.common.lean_imports import import_diffusers\n"
        "import_diffusers()\n"
        "import torch\n"
        "from random_sd3 import smaller_transformer\n"
        "from diffusers.models.attention import FeedForward, JointTransformerBlock\n"
        "torch.manual_seed(0)\n"
        "transformer = smaller_transformer(num_layers=2)\n"
        "config, text = transformer.config, torch.randn(1, 3, transformer.config.joint_attention_dim)\n"
        "latents, pooled = torch.randn(1, config.in_channels, 8, 8), torch.randn(1, config.pooled_projection_dim)\n"
        "@torch.no_grad()\n"
        "def graphs():\n"
        "    found = []\n"
        "    torch._dynamo.reset()\n"
        "    def backend(graph, _):\n"
        "        found.append(graph.print_readable(print_output=False))\n"
        "        return graph.forward\n"
        "    for block in transformer.transformer_blocks:\n"
        "        block.compile(backend=backend)\n"
        "    transformer(latents, text, pooled, torch.tensor([500.0]))\n"
        "    return found\n"
        "unmarked = graphs()\n"
        "for kind in (JointTransformerBlock, FeedForward):\n"
        "    torch.compiler.allow_in_graph(kind)\n"
        "print(len(unmarked), graphs() == unmarked)"
    )
    assert found == "2 True\n"


@pytest.mark.parametrize("script", ["compute_embeddings", "precompute_latents"])
def test_stage_one_imports_no_library_that_it_does_not_use(script: str, tmp_path: Path) -> None:
    at_start, at_end = imported_by(script, "--device", "cpu", "--output_path", str(tmp_path / "a"), runs=True)
    assert "torch" in at_start
    assert not at_end & {"bitsandbytes", "datasets", "pandas.core", "peft", "scipy", "torch._inductor.compile_fx"}
    assert not at_end & ({"diffusers"} if script == "compute_embeddings" else HEAVY - NEEDS[script])


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
