"""One prompt's search tree as inline SVG: what was kept, what was dropped, the best and the worst path.

Depth runs downwards. A node's shape says what the search did with it, its colour whether it
lies on the best or the worst path; its title has the sentence and the scores, so the drawing
can be read without a script.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import compact, fixed, plural, signed
from csr_vlm.core.records import Node, NodeStatus, Pair
from csr_vlm.method.pairs import responses
from csr_vlm.method.reward import SentenceReward, path_ids, sentence_rewards
from csr_vlm.report.limits import cut

_LEVEL, _EDGE = 46, 14
_WIDE, _NARROW = 26, 15
"""What a kept and a dropped leaf take beside their neighbours."""
_MOST_CHARS = 600
SHAPES: Mapping[str, str] = {
    "top": "M0-7 7 5.5-7 5.5Z",
    "bottom": "M0 7 7-5.5-7-5.5Z",
    "finished": "M-5.5-5.5h11v11h-11Z",
    "truncated": "M-5.5-5.5h11v11h-11Z",
    "dropped": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z",
}
"""Outlines about the origin."""
LEGEND = (
    ("top", "kept among the best"),
    ("bottom", "kept among the worst"),
    ("finished", "ends a response"),
    ("truncated", "ran into a limit"),
    ("dropped", "dropped"),
)
_FATES = {
    NodeStatus.TOP: ("top", "kept among the best"),
    NodeStatus.BOTTOM: ("bottom", "kept among the worst"),
    NodeStatus.FINISHED: ("finished", "ends a response"),
    NodeStatus.TRUNCATED: ("truncated", "ran into a limit"),
    NodeStatus.PRUNED: ("dropped", "dropped: neither among the best nor among the worst"),
    NodeStatus.FILTERED: ("dropped", "dropped: refused by a candidate filter"),
}


@dataclass(frozen=True)
class SearchTree:
    svg: Markup
    summary: str


@dataclass(frozen=True)
class _Marks:
    """What is known of nodes beside their status."""

    rewards: Mapping[str, SentenceReward]
    best: Collection[str]
    worst: Collection[str]
    """Ids on the path of the highest and of the lowest R(y)."""
    chosen: Collection[str]
    rejected: Collection[str]
    """Ids at which a side of a pair ends."""
    drawn: Mapping[str, int]
    """How often the same sentence was sampled at its place."""

    def of(self, node_id: str) -> list[str]:
        """Name the marks of a node, as classes."""
        names = ("best", "worst", "chosen", "rejected")
        return [name for name in names if node_id in getattr(self, name)]


def search_tree(nodes: Sequence[Node], pairs: Iterable[Pair], config: RunConfig) -> SearchTree:
    """Draw the tree of a prompt.

    Args:
        nodes: All of the prompt's nodes; duplicates are counted with the sentence they repeat.
        pairs: The prompt's pairs, whose ends are ringed.
    """
    ids = {node.node_id for node in nodes}
    # A ledger with a hole still shows what hangs on the root.
    nodes = [node for node in nodes if ids.issuperset(path_ids(node.node_id))]
    shown = [node for node in nodes if node.status is not NodeStatus.DUPLICATE]
    marks = _marks(nodes, list(pairs), config)
    places = _places(shown)
    width = max((x for x, _ in places.values()), default=0.0) + _WIDE / 2 + _EDGE
    height = max((y for _, y in places.values()), default=0.0) + _EDGE
    dropped = sum(_FATES[node.status][0] == "dropped" for node in shown)
    summary = f"{plural(len(shown), 'sentence')}, {dropped} of them dropped"
    parts = [
        *_edges(shown, places, marks),
        Markup('<circle class="root" cx="{:.0f}" cy="{:.0f}" r="4"/>').format(*places[""]),
        *(_node(node, places[node.node_id], marks) for node in shown),
    ]
    drawn = Markup(
        '<svg class="tree" width="{:.0f}" height="{:.0f}" viewBox="0 0 {:.0f} {:.0f}" role="tree" '
        'aria-label="Search tree: {}">{}</svg>'
    ).format(width, height, width, height, summary, Markup("").join(parts))
    return SearchTree(drawn, summary)


def _marks(nodes: Sequence[Node], pairs: Sequence[Pair], config: RunConfig) -> _Marks:
    method, scorer = config.method, config.scorer.used
    same = Counter((node.parent_id, node.token_ids) for node in nodes)
    drawn = {node.node_id: same[node.parent_id, node.token_ids] for node in nodes}
    chosen, rejected = ({getattr(pair, side).node_id for pair in pairs} for side in ("chosen", "rejected"))
    try:
        rewards = sentence_rewards(nodes, method, scorer)
        whole = [r for r in responses(nodes, method, scorer) if r.complete or not method.pairs.require_complete]
    except CsrError:  # a ledger that lacks the configured scorer's scores still has a tree
        return _Marks({}, (), (), chosen, rejected, drawn)
    ordered = sorted(whole, key=lambda response: response.reward)
    best = path_ids(ordered[-1].node_id) if ordered else []
    worst = path_ids(ordered[0].node_id) if len(ordered) > 1 else []
    return _Marks(rewards, set(best), set(worst), chosen, rejected, drawn)


def _places(nodes: Sequence[Node]) -> dict[str, tuple[float, float]]:
    """Place every node: leaves side by side in search order, a parent over the middle of its children."""
    children: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        children[node.parent_id].append(node)
    places: dict[str, tuple[float, float]] = {}
    edge = float(_EDGE)

    def place(node_id: str, depth: int, leaf_width: int) -> float:
        nonlocal edge
        mine = children.get(node_id, [])
        if mine:
            ends = [place(child.node_id, depth + 1, _leaf_width(child)) for child in mine]
            x = (ends[0] + ends[-1]) / 2
        else:
            x = edge + leaf_width / 2
            edge += leaf_width
        places[node_id] = (x, _EDGE + depth * _LEVEL)
        return x

    place("", 0, _WIDE)
    return places


def _leaf_width(node: Node) -> int:
    return _NARROW if _FATES[node.status][0] == "dropped" else _WIDE


def _edges(nodes: Sequence[Node], places: Mapping[str, tuple[float, float]], marks: _Marks) -> list[Markup]:
    """Draw the edges, those that matter last and so on top."""
    lines: dict[str, list[str]] = {"lost": [], "kept": [], "worst": [], "best": []}
    for node in nodes:
        (x1, y1), (x2, y2) = places[node.parent_id], places[node.node_id]
        middle = (y1 + y2) / 2
        curve = f"M{x1:.1f} {y1:.0f}C{x1:.1f} {middle:.0f} {x2:.1f} {middle:.0f} {x2:.1f} {y2:.0f}"
        lines["lost" if _FATES[node.status][0] == "dropped" else "kept"].append(curve)
        for path in ("worst", "best"):
            if path in marks.of(node.node_id):
                lines[path].append(curve)
    return [
        Markup('<path class="edge {}" d="{}"/>').format(kind, "".join(curves))
        for kind, curves in lines.items()
        if curves
    ]


def _node(node: Node, place: tuple[float, float], marks: _Marks) -> Markup:
    kind, status = _FATES[node.status]
    own = marks.of(node.node_id)
    classes = " ".join(["node", kind, *own])
    ring = Markup('<circle class="ring" r="10.5"/>') if {"chosen", "rejected"} & set(own) else ""
    return Markup(
        '<g class="{}" data-id="{}" transform="translate({:.1f} {:.0f})" role="treeitem" aria-level="{}" tabindex="-1">'
        '<title>{}</title><circle class="target" r="8"/>{}<path d="{}"/></g>'
    ).format(classes, node.node_id, *place, node.depth, _title(node, status, marks), ring, SHAPES[kind])


def _title(node: Node, status: str, marks: _Marks) -> str:
    """The sentence on the first line, what is known of it on the second."""
    reward = marks.rewards.get(node.node_id)
    known = [status]
    if reward is not None:
        known += [f"R {signed(reward.total, 2)}", f"R_I {fixed(reward.image, 1)}", f"R_T {compact(reward.text)}"]
        known += ["said before"] if reward.repeated else []
    known.append(f"log P {fixed(node.logprob, 2)}")
    if marks.drawn.get(node.node_id, 1) > 1:
        known.append(f"sampled {marks.drawn[node.node_id]} times")
    words = {
        "best": "on the best path",
        "worst": "on the worst path",
        "chosen": "chosen in a pair",
        "rejected": "rejected in a pair",
    }
    known += [words[name] for name in marks.of(node.node_id)]
    said = " ".join(cut(node.sentence, _MOST_CHARS).split()) or "(the end)"
    return f"{said}\n{' · '.join(known)}"
