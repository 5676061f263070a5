"""Experiment trackers: those that are installed and work, never a login prompt. Training goes on without them."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sd3_lora.common.command_line import first_line

import numpy as np
from accelerate import Accelerator
from PIL import Image

# The modules of each tracker, of which one is enough.
_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "comet_ml": ("comet_ml",)}
_PROJECT = "sd3-dreambooth-lora"


def usable_trackers(asked: Sequence[str]) -> list[str]:
    """The trackers that accelerate is to start; prints a sentence for each that cannot be.

    Args:
        asked: names, or `all` or `none`.
    """
    if "none" in asked:
        return []
    names = list(_MODULES) if "all" in asked else list(asked)
    usable = []
    for name in names:
        if any(importlib.util.find_spec(module) for module in _MODULES[name]):
            usable.append(name)
        elif name != "tensorboard" and "all" not in asked:
            print(f"{name} is not installed, so nothing is sent to it: type `pip install {name}` to have it")
    if "wandb" in usable and not _has_wandb_key():
        os.environ["WANDB_MODE"] = "offline"  # it would ask for a key on a terminal that may not be there
        print("wandb has no key, so it logs offline: type `wandb login`, or `wandb sync` afterwards")
    return usable


class Trackers:
    """The trackers that accelerate has started. One that fails is left out with a sentence: the loss log has it all.

    Args:
        accelerator: that was told their names.
        settings: of the run, plain values.
    """

    def __init__(self, accelerator: Accelerator, settings: Mapping[str, Any]):
        self._accelerator = accelerator
        started = []
        for name in accelerator.log_with:
            accelerator.log_with, accelerator.trackers = [name], []
            if self._works(str(name), partial(accelerator.init_trackers, _PROJECT, dict(settings))):
                started += accelerator.trackers
        accelerator.trackers = started

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the values of an optimizer step, from rank 0."""
        for tracker in list(self._accelerator.trackers):
            if not self._works(tracker.name, partial(tracker.log, dict(values), step=step)):
                self._accelerator.trackers.remove(tracker)

    def log_pictures(self, step: int, pictures: Sequence[tuple[str, Image.Image]]) -> None:
        """Sends pictures with their prompts, from rank 0."""
        for tracker in list(self._accelerator.trackers):
            send = _PICTURE_SENDERS.get(tracker.name)
            if send and not self._works(tracker.name, partial(send, tracker, step, pictures)):
                self._accelerator.trackers.remove(tracker)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        """Sends what is left, of a run that was interrupted too."""
        for tracker in self._accelerator.trackers:
            self._works(tracker.name, tracker.finish)
        self._accelerator.trackers = []

    def _works(self, name: str, work: Callable[[], object]) -> bool:
        try:
            work()
        except Exception as error:  # of a library, whatever it is
            reason = first_line(error)
            self._accelerator.print(
                f"note: {name} does not work ({type(error).__name__}: {reason}): training goes on without it, and "
                "losses.jsonl has what it would have shown"
            )
            return False
        return True


def _to_tensorboard(tracker: Any, step: int, pictures: Sequence[tuple[str, Image.Image]]) -> None:
    by_prompt: dict[str, list[Image.Image]] = {}
    for prompt, picture in pictures:
        by_prompt.setdefault(prompt, []).append(picture)
    for prompt, its_pictures in by_prompt.items():
        pixels = np.stack([np.asarray(picture) for picture in its_pictures])  # (N, H, W, 3)
        tracker.writer.add_images(f"validation/{prompt or '(empty)'}", pixels, step, dataformats="NHWC")


def _to_wandb(tracker: Any, step: int, pictures: Sequence[tuple[str, Image.Image]]) -> None:
    import wandb  # its import takes seconds, and only this needs it

    tracker.log({"validation": [wandb.Image(picture, caption=prompt) for prompt, picture in pictures]}, step=step)


def _to_comet(tracker: Any, step: int, pictures: Sequence[tuple[str, Image.Image]]) -> None:
    for number, (prompt, picture) in enumerate(pictures):
        tracker.tracker.log_image(picture, name=f"{number:02d} {prompt}", step=step)


_PICTURE_SENDERS: dict[str, Callable[[Any, int, Sequence[tuple[str, Image.Image]]], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "comet_ml": _to_comet,
}


def _has_wandb_key() -> bool:
    """Whether wandb would start without asking: as its own look-up, which only its slow import offers."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    settings = _wandb_settings()
    if settings.get("api_key") or settings.get("mode"):
        return True
    url = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    host = urlsplit(url).hostname or url
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    return any(_has_password(Path(path).expanduser(), host) for path in files)


def _wandb_settings() -> dict[str, str]:
    """The settings files of wandb: the user's, then the current folder's, which wins."""
    config = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read([Path(config) / "settings", Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"])
    except (configparser.Error, UnicodeDecodeError):
        return {}
    return dict(parser["default"]) if parser.has_section("default") else {}


def _has_password(path: Path, host: str) -> bool:
    try:
        found = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return found is not None and bool(found[2])
