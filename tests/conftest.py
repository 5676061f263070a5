"""A tiny random SD3 and a handful of pictures, made once; and the scripts, called in-process."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # for child processes
os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported: an error is compared without the bar before it

import contextlib
import gc
import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
sys.path.append(str(PROJECT / "benchmarks"))

from random_sd3 import save_tiny_sd3

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it gives

TRAINING_SCRIPT = "train_dreambooth_sd3_lora_miniature"
PROMPT = "a photo of sks robot"


@pytest.fixture(scope="session", autouse=True)
def imports() -> None:
    """What most tests import, before `frozen_objects`."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from diffusers import StableDiffusion3Pipeline  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def left_frozen() -> Iterator[None]:
    """A run that watches its own garbage (`only_new_garbage`) unfreezes what `frozen_objects` froze, for good.

    test_memory.py calls the function itself.
    """
    watch = importlib.import_module("sd3_lora.training.watch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "only_new_garbage", contextlib.nullcontext)
        yield


@pytest.fixture(scope="module", autouse=True)
def frozen_objects(imports: None) -> None:
    """What is there before a module's tests is never garbage, so that a collection does not walk it.

    The scripts collect after every stage. The walk grew with all that the tests before had imported and compiled: in
    the last files of a run it took more time than the tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def as_it_was_told() -> Iterator[None]:
    """Takes back what `--deterministic` tells torch's libraries for the whole process (`make_deterministic`).

    And accelerate's device, which a process has for good: a test on a GPU may come before one on the CPU.
    """
    names, cudnn = ("CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"), torch.backends.cudnn
    told, flags = {name: os.environ.get(name) for name in names}, (cudnn.deterministic, cudnn.benchmark)
    yield
    cudnn.deterministic, cudnn.benchmark = flags
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
    for name, value in told.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@dataclass(frozen=True)
class Result:
    """What a script's `main` returned and printed."""

    code: int
    out: str
    err: str


def torchrun(*words: object) -> Result:
    """`torchrun("script.py", "--flag")` starts two ranks without a GPU: accelerate would want one for each."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [sys.executable, *map(str, (*launcher, *words))],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Result(finished.returncode, finished.stdout, finished.stderr)


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`script("inference", "--prompt", "a dog")` calls the script's main in this process."""

    def call(name: str, *words: object) -> Result:
        capsys.readouterr()
        code = importlib.import_module(name).main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def miniature_files() -> Any:
    """The bundled miniature, as `ModelFiles`."""
    from sd3_lora.common.config import ModelConfig
    from sd3_lora.common.model_files import MINIATURE, ModelFiles

    return ModelFiles(ModelConfig(str(MINIATURE)))


@pytest.fixture
def without_allowances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans leave out the fixed allowances, which are larger than the miniature."""
    from miniature_plans import plan_without_allowances

    plan_without_allowances(monkeypatch)


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random SD3: 64 px, joint width 48, pooled width 24."""
    return save_tiny_sd3(tmp_path_factory.mktemp("tiny"), width=48)


def save_pictures(folder: Path, sizes: list[tuple[int, int]], seed: int = 0) -> list[Path]:
    """Smooth random pictures of the given sizes, as PNGs 00.png, 01.png, …"""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for index, size in enumerate(sizes):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        paths.append(folder / f"{index:02d}.png")
        coarse.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three pictures: wide, square and tall."""
    folder = tmp_path / "pictures"
    save_pictures(folder, [(96, 64), (64, 64), (64, 90)])
    return folder


@dataclass(frozen=True)
class Prepared:
    """A finished stage one: run training with `flags`."""

    model: Path
    pictures: Path
    embeddings: Path
    latents: Path

    @property
    def flags(self) -> list[object]:
        return [
            "--pretrained_model_name_or_path", self.model, "--instance_data_dir", self.pictures,
            "--instance_prompt", PROMPT, "--data_df_path", self.embeddings, "--latents_path", self.latents,
            "--report_to", "none", "--seed", 0,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def prepared(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Stage one on the tiny model, once for all tests; they must not write to it. T5 length 20."""
    folder = tmp_path_factory.mktemp("prepared")
    save_pictures(folder / "pictures", [(96, 64), (64, 64), (64, 90), (70, 64), (64, 100)])
    stage_one = Prepared(tiny_sd3, folder / "pictures", folder / "embeddings.parquet", folder / "latents")
    shared = ["--pretrained_model_name_or_path", str(tiny_sd3), "--instance_data_dir", str(stage_one.pictures)]
    embeddings = importlib.import_module("compute_embeddings")
    latents = importlib.import_module("precompute_latents")
    text = ["--instance_prompt", PROMPT, "--max_sequence_length", "20", "--class_prompt", "a photo of a robot"]
    assert embeddings.main([*shared, *text, "--output_path", str(stage_one.embeddings)]) == 0
    assert latents.main([*shared, "--output_path", str(stage_one.latents)]) == 0
    return stage_one


@pytest.fixture(scope="session")
def on_miniature(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The flags of training after stage one of the miniature: three pictures at 64 px, T5 length 20."""
    import compute_embeddings
    import precompute_latents
    from sd3_lora.common.model_files import MINIATURE

    from training_runs import Flags

    folder = tmp_path_factory.mktemp("miniature")
    pictures = folder / "pictures"
    save_pictures(pictures, [(64, 64)] * 3)
    model = ["--pretrained_model_name_or_path", str(MINIATURE), "--instance_data_dir", str(pictures), "--device", "cpu"]
    text = ["--instance_prompt", "a photo of sks fish", "--max_sequence_length", "20"]
    assert compute_embeddings.main([*model, *text, "--output_path", str(folder / "e.parquet")]) == 0
    assert precompute_latents.main([*model, "--resolution", "64", "--output_path", str(folder / "latents")]) == 0
    words = [*model[:4], "--instance_prompt", "a photo of sks fish", "--data_df_path", folder / "e.parquet"]
    words += ["--latents_path", folder / "latents", "--resolution", 64, "--report_to", "none", "--seed", 0]
    return Flags([*words, "--learning_rate", 0.01, "--lora_dropout", 0.2])


@pytest.fixture
def private(prepared: Prepared, tmp_path: Path) -> Prepared:
    """A copy of the finished stage one that a test may break."""
    from training_runs import private_copy

    return private_copy(prepared, tmp_path / "stage_one")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scripts that training starts run in this process; returns their names."""
    started: list[str] = []

    def run(words: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(Path(words[1]).stem)
        return subprocess.CompletedProcess(words, importlib.import_module(started[-1]).main(list(map(str, words[2:]))))

    monkeypatch.setattr("sd3_lora.training.stage_one_request.subprocess.run", run)
    return started


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Without it attention's backward may add up in another order each time on a GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A stand-in for the hub (`hub_server.Hub`), for this process; nobody is logged in."""
    import huggingface_hub
    from hub_server import Hub

    hub, constants = Hub(), huggingface_hub.constants
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by playwright; what asks for it is skipped where one of them is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
