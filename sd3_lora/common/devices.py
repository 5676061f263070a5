"""The device and the dtypes: chosen once, with the reason."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sd3_lora.common.command_line import UserError, print_in_rank_0
from sd3_lora.common.config import ModelConfig

import torch

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ChosenDtype:
    """A dtype and the sentence that says why."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """fp32, fp16 or bf16."""
        return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.dtype]


def has_triton() -> bool:
    """Whether Triton is installed, which compiles for a GPU: not on Windows."""
    return importlib.util.find_spec("triton") is not None


def choose_device(asked: str, model: ModelConfig | None = None) -> torch.device:
    """The device to compute on.

    Args:
        asked: cuda, cpu or auto.
        model: that is to run there; the bundled miniature does not need a GPU that this build of torch cannot use.

    Raises:
        UserError: cuda was asked for and is not there, or the machine's GPU cannot be used by this build of torch.
    """
    if asked == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if has_nvidia_gpu() and torch.version.cuda is None:
        shortage = f"this machine has an NVIDIA GPU but torch {torch.__version__} is a build for the CPU"
        if asked == "auto" and model is not None and model.is_bundled:
            print_in_rank_0(f"note: {shortage}: enough for the miniature; for SD3 type `{cuda_install()}`")
            return torch.device("cpu")
        raise UserError(f"{shortage}: type `{cuda_install()}`, or add --device cpu")
    if asked == "cuda":
        raise UserError("torch finds no GPU here: check `nvidia-smi`, or type --device cpu")
    return torch.device("cpu")


def cuda_install(version: str = torch.__version__) -> str:
    """The command that replaces torch by the same version with CUDA.

    From torch 2.9 on with CUDA 13, for GPUs since Turing; before, with CUDA 12.6, which PyTorch publishes for each of
    the supported versions.
    """
    release = version.partition("+")[0]
    cuda = "cu130" if tuple(map(int, release.split(".")[:2])) >= (2, 9) else "cu126"
    return f"pip install torch=={release}+{cuda} --index-url https://download.pytorch.org/whl/{cuda}"


def make_deterministic() -> None:
    """Has torch's libraries compute alike each time, for the whole process; before the first use of a GPU.

    Attention's backward pass is not among them: `gpu/exact_attention.py`.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may take what another stream left
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # compiled kernels are not chosen by their time
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def cpu_cores() -> int:
    """The cores that this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Where a GPU computes, keeps the host's operations in the calling thread.

    They are small: waking other threads takes longer than the work. A micro-batch's noise at 1024 px took 56 ms on a
    host of 32 cores, and takes 2 ms in one thread.
    """
    before = torch.get_num_threads()
    if device.type == "cuda":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def planned_device(asked: str, device: torch.device, planning: bool) -> torch.device:
    """The device whose default precisions hold: under --plan a GPU, even an absent one, unless a CPU was asked for."""
    return torch.device("cuda") if planning and asked != "cpu" else device


def has_nvidia_gpu() -> bool:
    """Whether the driver shows a GPU, whatever torch can do with it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def choose_training_dtype(asked: str | None, device: torch.device) -> ChosenDtype:
    """The dtype of the frozen transformer and of the activations; the LoRA is fp32 whatever it is.

    Args:
        asked: no, fp16, bf16, or None for the best that the device has.
        device: where it runs.
    """
    if device.type == "cpu":
        if asked == "fp16":
            return ChosenDtype(torch.float32, "fp32: a CPU has no fast fp16, so --mixed_precision fp16 runs in fp32")
        if asked == "bf16":
            return ChosenDtype(torch.bfloat16, "bf16: as asked")
        return ChosenDtype(torch.float32, "fp32: the exact and, on a CPU, the fast one")
    # Without including_emulation=False a T4 counts as capable, and is very slow. --plan may run without a GPU.
    native_bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "no":
        return ChosenDtype(torch.float32, "fp32: as asked")
    if asked == "bf16" and not native_bf16:
        return ChosenDtype(torch.float16, f"fp16: {torch.cuda.get_device_name(device)} has no bf16")
    if asked == "bf16":
        return ChosenDtype(torch.bfloat16, "bf16: as asked")
    return ChosenDtype(torch.float16, "fp16: as asked" if asked else "fp16: half the memory, on every GPU")


def choose_whole_dtype(asked: str | None, device: torch.device) -> ChosenDtype:
    """The dtype of a transformer whose own weights are trained: they are kept, updated and saved in it.

    fp16 is none: its numbers reach no further than 65504, and an update that the backward pass has applied cannot be
    undone where a gradient was infinite, as a gradient scaler must.

    Args:
        asked: no, fp16, bf16, or None for the best that the device has.
        device: where it runs.

    Raises:
        UserError: the GPU has no bf16.
    """
    if device.type == "cpu" or asked == "no":
        return choose_training_dtype(asked, device)
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"--full trains weights in bf16, which {torch.cuda.get_device_name(device)} lacks, and in fp16 an update "
            "inside the backward pass could not be undone where a gradient overflows: add --mixed_precision no (fp32, "
            "twice the memory), or leave --full out"
        )
    if asked == "fp16":
        return ChosenDtype(torch.bfloat16, "bf16: --full does not train weights in fp16, whose gradients overflow")
    return ChosenDtype(torch.bfloat16, "bf16: as asked" if asked else "bf16: half the memory of fp32")
