"""The report as a reader has it in front of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import FOLDER, POISON

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

PAIRS, BEFORE_AFTER = "#pictures", "#before-after"


def cards(page: Page, gallery: str) -> Locator:
    return page.locator(f"{gallery} .card:visible")


def numbers(page: Page, gallery: str, name: str) -> list[float]:
    """Read a number off each visible card, in the order shown."""
    script = "(found, name) => found.map(card => Number((card.querySelector(`[data-${name}]`) ?? card).dataset[name]))"
    return cards(page, gallery).evaluate_all(script, name)


def test_the_first_screen_says_what_came_out(page: Page) -> None:
    verdict = page.locator(".verdict")
    assert verdict.inner_text().startswith("After 1 iteration CHAIR")
    assert verdict.bounding_box()["y"] < 400
    assert page.locator(".tile").count() == 3
    assert page.locator(".tile").last.bounding_box()["y"] < 900


def test_what_models_and_files_say_stays_text(page: Page) -> None:
    """The fixture asserts that none of it ran; here, that it is there to be read."""
    assert page.locator("script").count() == 1
    assert page.locator("img[onerror]").count() == 0
    assert POISON in page.locator(f"{PAIRS} .question").first.inner_text()
    assert POISON in cards(page, BEFORE_AFTER).first.inner_text()
    assert POISON in page.locator(f"{PAIRS} .node title").first.text_content()
    assert FOLDER in page.locator("#provenance pre").first.inner_text()


def test_a_script_that_got_in_would_not_run(page: Page) -> None:
    """The negative control: the page's own policy refuses what escaping would have let through."""
    refused: list[str] = []
    other = page.context.new_page()
    other.on("console", lambda message: refused.append(message.text))
    other.goto(page.url)
    other.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')")
    other.wait_for_timeout(200)
    assert other.evaluate("window.owned") is None
    assert any("Content Security Policy" in line for line in refused)


def test_search_finds_words_and_says_how_many(page: Page) -> None:
    search, output = page.locator(f"{PAIRS} input"), page.locator(f"{PAIRS} output")
    total = page.locator(f"{PAIRS} .card").count()
    search.fill("What is THIS onerror")
    assert cards(page, PAIRS).count() == 1
    assert output.inner_text() == f"1 of {total}"
    search.fill("no such words")
    assert cards(page, PAIRS).count() == 0
    search.fill("")
    assert cards(page, PAIRS).count() == min(total, 12)


def test_more_cards_come_when_asked_for(page: Page) -> None:
    total = page.locator(f"{PAIRS} .card").count()
    assert total > 12
    page.locator(f"{PAIRS} .more").click()
    assert cards(page, PAIRS).count() == total
    assert not page.locator(f"{PAIRS} .more").is_visible()


def test_the_filter_shows_one_kind(page: Page) -> None:
    choice = page.locator(f"{BEFORE_AFTER} .filter")
    kinds = [kind for kind in choice.locator("option").all_inner_texts() if kind != "all"]
    assert kinds == ["improved", "worsened", "still hallucinating"]
    shown = 0
    for kind in kinds:
        choice.select_option(kind)
        found = cards(page, BEFORE_AFTER).evaluate_all("cards => cards.map(card => card.dataset.kind)")
        assert set(found) == {kind}
        shown += len(found)
    choice.select_option("")
    assert cards(page, BEFORE_AFTER).count() == shown


def test_sorting_orders_and_undoes(page: Page) -> None:
    page.locator(f"{PAIRS} .more").click()
    sort = page.locator(f"{PAIRS} .sort")
    order = numbers(page, PAIRS, "margin")
    sort.select_option("-margin")
    assert numbers(page, PAIRS, "margin") == sorted(order, reverse=True)
    sort.select_option("margin")
    assert numbers(page, PAIRS, "margin") == sorted(order)
    sort.select_option("")
    assert numbers(page, PAIRS, "margin") == order
    page.locator(f"{BEFORE_AFTER} .sort").select_option("-before")
    hallucinated = numbers(page, BEFORE_AFTER, "before")
    assert hallucinated == sorted(hallucinated, reverse=True)


def a_tree(page: Page, *nodes: str) -> Locator:
    """The first tree on the page that has such nodes."""
    found = page.locator(f"{PAIRS} .search-tree:visible")
    for node in nodes:
        found = found.filter(has=page.locator(node))
    return found.first


def test_a_tree_shows_what_its_nodes_say(page: Page) -> None:
    details = a_tree(page, ".node.worst", ".node.top")
    assert not details.locator(".tree").is_visible()
    details.locator("summary").click()
    says = details.locator(".says")
    assert "Point at a node" in says.inner_text()
    best = details.locator(".node.best").first
    best.hover()
    sentence, known = best.locator("title").text_content().split("\n")
    assert says.locator("b").inner_text() == sentence
    assert says.locator(".muted").inner_text() == known
    assert "on the best path" in known
    assert "R_I" in known


def test_a_tree_is_walked_with_the_keyboard(page: Page) -> None:
    details = a_tree(page, "[data-id='0.0']", "[data-id='1']")
    details.locator("summary").click()
    tree = details.locator(".tree")
    assert tree.locator("[tabindex='0']").count() == 1, "one stop on the way through the page"
    tree.locator("[data-id='0']").focus()

    def here() -> str:
        return page.evaluate("document.activeElement.dataset.id")

    page.keyboard.press("ArrowDown")
    assert here() == "0.0"
    first = tree.locator("[data-id='0'] title").text_content()
    assert details.locator(".says .before").inner_text() == first.split("\n")[0]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert here() == "1"
    page.keyboard.press("ArrowUp")
    assert here() == "1", "the root is no sentence"
    assert tree.locator("[tabindex='0']").count() == 1


def test_the_theme_is_the_readers_and_stays(page: Page) -> None:
    def colour() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    button = page.locator(".theme")
    light = colour()
    button.click()
    assert (button.inner_text(), colour()) == ("Theme: light", light)
    button.click()
    assert button.inner_text() == "Theme: dark"
    dark = colour()
    assert sum(map(int, dark[4:-1].split(","))) < 120 < 600 < sum(map(int, light[4:-1].split(",")))
    page.reload()
    assert colour() == dark
    page.emulate_media(media="print")
    assert colour() == "rgb(255, 255, 255)", "paper is white"
    page.emulate_media(media="screen")
    button.click()
    assert colour() == light
    page.emulate_media(color_scheme="dark")
    assert colour() == dark, "auto follows the system"


@pytest.mark.parametrize("width", [390, 768])
def test_nothing_is_wider_than_a_small_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for details in page.locator("details:visible > summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_is_used_without_a_mouse(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    takes_focus = page.locator("button, input, select, a, summary")
    nameless = "found => found.filter(each => !each.textContent.trim() && !each.labels?.length).length"
    assert takes_focus.evaluate_all(nameless) == 0, "everything that takes the focus has a name"


def test_without_scripts_everything_is_there(browser: Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert cards(page, PAIRS).count() == page.locator(f"{PAIRS} .card").count() > 12
    assert page.locator(".toolbar:visible, .theme:visible").count() == 0
    context.close()


def test_print_leaves_the_controls_out(page: Page) -> None:
    page.emulate_media(media="print")
    assert page.locator(".toolbar:visible, nav:visible, button:visible").count() == 0
    assert cards(page, PAIRS).count() == page.locator(f"{PAIRS} .card").count()
