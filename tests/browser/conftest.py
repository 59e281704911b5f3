"""A browser that the system has, and the report of a small run in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.pipeline.loop import align
from csr_vlm.pipeline.stages import report as write_report
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run
from csr_vlm.world.demo import demo_config

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

POISON = '</title></script><script>window.owned = 1</script><img src=x onerror="window.owned = 1">'
FOLDER = "run <img src=x onerror=window.owned=1>"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("there is no chromium on this machine")
    # Its sandbox does not start as root, which is who runs in a container.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def run(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demonstration, one iteration of it, in a folder whose name is an attack; needless without a browser."""
    root = tmp_path_factory.mktemp("browser") / FOLDER
    config = demo_config(root, seed=0, num_prompts=21, num_scenes=60)
    made = Run.create(root, config.model_copy(update={"iterations": 1}))
    align(made, Silent())
    _poison(made)
    return made


def _poison(run: Run) -> None:
    """Let a prompt, its id, its sentences and the final descriptions be attacks, and let every kind of change occur."""
    pairs = list(tables.read_pairs(run.pairs_path(1)))
    victim = pairs[0].prompt.prompt_id
    prompt = Prompt(f"id {POISON}", f"/{POISON}.png", f"What is this? {POISON}")
    renamed = [replace(pair, prompt=prompt) if pair.prompt.prompt_id == victim else pair for pair in pairs]
    tables.write_pairs(run.pairs_path(1), renamed)
    for part in run.ledger_parts(1):
        nodes = [
            replace(node, prompt_id=prompt.prompt_id, text=f"{node.text} {POISON}")
            if node.prompt_id == victim
            else node
            for node in tables.read_nodes(part)
        ]
        tables.write_nodes(part, nodes)
    path = run.evaluation_path(1, "world")
    document = files.read_json(path)
    for row in document["rows"]:
        row["text"] += POISON
        row["sentences"] = [[f"{text} {POISON}", relevance] for text, relevance in row["sentences"]]
    wrong = next(row for row in document["rows"] if row["hallucinated"])
    clean = next(row for row in document["rows"] if not row["hallucinated"])
    wrong["hallucinated"], clean["hallucinated"] = [], ["fish"]
    files.write_json(path, document)


@pytest.fixture(scope="session")
def report(run: Run) -> Path:
    return write_report(run)


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report, just opened on a laptop; at the end nothing may have gone wrong in it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.set_default_timeout(90_000)  # a busy machine is slow, not broken
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda message: wrong.append(message.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
    )
    opened.goto(report.as_uri())
    yield opened
    assert wrong == []
    assert opened.evaluate("window.owned") is None
    context.close()
