"""Mutated pictures of every format that is read, made by rule, and decoded one after another in a process of its own.

    python tests/mutated_pictures.py FOLDER SEED FIRST LAST

prints one JSON line before each picture and one after it, so that whoever reads them knows at which one it ended. With
the name of a file instead, it decodes that file.
"""

from __future__ import annotations

import io
import json
import random
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.stage_one.images import BrokenImage, open_rgb

import numpy as np
from PIL import Image

SIZE = (48, 40)
LIES = (0, 1, 0x7F, 0xFF, 0x3FFF, 0x4000, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
# Sides, of which two are as much as Pillow reads (twice `Image.MAX_IMAGE_PIXELS`), and a little more.
SIDES = (1, 13000, 13376, 13377, 16383, 32767, 65535)


def _picture(mode: str) -> Image.Image:
    generator = np.random.default_rng(7)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 4), dtype=np.uint8), "RGBA")
    picture = coarse.resize(SIZE, Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.float32) / 255)
    return picture.convert(mode)


def _saved(kind: str, mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    _picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    return exif


@cache
def seeds() -> dict[str, bytes]:
    """A whole file of each kind, by its name."""
    frames = [_picture("RGB").rotate(90 * i) for i in range(3)]
    made = {
        "png": _saved("PNG", "RGB"),
        "png-alpha": _saved("PNG", "RGBA"),
        "png-palette": _saved("PNG", "P", transparency=3),
        "png-16": _saved("PNG", "I;16"),
        "png-1": _saved("PNG", "1"),
        "jpeg": _saved("JPEG", "RGB", exif=_exif()),
        "jpeg-progressive": _saved("JPEG", "RGB", progressive=True),
        "jpeg-cmyk": _saved("JPEG", "CMYK"),
        "mpo": _saved("MPO", "RGB", save_all=True, append_images=frames),
        "webp": _saved("WEBP", "RGB"),
        "webp-lossless": _saved("WEBP", "RGBA", lossless=True),
        "webp-animated": _saved("WEBP", "RGB", save_all=True, append_images=frames),
        "gif": _saved("GIF", "P"),
        "gif-animated": _saved("GIF", "P", save_all=True, append_images=frames),
        "bmp": _saved("BMP", "RGB"),
        "bmp-palette": _saved("BMP", "P"),
        "dib": _saved("DIB", "RGB"),
        "jp2": _saved("JPEG2000", "RGB"),
        "j2k": _saved("JPEG2000", "RGBA", no_jp2=True),
        "ppm": _saved("PPM", "RGB"),
        "pgm": _saved("PPM", "L"),
        "ico": _saved("ICO", "RGBA", sizes=[(32, 32), (16, 16)]),
        "qoi": _saved("QOI", "RGBA"),
        "tga": _saved("TGA", "RGB"),
        "tga-rle": _saved("TGA", "RGBA", compression="tga_rle"),
        "tiff": _saved("TIFF", "RGB"),
        "tiff-16": _saved("TIFF", "I;16"),
        "tiff-float": _saved("TIFF", "F"),
    }
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        made[f"tiff-{compression}"] = _saved("TIFF", "RGB", compression=compression)
    made["tiff-group4"] = _saved("TIFF", "1", compression="group4")
    if "AVIF" in Image.SAVE:
        made["avif"] = _saved("AVIF", "RGBA")
    try:
        import pillow_heif

        buffer = io.BytesIO()
        pillow_heif.from_pillow(_picture("RGB")).save(buffer)
        made["heic"] = buffer.getvalue()
    except ImportError:
        pass
    return made


def flip_bits(content: bytes, draw: random.Random) -> bytes:
    """A few bits, anywhere or in the header."""
    changed = bytearray(content)
    reach = len(changed) if draw.random() < 0.5 else min(len(changed), 128)
    for _ in range(draw.choice((1, 1, 2, 4, 16, 64))):
        changed[draw.randrange(reach)] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    """The file ends early."""
    return content[: draw.randrange(len(content))]


def lie(content: bytes, draw: random.Random) -> bytes:
    """Numbers that look like sizes, counts or offsets are others; PNG's checksums are made to fit."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        width, order = draw.choice((1, 2, 2, 4, 4)), draw.choice("<>")
        value = draw.choice((*LIES, *SIDES)) & ((1 << 8 * width) - 1)
        place = draw.randrange(min(len(changed) - width, draw.choice((40, 200, len(changed)))))
        changed[place : place + width] = value.to_bytes(width, "little" if order == "<" else "big")
    return _fitted(bytes(changed))


def large(content: bytes, draw: random.Random) -> bytes:
    """Width and height, wherever they stand in the header, are those of a huge picture."""
    sides = [side for side in SIDES if side > 1]
    width, height = draw.choice(sides), draw.choice(sides)
    for form in (">I", "<I", ">H", "<H"):
        limit = (1 << 8 * struct.calcsize(form)) - 1
        for i, old in enumerate(SIZE):
            new = struct.pack(form, min((width, height)[i], limit))
            head = content[:2000].replace(struct.pack(form, old), new)
            content = head + content[2000:]
    return _fitted(content.replace(b"48 40", f"{width} {height}".encode(), 1))


def splice(content: bytes, draw: random.Random) -> bytes:
    """The head of one file before the rest of another."""
    other = draw.choice(sorted(seeds().items()))[1]
    return content[: draw.randrange(1, min(200, len(content)))] + other[draw.randrange(min(200, len(other))) :]


def repeat(content: bytes, draw: random.Random) -> bytes:
    """A piece comes again, or is left out."""
    begin = draw.randrange(len(content))
    end = min(len(content), begin + draw.choice((1, 4, 16, 200)))
    return content[:begin] + content[begin:end] * draw.choice((0, 2, 3, 500)) + content[end:]


def _fitted(content: bytes) -> bytes:
    """A PNG's checksums as its chunks want them; other files as they are."""
    if not content.startswith(b"\x89PNG"):
        return content
    parts, place = [content[:8]], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        body = content[place + 4 : place + 8 + length]
        if len(body) < 4 + length:
            break
        parts.append(content[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + length
    return b"".join(parts) + content[place:]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    mutation.__name__: mutation for mutation in (flip_bits, cut, lie, large, splice, repeat)
}


def mutated(seed: int, number: int) -> tuple[str, bytes]:
    """The name and content of a mutated file; the same numbers give the same file.

    Kinds and mutations take turns, so that few files hold all of them.
    """
    kinds, names = sorted(seeds()), sorted(MUTATIONS)
    kind, mutation = kinds[number % len(kinds)], names[number // len(kinds) % len(names)]
    draw = random.Random(f"{seed} {number}")
    return f"{number:05d}-{mutation}.{kind}", MUTATIONS[mutation](seeds()[kind], draw)


def pixels_of(picture: Image.Image) -> int:
    """A checksum; 0 for a picture that is too large to copy."""
    return zlib.crc32(picture.tobytes()) if picture.width * picture.height < 10**7 else 0


def peak_bytes() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # getrusage's is at least what the parent had when it started this process.
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def huge() -> Iterator[tuple[str, bytes]]:
    """Whole files of as many pixels as are read, of one colour, in the modes that take most memory."""
    sides = {"jpeg2000": 8700, "webp": 10900}
    for kind, mode, options in (
        ("png", "RGBA", {"compress_level": 1}),
        ("png", "I;16", {"compress_level": 1}),
        ("tiff", "F", {"compression": "tiff_adobe_deflate"}),
        ("gif", "P", {"transparency": 0}),
        ("bmp", "1", {}),
        ("jpeg", "CMYK", {}),
        ("jpeg", "RGB", {"exif": _exif()}),
        ("webp", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
        ("jpeg2000", "RGBA", {"num_resolutions": 2}),
    ):
        side = sides.get(kind, 13376)
        color = (0,) if mode in ("I;16", "F", "P", "1") else (200, 100, 50, 128)[: len(mode)]
        buffer = io.BytesIO()
        Image.new(mode, (side, side), color if len(color) > 1 else color[0]).save(buffer, kind, **options)
        yield f"{mode.replace(';', '')}.{kind}", buffer.getvalue()


def decode(path: Path) -> dict[str, object]:
    """As stage one does; what came of it."""
    started = time.perf_counter()
    try:
        picture = open_rgb(path)
        outcome, pixels = f"{picture.mode} {picture.width} {picture.height}", pixels_of(picture)
    except BrokenImage as error:
        outcome, pixels = str(error), None
    seconds = time.perf_counter() - started
    return {"outcome": outcome, "pixels": pixels, "seconds": seconds, "peak": peak_bytes()}


def main(folder: Path, seed: int, first: int, last: int) -> None:
    """Decodes them one after another."""
    for number in range(first, last):
        name, content = mutated(seed, number)
        path = folder / name
        path.write_bytes(content)
        print(json.dumps({"name": name}), flush=True)
        print(json.dumps(decode(path)), flush=True)
        path.unlink()


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(decode(Path(sys.argv[1]))))
    else:
        main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
