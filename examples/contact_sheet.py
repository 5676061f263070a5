"""One PNG that shows folders of pictures at a glance: a row for each folder, a caption under each picture.

    python examples/contact_sheet.py --row "Photos" dog --row "Drawn" images --output_path contact_sheet.png

A picture's caption is the prompt that inference.py wrote into it, else its file name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3_lora.drawing.contact_sheet import draw_sheet, load_row


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--row",
        nargs=2,
        action="append",
        required=True,
        metavar=("HEADING", "FOLDER"),
        help="One line of the sheet; may be repeated.",
    )
    parser.add_argument("--title", default="", help="Above all rows.")
    parser.add_argument("--picture_height", type=int, default=176, help="Of each picture, in pixels.")
    parser.add_argument("--most", type=int, default=6, help="Pictures in a row.")
    parser.add_argument("--output_path", default="contact_sheet.png", help="The PNG to write.")
    flags = parser.parse_args(argv)
    try:
        rows = [load_row(heading, Path(folder), flags.picture_height, flags.most) for heading, folder in flags.row]
        draw_sheet(flags.title, rows).save(flags.output_path)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {flags.output_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
