"""Test the report in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import FOLDER, MARKUP

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

PAIRS, BEFORE_AFTER = "#gallery", "#before-after"


def cards(page: Page, gallery: str) -> Locator:
    return page.locator(f"{gallery} .card:visible")


def numbers(page: Page, gallery: str, name: str) -> list[float]:
    """Read a number from each visible card, in the order shown."""
    script = "(cards, name) => cards.map(card => Number((card.querySelector(`[data-${name}]`) ?? card).dataset[name]))"
    return cards(page, gallery).evaluate_all(script, name)


def test_the_first_screen_shows_the_conclusion(page: Page) -> None:
    conclusion = page.locator(".conclusion")
    assert conclusion.inner_text().startswith("After 1 iteration, CHAIR")
    assert conclusion.bounding_box()["y"] < 400
    assert page.locator(".tile").count() == 3
    assert page.locator(".tile").last.bounding_box()["y"] < 900


def test_untrusted_text_is_shown_as_text(page: Page) -> None:
    """Check that markup is readable; the fixture checks that none of it ran."""
    assert page.locator("script").count() == 1
    assert page.locator("img[onerror]").count() == 0
    assert MARKUP in page.locator(f"{PAIRS} .question").first.inner_text()
    assert MARKUP in cards(page, BEFORE_AFTER).first.inner_text()
    assert MARKUP in page.locator(f"{PAIRS} .node title").first.text_content()
    assert FOLDER in page.locator("#provenance pre").first.inner_text()


def test_the_content_security_policy_blocks_injected_scripts(page: Page) -> None:
    """Insert an event handler, as if escaping had failed."""
    refused: list[str] = []
    other = page.context.new_page()
    other.on("console", lambda message: refused.append(message.text))
    other.goto(page.url)
    other.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.owned = 1\">')")
    other.wait_for_timeout(200)
    assert other.evaluate("window.owned") is None
    assert any("Content Security Policy" in line for line in refused)


def test_search_finds_words_and_counts_matches(page: Page) -> None:
    search, output = page.locator(f"{PAIRS} input"), page.locator(f"{PAIRS} output")
    total = page.locator(f"{PAIRS} .card").count()
    search.fill("What is THIS onerror")
    assert cards(page, PAIRS).count() == 1
    assert output.inner_text() == f"1 of {total}"
    search.fill("no such words")
    assert cards(page, PAIRS).count() == 0
    search.fill("")
    assert cards(page, PAIRS).count() == min(total, 12)


def test_the_button_shows_all_cards(page: Page) -> None:
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
        kinds_shown = cards(page, BEFORE_AFTER).evaluate_all("cards => cards.map(card => card.dataset.kind)")
        assert set(kinds_shown) == {kind}
        shown += len(kinds_shown)
    choice.select_option("")
    assert cards(page, BEFORE_AFTER).count() == shown


def test_sorting_can_be_undone(page: Page) -> None:
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


def tree_with(page: Page, *nodes: str) -> Locator:
    """Return the first tree on the page that has all of these nodes."""
    trees = page.locator(f"{PAIRS} .search-tree:visible")
    for node in nodes:
        trees = trees.filter(has=page.locator(node))
    return trees.first


def test_pointing_at_a_node_shows_its_sentence(page: Page) -> None:
    details = tree_with(page, ".node.worst", ".node.top")
    assert not details.locator(".tree").is_visible()
    details.locator("summary").click()
    node_details = details.locator(".node-details")
    assert "Point at a node" in node_details.inner_text()
    best = details.locator(".node.best").first
    best.hover()
    sentence, facts = best.locator("title").text_content().split("\n")
    assert node_details.locator("b").inner_text() == sentence
    assert node_details.locator(".muted").inner_text() == facts
    assert "on the best path" in facts
    assert "R_I" in facts


def test_arrow_keys_move_through_a_tree(page: Page) -> None:
    details = tree_with(page, "[data-id='0.0']", "[data-id='1']")
    details.locator("summary").click()
    tree = details.locator(".tree")
    assert tree.locator("[tabindex='0']").count() == 1, "one tab stop per tree"
    tree.locator("[data-id='0']").focus()

    def focused() -> str:
        return page.evaluate("document.activeElement.dataset.id")

    page.keyboard.press("ArrowDown")
    assert focused() == "0.0"
    first = tree.locator("[data-id='0'] title").text_content()
    assert details.locator(".node-details .context").inner_text() == first.split("\n")[0]
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert focused() == "1"
    page.keyboard.press("ArrowUp")
    assert focused() == "1", "the root is not a sentence"
    assert tree.locator("[tabindex='0']").count() == 1


def test_the_theme_can_be_switched_and_is_stored(page: Page) -> None:
    def color() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    button = page.locator(".theme")
    light = color()
    button.click()
    assert (button.inner_text(), color()) == ("Theme: light", light)
    button.click()
    assert button.inner_text() == "Theme: dark"
    dark = color()
    assert sum(map(int, dark[4:-1].split(","))) < 120 < 600 < sum(map(int, light[4:-1].split(",")))
    page.reload()
    assert color() == dark
    page.emulate_media(media="print")
    assert color() == "rgb(255, 255, 255)", "printed pages are white"
    page.emulate_media(media="screen")
    button.click()
    assert color() == light
    page.emulate_media(color_scheme="dark")
    assert color() == dark, "auto follows the system"


@pytest.mark.parametrize("width", [390, 768])
def test_nothing_is_wider_than_a_small_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    for details in page.locator("details:visible > summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_works_with_the_keyboard(page: Page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    focusable = page.locator("button, input, select, a, summary")
    unnamed = "elements => elements.filter(each => !each.textContent.trim() && !each.labels?.length).length"
    assert focusable.evaluate_all(unnamed) == 0, "every focusable element has a name"


def test_without_scripts_everything_is_shown(browser: Browser, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert cards(page, PAIRS).count() == page.locator(f"{PAIRS} .card").count() > 12
    assert page.locator(".toolbar:visible, .theme:visible").count() == 0
    context.close()


def test_controls_are_not_printed(page: Page) -> None:
    page.emulate_media(media="print")
    assert page.locator(".toolbar:visible, nav:visible, button:visible").count() == 0
    assert cards(page, PAIRS).count() == page.locator(f"{PAIRS} .card").count()
