"""Mutated pictures of every format that is read: each is refused by name, or read right, in little time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from sd3_lora.stage_one.images import BrokenImage, open_rgb

import numpy as np
import pytest
from conftest import PROJECT
from mutated_pictures import huge, pixels_of, seeds
from PIL import Image

PROGRAM = PROJECT / "tests" / "mutated_pictures.py"
MOST_SECONDS, MOST_BYTES = 10, 2 * 1024**3


def outcomes(folder: Path, seed: int, first: int, last: int) -> list[dict[str, Any]]:
    """Of mutated pictures, in a process of their own: a decoder that crashes or hangs ends that alone."""
    words = [sys.executable, PROGRAM, folder, seed, first, last]
    try:
        timeout = 60 + MOST_SECONDS + (last - first) / 20
        done = subprocess.run([*map(str, words)], check=False, capture_output=True, text=True, timeout=timeout)
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        code, out, err = 124, (error.stdout or b"").decode(), (error.stderr or b"").decode()
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0, f"ended with {code} at {lines[-1] if lines else None}:\n{err[-2000:]}"
    return [before | after for before, after in zip(lines[::2], lines[1::2], strict=True)]


def require_harmless(folder: Path, seed: int, first: int, last: int) -> None:
    whole = {}
    for kind, content in seeds().items():
        path = folder / f"whole.{kind}"
        path.write_bytes(content)
        whole[kind] = pixels_of(open_rgb(path))
    results = outcomes(folder, seed, first, last)
    assert len(results) == last - first
    faults = []
    for each in results:
        outcome, (mutation, _, kind) = each["outcome"], each["name"][6:].partition(".")
        is_read = each["pixels"] is not None
        if is_read and mutation == "cut" and each["pixels"] != whole[kind]:
            faults.append(f"{each['name']} ends early, and is read as another picture")
        if not is_read and (str(folder / each["name"]) not in outcome or "\n" in outcome):
            faults.append(f"{each['name']}: {outcome!r}")
        if each["seconds"] > MOST_SECONDS:
            faults.append(f"{each['name']} took {each['seconds']:.1f} s")
        if each["peak"] > MOST_BYTES:
            faults.append(f"{each['name']}, or one before it, took {each['peak'] / 2**30:.1f} GiB")
            break
    assert not faults, "\n".join(faults)
    read = sum(each["pixels"] is not None for each in results)
    assert 0 < read < len(results)


def test_mutated_pictures(tmp_path: Path) -> None:
    """Two of each kind and mutation."""
    require_harmless(tmp_path, 0, 0, 420)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_mutated_pictures(tmp_path: Path, part: int) -> None:
    require_harmless(tmp_path, 1 + part, 2500 * part, 2500 * (part + 1))


@pytest.mark.faults
def test_the_largest_pictures_that_are_read(tmp_path: Path) -> None:
    for name, content in huge():
        path = tmp_path / name
        path.write_bytes(content)
        done = subprocess.run([sys.executable, PROGRAM, path], check=True, capture_output=True, text=True)
        result = json.loads(done.stdout)
        path.unlink()
        assert result["outcome"].startswith("RGB "), result
        assert result["peak"] <= MOST_BYTES, (name, result)


@pytest.mark.parametrize(
    ("kind", "size", "reason"),
    [
        ("JPEG", (13000, 13000), "bytes are no picture of 13000 x 13000 pixels"),
        ("JPEG", (1000, 1000), "bytes are no picture of 1000 x 1000 pixels"),
        ("JPEG2000", (13000, 13000), "bytes are no picture of 13000 x 13000 pixels"),
        ("JPEG2000", (9500, 9500), "a JPEG2000 of 9500 x 9500 pixels takes more than 2 GiB to decode: save it as"),
        ("WEBP", (11600, 11600), "a WEBP of 11600 x 11600 pixels takes more than 2 GiB to decode: save it as"),
    ],
)
def test_a_size_is_looked_at_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, size: tuple[int, int], reason: str
) -> None:
    path, buffer = tmp_path / "lies", BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, kind)
    path.write_bytes(buffer.getvalue() + bytes(200_000 if "GiB" in reason else 0))
    opened = Image.open

    def open_as_large(*words: Any, **options: Any) -> Any:
        file = opened(*words, **options)
        file._size = size
        monkeypatch.setattr(file, "load", lambda: pytest.fail("it was decoded"))
        return file

    monkeypatch.setattr(Image, "open", open_as_large)
    with pytest.raises(BrokenImage, match=reason):
        open_rgb(path)


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16", "F"])
def test_strips_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 30, 4), dtype=np.uint8)
    deep = {"I;16": values[..., 0].astype(np.uint16) * 200, "F": values[..., 0].astype(np.float32) / 300}
    picture = Image.fromarray(deep[mode]) if mode in deep else Image.fromarray(values, "RGBA").convert(mode)
    path = tmp_path / f"a.{'tiff' if mode == 'F' else 'png'}"
    picture.save(path, **({} if mode == "F" else {"transparency": 7} if mode != "RGBA" else {}))
    whole = open_rgb(path)
    monkeypatch.setattr("sd3_lora.stage_one.images._STRIP_PIXELS", 7 * 30)
    assert open_rgb(path).tobytes() == whole.tobytes()
    assert len({*whole.get_flattened_data()}) > 50
