"""Runs diffusers' sd3_lora_colab/compute_embeddings.py as it is, on a model in a folder and with today's transformers.

    python benchmarks/reference_embeddings.py MODEL SCRIPT [its flags]

Two of its words have no meaning here: the model's name on the hub, which stands for the folder, and `load_in_8bit`,
which transformers takes as a quantization config since version 5.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any
from unittest import mock

from diffusers import StableDiffusion3Pipeline
from transformers import BitsAndBytesConfig, T5EncoderModel


def loading_from(folder: str, loader: Any) -> Any:
    """A class's `from_pretrained` that loads from the folder whatever name it is given."""
    load = loader.from_pretrained

    def from_pretrained(_: str, load_in_8bit: bool = False, **options: Any) -> Any:
        if load_in_8bit:
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        return load(folder, **options)

    return mock.patch.object(loader, "from_pretrained", from_pretrained)


def main(argv: list[str]) -> None:
    """Runs the script."""
    folder, script = argv[:2]
    sys.argv = argv[1:]
    with loading_from(folder, T5EncoderModel), loading_from(folder, StableDiffusion3Pipeline):
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
