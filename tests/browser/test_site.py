"""Test the documentation site in a browser, as `make docs` has built it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SITE = Path(__file__).parents[2] / "build" / "site"
PHONE = {"width": 390, "height": 844}

pytestmark = pytest.mark.skipif(not (SITE / "index.html").exists(), reason="build/site does not exist: make docs")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Leave out the line of each request."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serve the site on this machine: search needs a server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def site(browser: Browser, address: str) -> Iterator[Page]:
    """Open the front page; what fails to load, errors in scripts and other hosts are failures."""
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    # Going on to the next page ends what still loads.
    page.on("requestfailed", lambda asked: asked.failure == "net::ERR_ABORTED"
            or problems.append(f"failed: {asked.url}"))  # fmt: skip
    page.on("response", lambda answer: answer.status >= 400 and problems.append(f"{answer.status}: {answer.url}"))
    # The theme asks GitHub for the number of stars; without a network it shows none.
    page.route("https://api.github.com/**", lambda route: route.fulfill(status=200, json={}))
    page.on("request", lambda asked: asked.url.startswith((address, "data:", "https://api.github.com/"))
            or problems.append(f"another host: {asked.url}"))  # fmt: skip
    page.goto(address)
    yield page
    page.close()
    assert problems == []


def pages(page: Page) -> list[str]:
    """Return the addresses of all pages of the navigation."""
    links = page.locator(".md-nav--primary a.md-nav__link").evaluate_all("links => links.map(link => link.href)")
    return sorted({link.partition("#")[0] for link in links})


def test_every_page_opens_with_its_pictures_and_fits_a_phone(site: Page) -> None:
    found = pages(site)
    assert len(found) > 25
    site.set_viewport_size(PHONE)
    for link in found:
        site.goto(link)
        assert site.locator("article h1").count() == 1, link
        broken = "pictures => pictures.filter(picture => !picture.naturalWidth).map(picture => picture.src)"
        site.locator("article img").evaluate_all("pictures => Promise.all(pictures.map(picture => picture.decode()))")
        assert site.locator("article img").evaluate_all(broken) == [], link
        assert site.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], link


def test_search_finds_a_setting(site: Page) -> None:
    site.locator(".md-search__input").fill("repeat_penalty")
    first = site.locator(".md-search-result__item a").first
    first.wait_for()
    first.click()
    site.wait_for_url("**/configuration.html*")
    assert "method.reward.repeat_penalty" in site.locator("article").inner_text()


def test_the_front_page_leads_to_the_first_steps(site: Page) -> None:
    site.get_by_role("link", name="Quickstart").first.click()
    assert "csr demo" in site.locator("article").inner_text()
