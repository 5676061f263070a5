"""--deterministic in each script: what the libraries are told before they compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

SCRIPTS = {
    "compute_embeddings": [],
    "precompute_latents": [],
    "train_dreambooth_sd3_lora_miniature": [],
    "inference": ["--prompt", "a robot"],
}


@pytest.mark.parametrize("script_name", SCRIPTS)
@pytest.mark.parametrize("switch", ["on", "auto"])
def test_the_libraries_are_told(
    script: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    script_name: str,
    switch: str,
) -> None:
    """cuBLAS and inductor by the environment, cuDNN by its flag; not where the flag is not typed."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.chdir(tmp_path)
    flags = ["--plan", "--vram_budget_gib", 8, "--device", "cpu", *SCRIPTS[script_name]]
    assert script(script_name, *flags, "--deterministic", switch).code == 0
    is_on = switch == "on"
    assert torch.backends.cudnn.deterministic is is_on
    assert [os.environ.get(name) for name in names] == ([":4096:8", "1"] if is_on else [None, None])
