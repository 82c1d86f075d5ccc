"""Photographs the top of a run's report: `docs/report.png`. Needs Chromium (Debian's package `chromium`) and Pillow.

    handloop report RUN --output page.html
    python -m benchmarks.report_page page.html --out docs/report.png

The picture in docs/ is of a run of `--profile demo` on the tiny bundled base, validated twice an epoch
(`--data.validation_path demo/held_out.jsonl --validate.every 0.5 --compare.num_questions 40`), on two CPU cores.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT = 1100, 1290  # of the page, in CSS pixels: its figures and the first curves
COLOURS = 64  # of charts and text on white; more are not seen, and cost half the bytes again
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photograph(options.page, Path(folder))
        picture = Image.open(Path(folder) / "page.png").convert("RGB")
    picture.quantize(COLOURS).save(options.out, optimize=True)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB")


def photograph(page: Path, folder: Path) -> None:
    """Writes folder/page.png, by a Chromium with a profile of its own; raises FileNotFoundError where there is none."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise FileNotFoundError(f"none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium")
    command = [browser, "--headless", "--hide-scrollbars", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={folder / 'page.png'}"]
    if os.geteuid() == 0:  # as in a container; Chromium's sandbox refuses root, and the page is our own
        command.append("--no-sandbox")
    subprocess.run([*command, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()
