"""Provide the report of a small run, opened in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from csr_vlm.config.load import resolve
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Prompt
from csr_vlm.pipeline.loop import align
from csr_vlm.pipeline.stages import report as write_report
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run
from csr_vlm.world.demo import demo_settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MARKUP = '</title></script><script>window.owned = 1</script><img src=x onerror="window.owned = 1">'
FOLDER = "run <img src=x onerror=window.owned=1>"


@pytest.fixture(scope="session")
def run(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run one iteration of the demo in a folder whose name contains markup; skipped without a browser."""
    root = tmp_path_factory.mktemp("browser") / FOLDER
    settings = demo_settings(root, seed=0, num_prompts=21, num_scenes=60)
    run = Run.create(root, resolve(settings | {"preset": "sentences", "iterations": 1}))
    align(run, Silent())
    _insert_markup(run)
    return run


def _insert_markup(run: Run) -> None:
    """Put markup into a prompt, its id, its sentences and the final descriptions, and add every kind of change."""
    pairs = list(tables.read_pairs(run.pairs_path(1)))
    victim_id = pairs[0].prompt.prompt_id
    prompt = Prompt(f"id {MARKUP}", f"/{MARKUP}.png", f"What is this? {MARKUP}")
    renamed = [replace(pair, prompt=prompt) if pair.prompt.prompt_id == victim_id else pair for pair in pairs]
    tables.write_pairs(run.pairs_path(1), renamed)
    for part in run.ledger_parts(1):
        nodes = [
            replace(node, prompt_id=prompt.prompt_id, text=f"{node.text} {MARKUP}")
            if node.prompt_id == victim_id
            else node
            for node in tables.read_nodes(part)
        ]
        tables.write_nodes(part, nodes)
    path = run.evaluation_path(1, "world")
    document = files.read_checksummed(path)
    for row in document["rows"]:
        row["text"] += MARKUP
        row["sentences"] = [[f"{text} {MARKUP}", relevance] for text, relevance in row["sentences"]]
    hallucinating = next(row for row in document["rows"] if row["hallucinated"])
    clean = next(row for row in document["rows"] if not row["hallucinated"])
    hallucinating["hallucinated"], clean["hallucinated"] = [], ["fish"]
    files.write_checksummed(path, document)
    for stage in ("generate", "pairs"):  # the files were changed on purpose: no checksums, as in version 0.1
        marker = run.iteration(1) / "done" / f"{stage}.json"
        result = files.read_json(marker)
        files.write_json(marker, {key: value for key, value in result.items() if key not in ("files", "digest")})


@pytest.fixture(scope="session")
def report(run: Run) -> Path:
    return write_report(run)


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """Open the report in a laptop-sized window; fail on any error or request at the end of the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    context.set_default_timeout(90_000)  # a busy machine may be slow
    opened = context.new_page()
    errors: list[str] = []
    opened.on("console", lambda message: errors.append(message.text))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else errors.append(request.url)
    )
    opened.goto(report.as_uri())
    yield opened
    assert errors == []
    assert opened.evaluate("window.owned") is None
    context.close()
