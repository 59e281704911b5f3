"""Serve the page of csr try on a small run; everything here is skipped where Gradio is not installed.

``make test-app`` has an environment with the experiment trackers too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from csr_vlm.store.run import Run
from tests.integration.conftest import short_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

__all__ = ["short_run"]

MAX_UPLOAD = 200_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if util.find_spec("gradio") is None:
        skip = pytest.mark.skip(reason="Gradio is not installed: pip install 'csr-vlm[app]'")
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def runs(short_run: Run, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Return two runs of one base model."""
    root = tmp_path_factory.mktemp("try")
    return [Run.open(shutil.copytree(short_run.root, root / name)) for name in ("first <b>run", "second")]


@pytest.fixture(scope="session")
def served(runs: list[Run]) -> Iterator[tuple[Any, Any]]:
    """Serve the page of both runs; yield the page and its address."""
    from csr_vlm.playground.uploads import upload_folder

    uploads = upload_folder()
    from csr_vlm.playground.page import Page, serve
    from csr_vlm.playground.session import Playground

    playground = Playground(runs)
    page = Page(playground, uploads, playground.policies[:2])
    address = serve(page, max_upload_bytes=MAX_UPLOAD)
    yield page, address
    address.blocks.close()


@pytest.fixture
def opened(browser: Browser, served: tuple[Any, Any], request: pytest.FixtureRequest) -> Iterator[Page]:
    """Open the page; fail on any script error and on any request to another server at the end of the test."""
    width, scheme = getattr(request, "param", (1280, "light"))
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(60_000)
    page = context.new_page()
    errors: list[str] = []
    address = served[1].local
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((address, "data:", "blob:")) else errors.append(request.url),
    )
    page.goto(address)
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    yield page
    assert errors == []
    assert page.evaluate("window.owned") is None
    context.close()
