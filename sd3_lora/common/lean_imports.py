"""Library imports without what a script never uses: as they are, they take longer than stage one's own work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.abc
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# diffusers imports them wherever they are installed, and no script asks diffusers for anything of them: text encoders
# are transformers' own, LoRA layers PEFT's, and nf4 bitsandbytes'.
_BESIDE_DIFFUSERS = ("bitsandbytes", "peft", "transformers")


def import_diffusers(*modules: str) -> None:
    """Imports diffusers' models, for a script's own process: whatever imports them later finds them there.

    To diffusers the packages beside it are not installed, for good; to all that is imported later they are. Nor does it
    import torch's compiler, by which it marks what a compiled block would keep whole: blocks compile to the same graphs
    without the marks.

    Args:
        modules: of diffusers, that are imported too.
    """
    compiler = () if "transformers" in sys.modules else ("torch._dynamo",)  # transformers cannot do without
    with _uncollected(), _packages_on_demand(), _compiler_on_demand(), _hidden((*_BESIDE_DIFFUSERS, *compiler)):
        from diffusers import AutoencoderKL, SD3Transformer2DModel  # noqa: F401

        for module in modules:
            importlib.import_module(module)


def import_transformers(*names: str) -> None:
    """Imports classes of transformers, likewise."""
    with _uncollected(), _packages_on_demand():
        import torch  # noqa: F401
        import transformers

        for name in names:
            getattr(transformers, name)


def import_peft() -> None:
    """Imports PEFT, without bitsandbytes unless that is there already."""
    with _packages_on_demand(), without_bitsandbytes():
        import peft  # noqa: F401


def without_bitsandbytes() -> contextlib.AbstractContextManager[None]:
    """In the block PEFT finds no bitsandbytes, unless weights in 4 bits, say, had it imported before.

    PEFT imports it to ask whether a layer is of it, and it has torch compile two functions, for which torch imports its
    compiler: 1.4 s.
    """
    return _hidden(("bitsandbytes",))


def import_pyarrow() -> None:
    """Imports pyarrow, for a script's own process.

    For the first value that it converts it would import pandas, wherever that is installed, to see whether the value is
    one of pandas'.
    """
    finder = _NoPandas()  # pyarrow is compiled, and would take `_hidden`'s None for the module
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow

        pyarrow.scalar(0)  # now it is asked, and not again
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(f"{name} is left out", name=name)


def import_bitsandbytes() -> None:
    """Imports bitsandbytes, for a GPU: on a CPU the compiled form of two of its functions is faster.

    It has torch compile them, which imports torch's compiler: three quarters of its time.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def start_driver() -> None:
    """Starts the NVIDIA driver in a thread, while libraries are imported; does nothing where there is none.

    It makes no CUDA context, whose bytes are measured later.
    """
    threading.Thread(target=_start_driver, daemon=True).start()


def _start_driver() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuInit(0)


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """In the block, packages that are not imported yet are as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python's own way to say so
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """In the block no garbage is collected, and what it leaves is never looked through again.

    Modules live to the end. To look through them takes 0.7 s while they are imported, and 0.2 s whenever memory is
    freed afterwards.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


@contextlib.contextmanager
def _packages_on_demand() -> Iterator[None]:
    """In the block, which package is of which distribution is found out when it is asked.

    diffusers asks at its import, for three packages that are rarely there, and Python reads the file list of each
    installed distribution to answer: Python 3.12 looks for each file of them, too.
    """
    find = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: _OnDemand(find)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = find


@contextlib.contextmanager
def _compiler_on_demand() -> Iterator[None]:
    """In the block, functions that are not to be compiled are left as they are: to say so torch imports its compiler.

    diffusers says so of hooks that no script uses.
    """
    import torch

    disable = torch.compiler.disable
    torch.compiler.disable = _left_as_it_is
    try:
        yield
    finally:
        torch.compiler.disable = disable


def _left_as_it_is(function: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """With the arguments of `torch.compiler.disable`, a decorator with or without a function."""
    return function if function is not None else _left_as_it_is


class _OnDemand(Mapping[str, list[str]]):
    """A mapping that is made when it is first read."""

    def __init__(self, make: Callable[[], Mapping[str, list[str]]]):
        self._make = make
        self._made: Mapping[str, list[str]] | None = None

    def _content(self) -> Mapping[str, list[str]]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, name: str) -> list[str]:
        return self._content()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content())

    def __len__(self) -> int:
        return len(self._content())
