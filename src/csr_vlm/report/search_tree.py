"""Draw one prompt's search tree as inline SVG: kept and dropped candidates, best and worst path.

Depth increases downward. A node's shape shows its status in the search, its color whether it lies
on the best or the worst path. Its title has the sentence and the scores, so the drawing can be read
without a script.
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
from csr_vlm.report.limits import shorten

_LEVEL, _EDGE = 46, 14
_WIDE, _NARROW = 26, 15
"""Width of a kept and of a dropped leaf."""
_MAX_CHARS = 600
OUTLINES: Mapping[str, str] = {
    "top": "M0-7 7 5.5-7 5.5Z",
    "bottom": "M0 7 7-5.5-7-5.5Z",
    "finished": "M-5.5-5.5h11v11h-11Z",
    "truncated": "M-5.5-5.5h11v11h-11Z",
    "dropped": "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0Z",
}
"""SVG paths around the origin."""
LEGEND = (
    ("top", "kept, top-k"),
    ("bottom", "kept, bottom-k"),
    ("finished", "end of a response"),
    ("truncated", "length limit reached"),
    ("dropped", "dropped"),
)
"""(shape, meaning)."""
_STATUSES = {
    NodeStatus.TOP: LEGEND[0],
    NodeStatus.BOTTOM: LEGEND[1],
    NodeStatus.FINISHED: LEGEND[2],
    NodeStatus.TRUNCATED: LEGEND[3],
    NodeStatus.PRUNED: ("dropped", "dropped: neither top-k nor bottom-k"),
    NodeStatus.FILTERED: ("dropped", "dropped by a candidate filter"),
}
"""Status of a node to its shape and description."""


@dataclass(frozen=True)
class SearchTree:
    """Hold the drawing of a tree and its size in words."""

    svg: Markup
    summary: str


@dataclass(frozen=True)
class _Marks:
    """Hold what the drawing shows of nodes besides their status."""

    rewards: Mapping[str, SentenceReward]
    best: Collection[str]
    worst: Collection[str]
    """Ids on the paths to the responses with the highest and the lowest R(y)."""
    chosen: Collection[str]
    rejected: Collection[str]
    """Ids of the last nodes of chosen and rejected responses."""
    num_samples: Mapping[str, int]
    """Number of times that the same sentence was sampled from the same parent."""

    def classes(self, node_id: str) -> list[str]:
        """Return the marks of a node as CSS classes."""
        names = ("best", "worst", "chosen", "rejected")
        return [name for name in names if node_id in getattr(self, name)]


def search_tree(nodes: Sequence[Node], pairs: Iterable[Pair], config: RunConfig) -> SearchTree:
    """Draw the tree of a prompt.

    Args:
        nodes: All nodes of the prompt; a duplicate is counted with the sentence that it repeats.
        pairs: Pairs of the prompt; the last nodes of their responses get a ring.
        config: Configuration of the run, for the rewards.
    """
    ids = {node.node_id for node in nodes}
    # If nodes are missing from the ledger, what is still connected to the root is drawn.
    nodes = [node for node in nodes if ids.issuperset(path_ids(node.node_id))]
    shown = [node for node in nodes if node.status is not NodeStatus.DUPLICATE]
    marks = _marks(nodes, list(pairs), config)
    positions = _positions(shown)
    width = max((x for x, _ in positions.values()), default=0.0) + _WIDE / 2 + _EDGE
    height = max((y for _, y in positions.values()), default=0.0) + _EDGE
    num_dropped = sum(_is_dropped(node) for node in shown)
    summary = f"{plural(len(shown), 'candidate')}, {num_dropped} dropped"
    parts = [
        *_edges(shown, positions, marks),
        Markup('<circle class="root" cx="{:.0f}" cy="{:.0f}" r="4"/>').format(*positions[""]),
        *(_node(node, positions[node.node_id], marks) for node in shown),
    ]
    svg = Markup(
        '<svg class="tree" width="{:.0f}" height="{:.0f}" viewBox="0 0 {:.0f} {:.0f}" role="tree" '
        'aria-label="Search tree: {}">{}</svg>'
    ).format(width, height, width, height, summary, Markup("").join(parts))
    return SearchTree(svg, summary)


def _marks(nodes: Sequence[Node], pairs: Sequence[Pair], config: RunConfig) -> _Marks:
    method, scorer = config.method, config.scorer.used
    counts = Counter((node.parent_id, node.token_ids) for node in nodes)
    num_samples = {node.node_id: counts[node.parent_id, node.token_ids] for node in nodes}
    chosen, rejected = ({getattr(pair, side).node_id for pair in pairs} for side in ("chosen", "rejected"))
    try:
        rewards = sentence_rewards(nodes, method, scorer)
        eligible = [r for r in responses(nodes, method, scorer) if r.complete or not method.pairs.require_complete]
    except CsrError:  # without the configured scorer's scores, the tree has no rewards
        return _Marks({}, (), (), chosen, rejected, num_samples)
    ranked = sorted(eligible, key=lambda response: response.reward)
    best = path_ids(ranked[-1].node_id) if ranked else []
    worst = path_ids(ranked[0].node_id) if len(ranked) > 1 else []
    return _Marks(rewards, set(best), set(worst), chosen, rejected, num_samples)


def _positions(nodes: Sequence[Node]) -> dict[str, tuple[float, float]]:
    """Compute the (x, y) of every node: leaves side by side in search order, a parent centered over its children."""
    children: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        children[node.parent_id].append(node)
    positions: dict[str, tuple[float, float]] = {}
    next_leaf = float(_EDGE)

    def place(node_id: str, depth: int, leaf_width: int) -> float:
        nonlocal next_leaf
        centers = [place(child.node_id, depth + 1, _leaf_width(child)) for child in children.get(node_id, [])]
        if centers:
            x = (centers[0] + centers[-1]) / 2
        else:
            x = next_leaf + leaf_width / 2
            next_leaf += leaf_width
        positions[node_id] = (x, _EDGE + depth * _LEVEL)
        return x

    place("", 0, _WIDE)
    return positions


def _is_dropped(node: Node) -> bool:
    return _STATUSES[node.status][0] == "dropped"


def _leaf_width(node: Node) -> int:
    return _NARROW if _is_dropped(node) else _WIDE


def _edges(nodes: Sequence[Node], positions: Mapping[str, tuple[float, float]], marks: _Marks) -> list[Markup]:
    """Draw the edges, the best and the worst path last and therefore on top."""
    lines: dict[str, list[str]] = {"dropped": [], "kept": [], "worst": [], "best": []}
    for node in nodes:
        (x1, y1), (x2, y2) = positions[node.parent_id], positions[node.node_id]
        middle = (y1 + y2) / 2
        curve = f"M{x1:.1f} {y1:.0f}C{x1:.1f} {middle:.0f} {x2:.1f} {middle:.0f} {x2:.1f} {y2:.0f}"
        lines["dropped" if _is_dropped(node) else "kept"].append(curve)
        for path in ("worst", "best"):
            if path in marks.classes(node.node_id):
                lines[path].append(curve)
    return [
        Markup('<path class="edge {}" d="{}"/>').format(kind, "".join(curves))
        for kind, curves in lines.items()
        if curves
    ]


def _node(node: Node, position: tuple[float, float], marks: _Marks) -> Markup:
    shape, status = _STATUSES[node.status]
    mark_classes = marks.classes(node.node_id)
    classes = " ".join(["node", shape, *mark_classes])
    ring = Markup('<circle class="ring" r="10.5"/>') if {"chosen", "rejected"} & set(mark_classes) else ""
    return Markup(
        '<g class="{}" data-id="{}" transform="translate({:.1f} {:.0f})" role="treeitem" aria-level="{}" tabindex="-1">'
        '<title>{}</title><circle class="target" r="8"/>{}<path d="{}"/></g>'
    ).format(classes, node.node_id, *position, node.depth, _title(node, status, marks), ring, OUTLINES[shape])


def _title(node: Node, status: str, marks: _Marks) -> str:
    """Return the sentence on the first line and its status, scores and marks on the second."""
    reward = marks.rewards.get(node.node_id)
    facts = [status]
    if reward is not None:
        facts += [f"R {signed(reward.total, 2)}", f"R_I {fixed(reward.image, 1)}", f"R_T {compact(reward.text)}"]
        facts += ["repeats an earlier sentence"] if reward.repeated else []
    facts.append(f"log P {fixed(node.logprob, 2)}")
    if marks.num_samples.get(node.node_id, 1) > 1:
        facts.append(f"sampled {marks.num_samples[node.node_id]} times")
    descriptions = {
        "best": "on the best path",
        "worst": "on the worst path",
        "chosen": "chosen in a pair",
        "rejected": "rejected in a pair",
    }
    facts += [descriptions[name] for name in marks.classes(node.node_id)]
    sentence = " ".join(shorten(node.sentence, _MAX_CHARS).split()) or "(end of response)"
    return f"{sentence}\n{' · '.join(facts)}"
