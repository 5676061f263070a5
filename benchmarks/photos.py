"""Fabricated photos: smooth with a little grain, so that their JPEG files are about as large as a camera's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

DISTINCT = 4  # the rest are these with another comment in the file, which makes another file of the same work
GRAIN = 4.0  # standard deviation, of 255
JPEG_QUALITY = 92


def fabricate_photos(folder: Path, count: int, size: tuple[int, int]) -> Sequence[Path]:
    """`count` JPEG photos of that many pixels, all different files; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:05d}.jpg" for index in range(count)]
    missing = [index for index, path in enumerate(paths) if not path.is_file()]
    originals = [_jpeg(folder / f".original-{number}", size, number) for number in range(DISTINCT) if missing]
    for index in missing:
        comment = f"photo {index}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment  # JPEG's COM, behind its SOI
        original = originals[index % DISTINCT]
        paths[index].write_bytes(original[:2] + segment + original[2:])
    return paths


def _jpeg(path: Path, size: tuple[int, int], seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.float32)
    grain = generator.standard_normal(smooth.shape, dtype=np.float32) * GRAIN
    image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    image.save(path, "JPEG", quality=JPEG_QUALITY)
    content = path.read_bytes()
    path.unlink()
    return content
