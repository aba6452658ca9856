"""A picture of a report's first screen: `python scripts/picture.py report.html docs/images/report.png`.

Needs Chromium on the PATH and the package playwright.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

WINDOW = {"width": 1180, "height": 1130}


def main(page: str, picture: str) -> None:
    """Draw the page as a light window on a desktop."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        window = chromium.new_page(viewport=WINDOW, color_scheme="light")
        window.goto(Path(page).resolve().as_uri())
        window.screenshot(path=picture)
        chromium.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
