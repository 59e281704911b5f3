"""Test the HTML report on small synthetic runs; no model is loaded."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from PIL import Image

from csr_vlm.config.load import resolve
from csr_vlm.core.formatting import compact, duration, fixed, indexed, relative_change, signed
from csr_vlm.core.records import Finish, Node, NodeStatus, Pair, Prompt, Response
from csr_vlm.core.secrets import without_secrets
from csr_vlm.evaluation.statistics import tango
from csr_vlm.method.audit import PAIR_BOUNDS, RESPONSE_BOUNDS
from csr_vlm.pipeline.stages import report as write_report
from csr_vlm.report.annotate import AnnotatedSentence, ColorScale, mark_absent
from csr_vlm.report.audit_panel import LABELS
from csr_vlm.report.before_after import (
    CLEAN,
    IMPROVED,
    STILL_HALLUCINATING,
    WORSENED,
    before_after,
    hallucination_change,
)
from csr_vlm.report.charts import Axes, Point, Series, chart, nice_ticks, smoothed
from csr_vlm.report.conclusion import Conclusion, conclude
from csr_vlm.report.evaluations import headline_difference, read_evaluation
from csr_vlm.report.gallery import pair_gallery
from csr_vlm.report.limits import Sample
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run
from csr_vlm.world.truth import known_scene

SCRIPT = "<script>alert(1)</script>"
HANDLER = '"><img onerror='
VOID = {"meta", "img", "input", "br", "hr", "link"}


class Page(HTMLParser):
    """Check that tags nest, and record them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open[-1:]):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def new_run(root: Path, iterations: int = 2, world: bool = True, **extra: Any) -> Run:
    layer = {
        "iterations": iterations,
        "model": {"path": "/models/tiny-llava"},
        "scorer": {"path": "openai/clip-vit-large-patch14-336"},
        "data": {"prompts": "prompts.jsonl"},
        "evaluation": {"world": {"num_scenes": 4}} if world else {},
        **extra,
    }
    return Run.create(root, resolve(layer))


def node(prompt_id: str, node_id: str, text: str, cosine: float | None = 0.3) -> Node:
    return Node(
        prompt_id=prompt_id,
        iteration=1,
        node_id=node_id,
        parent_id=node_id.rpartition(".")[0],
        depth=node_id.count(".") + 1,
        token_ids=(1, 2),
        token_logprobs=(-0.1, -0.2),
        text=text,
        finish=Finish.DELIMITER,
        status=NodeStatus.FINISHED,
        cosines={} if cosine is None else {"clip": cosine, "clip:others": 0.1, "siglip": cosine / 2},
    )


def response(node_id: str, text: str, reward: float) -> Response:
    return Response(node_id, (1, 2), -0.3, text, 1, reward, complete=True)


def add_pairs(run: Run, iteration: int, prompts: list[Prompt], chosen: str, rejected: str, ledger: bool = True) -> None:
    """Add one pair per prompt: two sentences against one."""
    pairs = [
        Pair(p, iteration, response("0.1", f"{chosen} {chosen}", 41.5), response("1", rejected, 20.25)) for p in prompts
    ]
    nodes = [
        made
        for p in prompts
        for made in (
            node(p.prompt_id, "0", chosen, 0.4),
            node(p.prompt_id, "0.1", f" {chosen}", 0.35),
            node(p.prompt_id, "1", rejected, -0.1),
            node(p.prompt_id, "1.0", "", None),
        )
    ]
    if ledger:
        tables.write_nodes(run.iteration(iteration) / "ledger" / "part-000000-x.parquet", nodes)
        run.mark_done(iteration, "generate", nodes=len(nodes), statuses={"finished": len(nodes)}, seconds=2.0)
    tables.write_pairs(run.pairs_path(iteration), pairs)
    run.mark_done(
        iteration,
        "pairs",
        pairs=len(pairs),
        prompts_without={"incomplete": 3},
        margin=21.25,
        chosen_reward=41.5,
        rejected_reward=20.25,
        chosen_sentences=2.0,
        rejected_sentences=1.0,
        chosen_longer=1.0,
    )


def add_training(run: Run, iteration: int) -> None:
    log = [
        {"step": step, "loss": 0.7 - step / 100, "rewards/accuracies": 0.5, "rewards/margins": step / 10}
        for step in range(1, 21)
    ]
    run.mark_done(iteration, "train", seconds=61.0, reference="ledger", reference_difference=6e-6, num_pairs=2, log=log)


def metrics(chair_s: float, recall: float = 0.99, width: float = 0.02) -> dict[str, dict[str, Any]]:
    values = {
        "chair_s": chair_s,
        "chair_i": chair_s / 4,
        "recall": recall,
        "repeats": 0.1,
        "words": 12,
        "relevance": 30,
    }
    return {key: {"value": v, "low": v - width, "high": v + width, "n": 200} for key, v in values.items()}


def row(number: int, *hallucinated: str, text: str = "There is a red boat.") -> dict[str, Any]:
    return {
        "id": f"harbour-test-1-{number:06d}",
        "text": text,
        "hallucinated": list(hallucinated),
        "relevance": 30.0,
    }


def add_evaluation(run: Run, iteration: int, found: dict[str, Any], rows: list[dict[str, Any]] | None = None) -> None:
    document = {"metrics": found, "protocol": {"split": "test", "decoding": "greedy"}, "rows": rows or []}
    files.write_json(run.evaluation_path(iteration, "world"), document)
    run.mark_done(iteration, "evaluate", world=found, seconds=1.5)


@pytest.fixture
def prompts(tmp_path: Path) -> list[Prompt]:
    Image.new("RGB", (800, 400), "teal").save(tmp_path / "photo.png")
    return [
        Prompt("harbour-prompts-0-000000", "absent.png", "Describe the image."),
        Prompt("mine", str(tmp_path / "photo.png"), "What is this?"),
        Prompt("lost", str(tmp_path / "no.png"), "Where?"),
    ]


def complete_run(tmp_path: Path, prompts: list[Prompt]) -> Run:
    run = new_run(tmp_path / "run", preset="sentences")
    tables.write_prompts(run.prompts_path, prompts, 64)
    sha256 = files.sha256_of(run.prompts_path)
    run.mark_done(0, "prompts", accepted=3, dropped={"missing": 2}, examples=["line 4: missing"], sha256=sha256)
    add_evaluation(run, 0, metrics(0.48), [row(0, "fish", "fish"), row(1), row(2, "cup"), row(3)])
    for iteration in (1, 2):
        add_pairs(run, iteration, prompts, "There is a red boat.", "There is a blue teapot and a fish.")
        add_training(run, iteration)
        add_evaluation(
            run, iteration, metrics(0.48 / (iteration + 1)), [row(0, "fish"), row(1, "sign"), row(2, "cup"), row(3)]
        )
    return run


def test_complete_run(tmp_path: Path, prompts: list[Prompt]) -> None:
    run = complete_run(tmp_path, prompts)
    path = write_report(run)
    assert path == run.root / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "After 2 iterations, CHAIRS fell from 0.480 to 0.160 (−67 %)" in page.text
    assert "unfinished" not in page.text
    for words in (
        "tiny-llava",
        "openai/clip-vit-large-patch14-336",
        "3 incomplete",
        "2 missing",
        "from the ledger; largest difference 6e−6 nats",
    ):
        assert words in page.text
    assert "csr run " in page.text
    assert "config.yaml --out DIR" in page.text
    assert {"iterations", "pairs", "before-after", "gallery", "provenance"} <= {
        a.get("id") for a in page.all("section")
    }
    # Six metrics, three charts of pairs, three of training, three over lambda.
    assert sum(attrs.get("class") == "chart" for attrs in page.all("svg")) == 15


def test_the_page_is_self_contained(tmp_path: Path, prompts: list[Prompt]) -> None:
    text = write_report(complete_run(tmp_path, prompts)).read_text(encoding="utf-8")
    page = Page(text)
    assert not page.all("link")
    assert all(not attrs.get("src") for attrs in page.all("script"))
    assert all((attrs["src"] or "").startswith("data:image/") for attrs in page.all("img"))
    assert not re.search(r"(https?:|url\(|@import)", text)
    assert all((attrs["href"] or "").startswith("#") for attrs in page.all("a"))


def test_every_picture_is_embedded_once_and_small(tmp_path: Path, prompts: list[Prompt]) -> None:
    page = Page(write_report(complete_run(tmp_path, prompts)).read_text(encoding="utf-8"))
    sources = [attrs["src"] or "" for attrs in page.all("img")]
    # A scene and a photo in the gallery, and the three evaluated scenes with a hallucination.
    assert len(sources) == len(set(sources)) == 5
    photo = next(attrs for attrs in page.all("img") if (attrs["src"] or "").startswith("data:image/jpeg"))
    assert (photo["width"], photo["height"]) == ("336", "168")
    assert base64.b64decode((photo["src"] or "").partition(",")[2])[:2] == b"\xff\xd8"
    assert "image missing" in page.text


def test_sentences_show_their_relevance_and_absent_objects_are_marked(tmp_path: Path, prompts: list[Prompt]) -> None:
    text = write_report(complete_run(tmp_path, prompts)).read_text(encoding="utf-8")
    # The default reward uses 100 (0.4 - 0.1) and 100 (-0.1 - 0.1).
    assert re.search(r'<li class="r6"><span>There is a .*?boat.*?</span> <span class="score"[^>]*>30.0</span>', text)
    assert re.search(r'<li class="r0">.*?<span class="score"[^>]*>.20.0</span>', text)
    assert '<mark class="absent" title="not in the image">' in text
    # Only the contents of the scene are known, so nothing is marked on the card of the photo.
    photo = text[text.index("data:image/jpeg") :]
    assert 'class="absent"' not in photo[: photo.index("</article>")]


@pytest.mark.parametrize(
    ("changes", "relevance"),
    [
        ({"preset": "paper"}, [40.0, 35.0]),  # 100 cos
        ({"preset": "paper", "scorer": {"path": "a", "extra": [{"path": "b", "name": "siglip"}], "use": "siglip"}},
         [20.0, 17.5]),
        ({"preset": "paper", "scorer": {"path": "a", "name": "lost"}}, [None, None]),
    ],
)  # fmt: skip
def test_the_gallery_shows_what_the_reward_uses(
    tmp_path: Path, prompts: list[Prompt], changes: dict[str, Any], relevance: list[float | None]
) -> None:
    run = new_run(tmp_path / "run", world=False, **changes)
    add_pairs(run, 1, prompts[:1], "A.", "B.")
    gallery = pair_gallery(run, Sample(), known_scene)
    assert gallery is not None
    shown = [sentence.relevance for sentence in gallery.cards[0].iterations[0].pairs[0].chosen.sentences]
    assert shown == [value if value is None else pytest.approx(value) for value in relevance]


def test_a_run_without_evaluation(tmp_path: Path, prompts: list[Prompt]) -> None:
    run = new_run(tmp_path / "run", iterations=1, evaluation={"heldout": 0})
    tables.write_prompts(run.prompts_path, prompts, 64)
    run.mark_done(0, "prompts", accepted=3, dropped={}, examples=[], sha256=files.sha256_of(run.prompts_path))
    add_pairs(run, 1, prompts, "A.", "B.", ledger=False)
    add_training(run, 1)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "The effect on hallucination is unknown: this run has no evaluation." in page.text
    assert "before-after" not in {a.get("id") for a in page.all("section")}
    assert "21.2" in page.text  # the margin
    assert "A. A." in page.text  # without a ledger, the text of the response is shown
    assert "unfinished" not in page.text


def test_an_unfinished_run_and_an_empty_one(tmp_path: Path, prompts: list[Prompt]) -> None:
    run = new_run(tmp_path / "run", iterations=3)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "unfinished" in page.text
    assert "have not been checked yet" in page.text
    add_evaluation(run, 0, metrics(0.48), [row(0, "fish")])
    assert "Only the base model has been evaluated so far: CHAIRS is 0.480." in Page(write_report(run).read_text()).text
    add_pairs(run, 1, prompts, "A.", "B.")
    add_training(run, 1)
    add_evaluation(run, 1, metrics(0.3), [row(0)])
    assert "After 1 of 3 iterations, CHAIRS fell" in Page(write_report(run).read_text()).text


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    evil = f"{SCRIPT} {HANDLER}"
    run = new_run(
        tmp_path / "run",
        model={"path": f"/m/{HANDLER}{SCRIPT.replace('/', '')}"},
        scorer={"path": evil},
        data={"prompts": evil},
    )
    prompts = [Prompt(evil, f"/img/{evil}", evil), Prompt("harbour-prompts-0-000001", evil, evil)]
    tables.write_prompts(run.prompts_path, prompts, 64)
    run.mark_done(0, "prompts", accepted=2, dropped={evil: 1}, examples=[evil], sha256=evil)
    for iteration in (1, 2):
        add_pairs(run, iteration, prompts, f"fish {evil} cup", f"{evil}")
        add_training(run, iteration)
    extra = metrics(0.4) | {evil: {"value": 1.0, "low": 0.5, "high": 1.5, "n": 3}}
    add_evaluation(run, 0, extra, [row(0, evil, text=evil), row(1) | {"id": evil}])
    add_evaluation(run, 2, extra, [row(0, text=evil), row(1, "cup") | {"id": evil}])
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert SCRIPT not in text
    assert "<img onerror" not in text
    assert len(page.all("script")) == 1
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert page.text.count("alert(1)") > 10


def test_the_content_security_policy_allows_only_the_script_of_the_page(tmp_path: Path) -> None:
    text = write_report(new_run(tmp_path / "run")).read_text(encoding="utf-8")
    import hashlib

    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for a in Page(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in (policy or "")


def test_the_report_is_deterministic(tmp_path: Path, prompts: list[Prompt]) -> None:
    run = complete_run(tmp_path, prompts)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()
    assert not list(run.root.glob(".report*"))


def test_a_large_gallery_is_sampled(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", world=False)
    prompts = [Prompt(f"p{number}", "none.png", "What?") for number in range(500)]
    add_pairs(run, 1, prompts, "A.", "B.")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert len(page.all("article")) == Sample().prompts
    assert "60 of 500 prompts with pairs" in page.text


def add_checks(run: Run, iteration: int, stage: str, stopped: bool, *rows: tuple[str, float, str, str]) -> None:
    """Store (metric, value, verdict, reason) rows as the checks of an audit or a gate."""
    checks = [dict(zip(("metric", "value", "verdict", "reason"), row, strict=True)) for row in rows]
    reasons = [reason for *_, verdict, reason in rows if verdict == "stop"]
    worst = "stop" if stopped else "warn"
    run.mark_done(iteration, stage, verdict=worst, stopped=stopped, metrics={}, checks=checks, reasons=reasons)


def test_the_audit_shows_every_iteration(tmp_path: Path, prompts: list[Prompt]) -> None:
    run = complete_run(tmp_path, prompts)
    add_checks(
        run, 1, "audit", False, ("relevance_win", 0.91, "go", ""), ("omission_gap", 0.01, "warn", "leaves out <b>")
    )
    add_checks(run, 1, "gate", False, ("sentences_ratio", 0.97, "go", ""))
    add_checks(run, 2, "audit", False, ("relevance_win", 0.9, "go", ""), ("omission_gap", -0.2, "go", ""))
    add_checks(run, 2, "gate", True, ("sentences_ratio", 0.4, "stop", "responses collapsed"))
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    shown = " ".join(page.text[page.text.index("Label-free quality checks") :].split())
    assert (
        "Chosen more relevant pairs whose chosen response fits the image better; chance: 0.5 0.91 go 0.90 go" in shown
    )
    assert "Omission gap relevant sentences left out per pair, chosen minus rejected +0.01 warn −0.20 go" in shown
    assert "Length ratio sentences per response, relative to the base model 0.97 go 0.40 stop" in shown
    assert "warn Iteration 1, pairs: leaves out <b>." in shown
    assert "stop Iteration 2, policy: responses collapsed." in shown
    assert "&lt;b&gt;" in text
    first_screen = page.text[: page.text.index("Label-free quality checks")]
    assert "The run stopped after iteration 2 and returned iteration 1: responses collapsed." in first_screen
    assert "evaluation.audit is" not in page.text


def test_a_run_stopped_by_the_audit_of_its_pairs(tmp_path: Path, prompts: list[Prompt]) -> None:
    run = new_run(tmp_path / "run", evaluation={"audit": "stop"})
    run.mark_done(0, "prompts", accepted=18, heldout=2, dropped={}, examples=[], sha256="ab" * 32)
    add_pairs(run, 1, prompts, "There is a red boat.", "There is a fish.")
    add_checks(run, 1, "audit", True, ("relevance_win", 0.5, "stop", "0.50 of pairs"), ("new_metric", 1.0, "go", ""))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "The run stopped before training iteration 1 and returned the base model: 0.50 of pairs." in page.text
    assert "18 (2 held out)" in page.text
    assert "new metric" in page.text, "a metric without a label is shown under its key"
    assert "unfinished" not in page.text


def test_every_audit_metric_has_a_label() -> None:
    assert LABELS.keys() == PAIR_BOUNDS.keys() | RESPONSE_BOUNDS.keys()


def test_no_audit_section_without_checks(tmp_path: Path, prompts: list[Prompt]) -> None:
    page = Page(write_report(complete_run(tmp_path, prompts)).read_text(encoding="utf-8"))
    assert "audit" not in {section.get("id") for section in page.all("section")}


def conclusion(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], rows: Any = ((), ())) -> Conclusion:
    run = new_run(tmp_path / "run", iterations=3)
    add_evaluation(run, 0, before, list(rows[0]))
    add_evaluation(run, 3, after, list(rows[1]))
    return conclude(run, read_evaluation(run))


def test_conclusion_of_an_improvement(tmp_path: Path) -> None:
    result = conclusion(tmp_path, metrics(0.48, 0.992), metrics(0.09, 0.990))
    assert result.sentence == (
        "After 3 iterations, CHAIR_S fell from 0.480 to 0.090 (−81 %), while recall went from 0.992 to 0.990."
    )
    assert result.tone == "better"
    assert result.notes == []


def test_conclusion_of_an_improvement_that_costs_recall(tmp_path: Path) -> None:
    result = conclusion(tmp_path, metrics(0.48, 0.99), metrics(0.09, 0.93))
    assert (
        "but recall fell from 0.990 to 0.930 (−0.060): the responses omit more of the objects in the image."
        in result.sentence
    )
    assert result.tone == "mixed"
    assert result.notes == ["Worse than the base model: Recall −0.060."]


def test_conclusion_of_a_deterioration(tmp_path: Path) -> None:
    result = conclusion(tmp_path, metrics(0.1), metrics(0.3))
    assert "CHAIR_S rose from 0.100 to 0.300 (+200 %): the model hallucinates more" in result.sentence
    assert result.tone == "worse"
    assert "The lowest CHAIR_S, 0.100, is that of the base model, not the result." in result.notes


def test_conclusion_of_an_insignificant_change(tmp_path: Path) -> None:
    result = conclusion(tmp_path, metrics(0.30), metrics(0.29))
    assert "CHAIR_S fell from 0.300 to 0.290 (−3 %), which is not statistically significant" in result.sentence
    assert result.tone == "none"


def test_the_paired_difference_decides_where_intervals_overlap(tmp_path: Path) -> None:
    """Compare wide intervals with rows in which 40 of 200 scenes improved and none got worse."""
    before = [row(n, *(["cup"] if n < 80 else [])) for n in range(200)]
    after = [row(n, *(["cup"] if n < 40 else [])) for n in range(200)]
    result = conclusion(tmp_path, metrics(0.4, width=0.2), metrics(0.2, width=0.2), (before, after))
    assert result.tone == "better"
    assert "significant" not in result.sentence
    assert result.notes[0].startswith("Paired difference of CHAIR_S on the same 200 scenes: −0.200 (95 % interval −0.2")


def test_headline_difference_by_hand(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    add_evaluation(run, 0, metrics(0.5), [row(0, "cup"), row(1, "cup"), row(2), row(9)])
    add_evaluation(run, 2, metrics(0.5), [row(0), row(1, "cup"), row(2), row(7)])
    evaluation = read_evaluation(run)
    assert evaluation is not None
    found = headline_difference(evaluation)
    assert found is not None
    assert (found.value, found.n) == (pytest.approx(-1 / 3), 3)
    assert (found.low, found.high) == tango(0, 1, 3), "one of the three prompts was mended"


def test_metrics_without_a_value_are_dashes(tmp_path: Path) -> None:
    nothing = {"value": None, "low": None, "high": None, "n": 4}
    found = metrics(0.2) | {"companion_recall": nothing, "recall": nothing}
    run = new_run(tmp_path / "run")
    add_evaluation(run, 0, found)
    add_evaluation(run, 2, found | {"chair_s": nothing})
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "CHAIRS has no value" in page.text
    assert "None" not in page.text.replace("None.", "")


def test_cards_are_divided_between_the_kinds_of_change(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    add_evaluation(run, 0, metrics(0.5), [row(n, "cup") for n in range(50)] + [row(n) for n in range(50, 60)])
    after = [row(n) for n in range(40)] + [row(n, "cup") for n in range(40, 53)] + [row(n) for n in range(53, 60)]
    add_evaluation(run, 2, metrics(0.2), after)
    evaluation = read_evaluation(run)
    assert evaluation is not None
    gallery = before_after(run, evaluation, Sample(compared=24), known_scene)
    assert gallery is not None
    assert gallery.totals == {IMPROVED: 40, WORSENED: 3, STILL_HALLUCINATING: 10, CLEAN: 7}
    assert [card.change for card in gallery.cards] == [IMPROVED] * 15 + [WORSENED] * 3 + [STILL_HALLUCINATING] * 6


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["a", "b"], ["a"], "improved"),
        (["a"], ["a", "b"], "worsened"),
        (["a"], ["b"], "still hallucinating"),
        ([], [], "without hallucination"),
    ],
)
def test_hallucination_change(before: list[str], after: list[str], expected: str) -> None:
    assert hallucination_change({"hallucinated": before}, {"hallucinated": after}).name == expected


def test_only_whole_words_are_marked() -> None:
    text = str(mark_absent("A Fish & a fishing boat.", {"fish"}))
    assert text.count("<mark") == 1
    assert ">Fish<" in text
    assert text.endswith(" &amp; a fishing boat.")
    assert mark_absent("<b>", set()) == "&lt;b&gt;"
    assert ">dining tables<" in mark_absent("Two dining tables, a table.", {"dining table"})
    assert "mark" not in mark_absent("A cupboard.", {"cup"})
    assert mark_absent("x.y z", {"x.y"}).count("<mark") == 1
    assert "mark" not in mark_absent("xay", {"x.y"}), "names are not patterns"


def test_color_scale() -> None:
    def of(*values: float | None) -> ColorScale:
        return ColorScale.of(AnnotatedSentence(Markup(), value) for value in values)

    scale = of(10.0, None, 45.0)
    assert [scale.color(value) for value in (0, 10, 14.9, 15, 45, 99)] == [0, 0, 0, 1, 6, 6]
    assert of().color(1.0) == of(3.0).color(3.0) == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.41, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        (0.935, 0.988, [0.92, 0.94, 0.96, 0.98, 1.0]),
        (-1e-7, 0.13, [0.0, 0.05, 0.1, 0.15]),
        (5, 5, None),
    ],
)
def test_nice_ticks(low: float, high: float, expected: list[float] | None) -> None:
    ticks = nice_ticks(low, high)
    assert expected is None or ticks == expected
    assert len(ticks) >= 2


def test_charts_of_degenerate_values() -> None:
    axes = Axes()
    assert chart("nothing", [Series("a", [])], axes) == ""
    assert chart("nothing", [Series("a", [Point(1, float("nan"))])], axes) == ""
    for values in ([0.0], [0.0, 0.0], [1e9, -1e9], [1e-12, 2e-12]):
        drawn = chart("x", [Series("a", [Point(n, value) for n, value in enumerate(values)])], axes)
        assert "nan" not in drawn
        Page(drawn)
    assert "&lt;b&gt;" in chart("<b>", [Series("<b>", [Point(1, 2, title="<b>")])], axes)


def test_smoothing_preserves_the_mean() -> None:
    points = [Point(n, n) for n in range(1000)]
    short = smoothed(points, 100)
    assert len(short) == 100
    assert sum(point.value for point in short) / 100 == pytest.approx(499.5)
    assert smoothed(points[:5]) == points[:5]


def test_formats() -> None:
    assert (fixed(-0.5, 1), fixed(None), fixed(float("nan"))) == ("−0.5", "–", "–")
    assert (signed(0.25, 2), signed(-0.25, 2), signed(0.0, 1)) == ("+0.25", "−0.25", "0.0")
    assert (compact(66.75), compact(-0.31)) == ("66.8", "−0.310")
    assert (relative_change(0.48, 0.09), relative_change(0, 1)) == ("−81 %", None)
    assert (relative_change(0.455, 0.002), relative_change(0.5, 0.0)) == ("−99.6 %", "−100 %")
    assert [duration(s) for s in (0.4, 42, 185, 7800, None)] == ["0.4 s", "42 s", "3 min 5 s", "2 h 10 min", "–"]
    assert indexed("CHAIR_S & R_I") == "CHAIR<sub>S</sub> &amp; R<sub>I</sub>"


def test_credentials_are_redacted() -> None:
    config = {"trl": {"hub_token": "hf_secret", "pad_token": "<pad>", "learning_rate": 1.0}, "seed": 1}
    assert without_secrets(config) == {
        "trl": {"hub_token": "(redacted)", "pad_token": "<pad>", "learning_rate": 1.0},
        "seed": 1,
    }


def test_the_report_needs_no_machine_learning_library() -> None:
    code = (
        "import sys, csr_vlm.report.html; "
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
