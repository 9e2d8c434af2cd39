"""Draw the picture of pages in the README, as Chromium shows them: report and explorer of a run, and the site.

make docs
python docs/images/make_pages.py --run demo/logs/demo/dml/demo --site site
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1300, 1000  # px of a window
GAP, FRAME = 24, (208, 208, 208)
SHOWN = 2400  # px, of the picture


def photograph(page: Path, folder: Path) -> Image.Image:
    """Open a page in Chromium, once its scripts have run."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise FileNotFoundError("No chromium, chromium-browser or google-chrome is on the PATH.")
    picture = folder / f"{page.stem}.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
    window = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture}"]
    subprocess.run([chromium, *flags, *window, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    return Image.open(picture).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="run folder with report.html and explorer.html")
    parser.add_argument("--site", type=Path, required=True, help="folder of the site")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pages.png"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shown = (arguments.run / "report.html", arguments.run / "explorer.html", arguments.site / "index.html")
        pages = [photograph(page, Path(folder)) for page in shown]
    canvas = Image.new("RGB", (len(pages) * (WIDTH + GAP) + GAP, HEIGHT + 2 * GAP), FRAME)
    for place, page in enumerate(pages):
        canvas.paste(page, (GAP + place * (WIDTH + GAP), GAP))
    small = canvas.resize((SHOWN, round(SHOWN * canvas.height / canvas.width)), Image.Resampling.LANCZOS)
    small.quantize(128, dither=Image.Dither.NONE).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
