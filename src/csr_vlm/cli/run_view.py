"""Print a run and its search trees in the terminal."""

from __future__ import annotations

from collections import defaultdict

from rich.text import Text
from rich.tree import Tree

from csr_vlm.cli import console
from csr_vlm.cli.arguments import last_generated
from csr_vlm.cli.console import print_metrics, print_table
from csr_vlm.cli.sanitize import one_line
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node, NodeStatus, Pair, Prompt
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.method.pairs import make_pairs
from csr_vlm.method.reward import SentenceReward, path_ids, sentence_rewards
from csr_vlm.store import ledger
from csr_vlm.store.run import Run

_STYLES = {
    NodeStatus.TOP: "green",
    NodeStatus.BOTTOM: "yellow",
    NodeStatus.FINISHED: "bold",
    NodeStatus.TRUNCATED: "magenta",
}


def print_summary(run: Run) -> None:
    """Print settings, pairs and metrics of every iteration."""
    config = run.config
    evaluated = run.iterations_done("evaluate")
    if console.mode.json:
        console.print_json(
            {
                "run": str(run.root),
                "config": config.dump(),
                "last_trained": run.last_trained,
                "stopped_at": run.stopped_at,
                "pairs": {number: run.result(number, "pairs") for number in run.iterations_done("pairs")},
                "metrics": {number: run.metrics(number) for number in evaluated},
            }
        )
        return
    print_table(
        str(run.root),
        ["", ""],
        [
            ["model", config.model.path],
            ["scorer", config.scorer.path],
            ["preset", config.preset],
            ["lambda", str(config.method.lambda_)],
            ["iterations", f"{run.last_trained} of {config.iterations}"],
        ],
    )
    if run.stopped_at is not None:
        print(f"stopped after iteration {run.stopped_at}; the result is {policy_name(run.final)}")
    rows = []
    for number in range(1, config.iterations + 1):
        pairs = run.result(number, "pairs") if run.is_done(number, "pairs") else {}
        nodes = run.result(number, "generate")["nodes"] if run.is_done(number, "generate") else "-"
        keys = ("pairs", "margin", "chosen_sentences", "rejected_sentences")
        rows.append([str(number), str(nodes), *(str(pairs.get(key, "-")) for key in keys)])
    print()
    print_table("", ["iteration", "nodes", "pairs", "margin", "sentences chosen", "rejected"], rows)
    if evaluated:
        print()
        print_metrics("", {n: run.metrics(n) for n in evaluated})
    if run.iterations_done("generate"):
        first = next(run.prompts()).prompt_id
        console.log(f"next: csr show {run.root} {first} shows the tree of a prompt; csr compare {run.root}")


def print_tree(run: Run, prompt_id: str, iteration: int | None) -> None:
    """Print the search tree of a prompt, with the chosen and the rejected path marked.

    Raises:
        CsrError: The run has no such prompt or ledger.
    """
    number = iteration or last_generated(run)
    trees = zip(run.prompts(), ledger.trees(run, number), strict=True)
    match = next(((prompt, nodes) for prompt, nodes in trees if prompt.prompt_id == prompt_id), None)
    if match is None:
        examples = ", ".join(prompt.prompt_id for prompt, _ in zip(run.prompts(), range(3), strict=False))
        raise CsrError(f"{run.root} has no prompt {prompt_id!r}", f"expected an id such as {examples}")
    method, scorer = run.config.method, run.config.scorer.used
    prompt, nodes = match
    rewards = sentence_rewards(nodes, method, scorer)
    pairs = make_pairs(prompt, nodes, method, scorer, run.config.seed)
    if console.mode.json:
        _print_tree_json(prompt, nodes, rewards, pairs)
        return
    marks: dict[str, str] = {}
    if not isinstance(pairs, str):
        pair = pairs[0]
        marks |= dict.fromkeys(path_ids(pair.rejected.node_id), " ✗")
        marks |= dict.fromkeys(path_ids(pair.chosen.node_id), " ✓")
    children: dict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        if node.status is not NodeStatus.DUPLICATE:
            children[node.parent_id].append(node)
    root = Tree(Text(one_line(f"{prompt.text}  ({prompt.image})")))
    _grow(root, "", children, rewards, marks)
    output = console.terminal()
    output.print(root)
    if not isinstance(pairs, str):
        output.print(Text(f"✓ chosen   {pair.chosen.reward:8.3f}  {one_line(pair.chosen.text)}"))
        output.print(Text(f"✗ rejected {pair.rejected.reward:8.3f}  {one_line(pair.rejected.text)}"))
    else:
        output.print(Text(f"no pair: {pairs}"))


def _print_tree_json(
    prompt: Prompt, nodes: list[Node], rewards: dict[str, SentenceReward], pairs: list[Pair] | str
) -> None:
    sentences = [
        {
            "node_id": node.node_id,
            "sentence": node.sentence,
            "finish": node.finish.value,
            "status": node.status.value,
            "cosines": dict(node.cosines),
            "reward": vars(rewards[node.node_id]) if node.node_id in rewards else None,
        }
        for node in nodes
    ]
    nodes_of_pairs = (
        [] if isinstance(pairs, str) else [{"chosen": p.chosen.node_id, "rejected": p.rejected.node_id} for p in pairs]
    )
    console.print_json({"prompt": vars(prompt), "nodes": sentences, "pairs": nodes_of_pairs})


def _grow(
    branch: Tree,
    parent: str,
    children: dict[str, list[Node]],
    rewards: dict[str, SentenceReward],
    marks: dict[str, str],
) -> None:
    """Add the nodes below a parent to a branch."""
    for node in children[parent]:
        label = Text(one_line(node.sentence) or "(end)", style=_STYLES.get(node.status, "dim"))
        reward = rewards.get(node.node_id)
        if reward is not None:
            label.append(f"  R {reward.total:.2f}  R_I {reward.image:.1f}  R_T {reward.text:.3g}", style="cyan")
        label.append(f"  {node.status.value}{marks.get(node.node_id, '')}", style="dim")
        _grow(branch.add(label), node.node_id, children, rewards, marks)
