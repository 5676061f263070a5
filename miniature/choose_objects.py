"""Chooses the small world's objects: `objects.json`, and the renders of the held-out ones in `subjects/`.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
    python miniature/choose_objects.py --renders FOLDER_OF_WEBP --names data-by-emoji.json

Of objects that look alike at the size of a scene (a dozen clock faces, say) only the first is kept: nobody, and no
judge, could tell them apart in a picture of 128 pixels.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

MINIATURE = Path(__file__).resolve().parent
GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# DreamBooth's subjects, never seen in pretraining; and with each the objects too much like it to be seen instead.
HELD_OUT = {
    "robot": (),
    "teapot": (),
    "fox": (),
    "owl": (),
    "turtle": (),
    "octopus": (),
    "penguin": (),
    "unicorn": (),
    "koala": (),
    "lady beetle": (),
    "cactus": (),
    "mushroom": (),
    "cupcake": (),
    "pineapple": (),
    "hamburger": (),
    "avocado": (),
    "rocket": (),
    "tractor": (),
    "sailboat": (),
    "castle": (),
    "guitar": (),
    "camera": ("camera with flash",),
    "backpack": (),
    "trophy": (),
    "snowman": ("snowman without snow",),
    "teddy bear": (),
    "alarm clock": (),
    "jack o lantern": (),
}
MOST_WORDS = 4  # of a name: captions of two objects are to fit the shorter texts that training begins with
ALIKE = 0.1  # root mean square over 32×32 pixels of colour on grey, in [0, 1]
SUBJECT_PX = 160


def clean_name(name: str) -> str:
    """Lower-case words of ASCII letters and digits."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", " ", re.sub(r"['.]", "", ascii_name)).strip()


def thumbnail(path: Path) -> np.ndarray:
    """The render on grey, `(32 * 32 * 3,)` in [0, 1]."""
    with Image.open(path) as opened:
        pixels = np.asarray(opened.convert("RGBA").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    return (colour * alpha + 0.5 * (1 - alpha)).ravel()


def choose(renders: Path, emoji: dict[str, dict[str, str]]) -> list[dict[str, object]]:
    """Name, file and whether held out, of every object that looks like no earlier one."""
    rows = []
    for characters, facts in emoji.items():
        code = "-".join(f"{ord(character):x}" for character in characters)
        name = clean_name(facts["name"])
        fits = facts["group"] in GROUPS and len(name.split()) <= MOST_WORDS
        if fits and (renders / f"{code}.webp").is_file():
            rows.append((name, code))
    rows.sort(key=lambda row: row[0] not in HELD_OUT)  # a subject is never the one that is dropped
    left_out = {name for names in HELD_OUT.values() for name in names}
    chosen: list[dict[str, object]] = []
    seen: list[np.ndarray] = []
    for name, code in rows:
        look = thumbnail(renders / f"{code}.webp")
        alike = any(np.sqrt(np.mean((look - other) ** 2)) < ALIKE for other in seen)
        if alike or name in left_out or any(row["name"] == name for row in chosen):
            continue
        seen.append(look)
        chosen.append({"name": name, "render": code, "held_out": name in HELD_OUT})
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--renders", type=Path, required=True, help="The npm package's folder of webp files.")
    parser.add_argument("--names", type=Path, required=True, help="data-by-emoji.json of unicode-emoji-json.")
    flags = parser.parse_args(argv)
    objects = choose(flags.renders, json.loads(flags.names.read_text(encoding="utf-8")))
    lines = ",\n".join(f" {json.dumps(row)}" for row in objects)
    (MINIATURE / "objects.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (MINIATURE / "subjects").mkdir(exist_ok=True)
    held_out = [row for row in objects if row["held_out"]]
    for row in held_out:
        with Image.open(flags.renders / f"{row['render']}.webp") as render:
            small = render.convert("RGBA").resize((SUBJECT_PX, SUBJECT_PX), Image.Resampling.LANCZOS)
        small.save(MINIATURE / "subjects" / f"{row['name'].replace(' ', '_')}.webp", lossless=False, quality=90)
    print(f"{len(objects)} objects, {len(held_out)} of them held out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
