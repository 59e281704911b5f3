"""Draw the screenshots of the documentation from a real run: ``python -m docs.screenshots RUN``.

Needs Gradio, Playwright and Chromium: ``make screenshots`` runs it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from csr_vlm.playground.uploads import upload_folder

HERE = Path(__file__).parent


def main(root: str) -> None:
    """Write docs/try.png: a picture of the run about which the base model makes a claim that the scorer doubts."""
    uploads = upload_folder()
    from playwright.sync_api import sync_playwright

    from csr_vlm.playground.answering import Sampling
    from csr_vlm.playground.page import Page, serve
    from csr_vlm.playground.session import Playground
    from csr_vlm.store.run import Run

    playground = Playground([Run.open(root)])
    page = Page(playground, uploads, [playground.policies[0], playground.policies[-1]])
    number = 0
    for index, prompt in enumerate(page.pictures):
        *_, text = playground.answer("base model", prompt, Sampling())
        if any(mark.level == "doubted" for mark in playground.marks(prompt, text)):
            number = index
            break
    address = serve(page, max_upload_bytes=2**20)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        opened.goto(address.local)
        opened.locator("button.thumbnail-item").nth(number).click()
        opened.get_by_text("Picture of").wait_for()
        opened.get_by_role("button", name="Ask", exact=True).click()
        opened.locator(".answer:not(.running):not(.waiting)").nth(1).wait_for()
        opened.locator("button.claim.doubted").first.click()
        opened.locator(".asked").wait_for()
        opened.screenshot(path=HERE / "try.png", full_page=True)
        browser.close()
    address.blocks.close()


if __name__ == "__main__":
    main(sys.argv[1])
