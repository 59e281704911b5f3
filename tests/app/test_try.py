"""Test csr try in a real browser: what a person sees, and what the server refuses."""

from __future__ import annotations

import gzip
import json
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from csr_vlm.store.run import Run
from tests.app.conftest import MAX_UPLOAD

if TYPE_CHECKING:
    from playwright.sync_api import Page

MARKUP = "<img src=x onerror='window.owned = 1'>"


def ask(page: Page, picture: str) -> None:
    page.locator("input[type=file]").first.set_input_files(picture)
    page.get_by_text("Your picture, 72 x 72 pixels").wait_for()
    page.get_by_role("button", name="Ask", exact=True).click()


def opened_or_refused(request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        return error


def picture_of(run: Run) -> str:
    return next(run.prompts()).image


@pytest.mark.parametrize("opened", [(1280, "light"), (400, "dark")], ids=["wide, light", "narrow, dark"], indirect=True)
def test_policies_answer_side_by_side_and_a_claim_is_asked_by_a_click(opened: Page, runs: list[Run]) -> None:
    ask(opened, picture_of(runs[0]))
    opened.locator(".answer:not(.running):not(.waiting)").nth(1).wait_for()
    headings = opened.locator(".answer h3").all_inner_texts()
    assert headings == ["base model", "first <b>run: iteration 1"]
    claim = opened.locator("button.claim").first
    assert "nats" in (claim.get_attribute("title") or "")
    assert claim.evaluate("node => getComputedStyle(node).backgroundColor") != "rgba(0, 0, 0, 0)"
    thing = claim.get_attribute("data-claim")
    claim.click()
    rows = opened.locator(".asked tbody tr")
    rows.first.wait_for()
    assert rows.first.locator("th").inner_text() == f"Is there a {thing} in this picture?"
    assert rows.first.locator("td").count() == 2
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]


def test_a_picture_of_the_run_is_chosen_by_a_click(opened: Page, served: tuple[Any, Any]) -> None:
    opened.locator("button.thumbnail-item, .thumbnail-lg, .grid-container button").nth(1).click()
    opened.get_by_text(f"Picture of {served[0].pictures[1].prompt_id}").wait_for()
    opened.get_by_role("button", name="Ask", exact=True).click()
    opened.locator(".answer .claim").first.wait_for()


def test_mistakes_are_shown_and_text_stays_text(opened: Page, runs: list[Run], tmp_path: Path) -> None:
    opened.get_by_role("button", name="Ask", exact=True).click()
    opened.get_by_text("there is no picture").wait_for()
    fake = tmp_path / "fake.png"
    fake.write_text("no picture")
    opened.locator("input[type=file]").first.set_input_files(fake)
    opened.get_by_text("Error").first.wait_for()
    opened.reload()
    opened.locator("input[type=file]").first.set_input_files(picture_of(runs[0]))
    opened.get_by_text("Your picture").wait_for()
    thing = opened.get_by_label("Thing")
    thing.fill(MARKUP)
    thing.press("Enter")
    opened.locator(".asked").wait_for()
    assert MARKUP in opened.locator(".asked tbody th").inner_text()
    assert opened.locator(".asked img").count() == 0


def test_stop_ends_an_answer(opened: Page, served: tuple[Any, Any], runs: list[Run], monkeypatch: Any) -> None:
    playground = served[0].playground

    def endless(*_: object) -> Any:
        while True:
            yield "There is a boat."

    monkeypatch.setattr(playground, "answer", endless)
    ask(opened, picture_of(runs[0]))
    opened.locator(".answer.running").first.wait_for()
    opened.get_by_role("button", name="Stop").click()
    opened.locator(".answer footer", has_text="words").nth(1).wait_for()


def test_no_other_file_can_be_read(served: tuple[Any, Any], runs: list[Run], tmp_path: Path) -> None:
    import gradio as gr

    page, address = served
    config = runs[0].root / "config.yaml"
    for path in ("/etc/passwd", str(config), f"{page.uploads}/../../etc/passwd", "pyproject.toml", "http://127.0.0.1/"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address.local}gradio_api/file={urllib.parse.quote(path)}")
        with pytest.raises(gr.Error):
            page.uploaded(path)
    link = page.uploads / "link.png"
    link.symlink_to(picture_of(runs[0]))
    with pytest.raises(gr.Error):
        page.uploaded(str(link))
    assert page.uploads.stat().st_mode & 0o077 == 0


def test_an_upload_has_a_bounded_size_and_the_server_is_local(served: tuple[Any, Any]) -> None:
    _, address = served
    assert address.local.startswith("http://127.0.0.1:")
    assert (address.public, address.password) == (None, None)
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
    for size, status in ((MAX_UPLOAD // 2, 200), (2 * MAX_UPLOAD, 413)):
        request = urllib.request.Request(
            f"{address.local}gradio_api/upload",
            data=body % (b"0" * size),
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )
        with opened_or_refused(request) as answer:
            assert answer.status == status


def upload(address: Any, name: str, content: bytes) -> str:
    """Upload a file as the page does; return where the server keeps it."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    request = urllib.request.Request(
        f"{address.local}gradio_api/upload",
        data=head + content + b"\r\n--x--\r\n",
        headers={"Content-Type": "multipart/form-data; boundary=x"},
    )
    with urllib.request.urlopen(request) as answer:
        (path,) = json.loads(answer.read())
    return str(path)


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://example.org"}, {"Origin": "null"}, {"Host": "example.org"}, {"Host": "example.org:80"}],
    ids=["another site", "a file or a frame", "a name that points here", "the same with a port"],
)
@pytest.mark.parametrize("place", ["", "config", "gradio_api/info", "gradio_api/upload", "gradio_api/queue/join"])
def test_requests_of_other_sites_are_refused(served: tuple[Any, Any], headers: dict[str, str], place: str) -> None:
    body = b"{}" if place.endswith(("upload", "join")) else None
    request = urllib.request.Request(f"{served[1].local}{place}", data=body, headers=headers)
    with opened_or_refused(request) as answer:
        assert answer.status == 403
    with opened_or_refused(urllib.request.Request(f"{served[1].local}config")) as answer:
        assert answer.status == 200, "the page itself is served"


def test_uploads_that_are_no_pictures_or_bombs_are_refused(served: tuple[Any, Any]) -> None:
    import gradio as gr

    page, address = served
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>window.owned = 1</script></svg>"
    zeros = gzip.compress(bytes(50_000_000))
    header = struct.pack(">II5B", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk
    for name, content in (("a.svg", script), ("a.png", script), ("a.gz", zeros), ("a.png", zeros), ("b.png", bomb)):
        path = upload(address, name, content)
        started = time.process_time()
        with pytest.raises(gr.Error, match="cannot be used"):
            page.uploaded(path)
        assert time.process_time() - started < 1
    with opened_or_refused(
        urllib.request.Request(f"{address.local}gradio_api/file={upload(address, 'a.svg', script)}")
    ) as answer:
        disposition = answer.headers.get("Content-Disposition", "")
        assert answer.status != 200 or disposition.startswith("attachment"), "it is not shown, so its script never runs"
