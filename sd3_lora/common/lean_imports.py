"""Library imports without what a script never uses: as they are, they take longer than stage one's own work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.abc
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping


def import_diffusers(without: tuple[str, ...] = ()) -> None:
    """Imports diffusers' models, for a script's own process: whatever imports them later finds them there.

    Args:
        without: packages that diffusers imports wherever they are installed, and that this process asks diffusers for
            nothing of. To diffusers they are not installed, for good; to all that is imported later they are.
    """
    with _uncollected(), _hidden(without), _packages_on_demand():
        from diffusers import AutoencoderKL, SD3Transformer2DModel  # noqa: F401


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
