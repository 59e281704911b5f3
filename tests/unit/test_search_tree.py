"""Test the drawing of a search tree small enough to check by eye."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

from csr_vlm.core.records import Node, NodeStatus, Pair, Response
from csr_vlm.report.search_tree import search_tree
from tests.unit.builders import config, node, prompt

PAPER = config(preset="paper")


def tree() -> list[Node]:
    """R_I decides: the best response is 0.1 (40 + 30), the worst 1.0 (20 + 0)."""
    return [
        node("0", "A boat.", cosine=0.4, ids=(1,), status=NodeStatus.TOP),
        node("1", "A fish.", cosine=0.2, ids=(2,), status=NodeStatus.BOTTOM),
        node("2", "A cup.", cosine=0.3, ids=(3,), status=NodeStatus.PRUNED),
        node("3", "A boat.", cosine=0.4, ids=(1,), status=NodeStatus.DUPLICATE),
        node("0.0", " A car.", cosine=0.1, ids=(4,), status=NodeStatus.FINISHED),
        node("0.1", " A tree.", cosine=0.3, ids=(5,), status=NodeStatus.FINISHED),
        node("1.0", "", cosine=None, ids=(6,), status=NodeStatus.FINISHED),
    ]


def pair(chosen: str, rejected: str) -> Pair:
    sides = [Response(name, (1,), -1.0, "A.", 1, 0.0, complete=True) for name in (chosen, rejected)]
    return Pair(prompt(), 1, *sides)


def drawn(nodes: list[Node], *pairs: Pair) -> dict[str, tuple[set[str], float, float, str]]:
    """Node id to its classes, its place and its title, as they stand in the SVG."""
    svg = str(search_tree(nodes, pairs, PAPER).svg)
    pattern = r'<g class="([^"]*)" data-id="([^"]*)" transform="translate\(([\d.]+) ([\d.]+)\)".*?<title>(.*?)</title>'
    actual = re.findall(pattern, svg, re.DOTALL)
    return {name: (set(css.split()), float(x), float(y), title) for css, name, x, y, title in actual}


def test_classes_show_the_status_and_the_path_of_each_node() -> None:
    actual = {name: css for name, (css, *_) in drawn(tree(), pair("0.1", "0.0")).items()}
    assert actual == {
        "0": {"node", "top", "best"},
        "1": {"node", "bottom", "worst"},
        "2": {"node", "dropped"},
        "0.0": {"node", "finished", "rejected"},
        "0.1": {"node", "finished", "best", "chosen"},
        "1.0": {"node", "finished", "worst"},
    }


def test_titles_show_the_sentence_and_its_scores() -> None:
    actual = drawn(tree(), pair("0.1", "0.0"))
    sentence, facts = actual["0"][3].split("\n")
    assert sentence == "A boat."
    # R = 0.9 x 40 + 0.1 x e^-1
    for words in ("kept, top-k", "R +36.04", "R_I 40.0", "R_T 0.368", "log P −1.00", "sampled 2 times"):
        assert words in facts
    assert "on the best path" in facts
    assert actual["1.0"][3].startswith("(end of response)\nend of a response")
    assert "rejected in a pair" in actual["0.0"][3]
    assert "sampled" not in actual["1"][3]


def test_parents_are_centered_above_their_children_without_overlap() -> None:
    actual = drawn(tree())
    x = {name: value for name, (_, value, _, _) in actual.items()}
    y = {name: value for name, (_, _, value, _) in actual.items()}
    assert x["0"] == (x["0.0"] + x["0.1"]) / 2
    assert x["1"] == x["1.0"]
    assert y["0"] == y["1"] == y["2"] < y["0.0"] == y["1.0"]
    for depth in (0, 1):
        row = sorted(x[name] for name in x if name.count(".") == depth)
        assert all(right - left >= 15 for left, right in pairwise(row))
    width = float(re.search(r'<svg class="tree" width="(\d+)"', str(search_tree(tree(), [], PAPER).svg)).group(1))
    assert max(x.values()) < width


def test_the_summary_counts_dropped_candidates() -> None:
    assert search_tree(tree(), [], PAPER).summary == "6 candidates, 1 dropped"


def test_a_ledger_without_scores_is_still_drawn() -> None:
    actual = drawn([replace(each, cosines={}) for each in tree()])
    assert actual["0"][0] == {"node", "top"}
    assert "R_I" not in actual["0"][3]


def test_nodes_without_a_path_to_the_root_are_not_drawn() -> None:
    actual = drawn([each for each in tree() if each.node_id != "0"])
    assert actual.keys() == {"1", "2", "1.0"}
    assert drawn([]) == {}


def test_text_of_the_model_is_escaped() -> None:
    evil = "</title><script>alert(1)</script>"
    nodes = [replace(each, text=evil, node_id=each.node_id) for each in tree()]
    svg = str(search_tree(nodes, [], PAPER).svg)
    assert "<script" not in svg
    assert svg.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 6


def test_long_sentences_are_shortened() -> None:
    nodes = [replace(tree()[0], text="word " * 5000)]
    assert len(search_tree(nodes, [], PAPER).svg) < 3000
