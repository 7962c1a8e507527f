"""Put contact sheets of quality.py under each other, each with a title.

    python scripts/demo_model/contact_sheet.py "50 steps=sheet-1.png" "4x=sheet-2.png" -o docs/images/contact-sheet.png
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TITLE = 34


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sheets", nargs="+", metavar="TITLE=PNG")
    parser.add_argument("--output", "-o", type=Path, required=True)
    args = parser.parse_args()

    titles, paths = zip(*(sheet.rsplit("=", 1) for sheet in args.sheets), strict=True)
    sheets = [Image.open(path).convert("RGB") for path in paths]
    page = Image.new("RGB", (max(s.width for s in sheets), sum(s.height + TITLE for s in sheets)), "white")
    draw, top = ImageDraw.Draw(page), 0
    for title, sheet in zip(titles, sheets, strict=True):
        draw.text((4, top + 6), title, fill="black", font=ImageFont.load_default(20))
        page.paste(sheet, (0, top + TITLE))
        top += TITLE + sheet.height
    args.output.parent.mkdir(parents=True, exist_ok=True)
    # A palette is enough for such pictures and keeps the file small.
    page.quantize(256, dither=Image.Dither.NONE).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
