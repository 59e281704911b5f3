"""Show what a configuration prefers under scorers of every kind, without any model.

Draws pictures, the trees of a policy and the cosines of a scorer from profile files, runs the
product's own search, pairs, claim questions and audit on them, and counts what the pairs
prefer against the truth. A run takes seconds; it says whether a default would teach the right
thing on captions as large models write them, before anybody trains on them.

    python benchmarks/profiles.py                                      every profile that ships
    python benchmarks/profiles.py my.yaml method.lambda=0.5 --json

Right decisions: true > false, END > false, true > END, true > mood; wrong ones are the
reverse. END stands for ending the response; a sentence is false if any of its claims is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import profile_world
from profile_world import Picture, ProfileWorld, nouns_in, places_in

from csr_vlm.config.load import load_config
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Node, Pair, Response
from csr_vlm.evaluation.scorer_profile import Profile, read_profile
from csr_vlm.evaluation.statistics import auc
from csr_vlm.method import audit as quality
from csr_vlm.method.claim_evidence import Evidence
from csr_vlm.method.pairs import make_pairs
from csr_vlm.method.questions import select_informative
from csr_vlm.method.reward import path_ids
from csr_vlm.method.search import Tree, search
from csr_vlm.pipeline.claim_questions import text_pairs
from csr_vlm.scoring.claim_scorer import ClaimScorer
from csr_vlm.scoring.scorer import ScorerGroup

__all__ = ["Outcome", "profile_world", "run_profile"]

PROFILES = Path(__file__).parent / "profiles"
BASE = {"model": {"path": "none"}, "scorer": {"path": "none"}, "data": {"prompts": "none"}}
RIGHT = {("true", "false"), ("end", "false"), ("true", "end"), ("true", "mood")}
COLUMNS = (
    "profile",
    "right",
    "wrong",
    "end_over_true",
    "true_over_end",
    "false_over_end",
    "pairs",
    "prompts_with_pairs",
)


@dataclass
class Outcome:
    """Count what a configuration makes of a profile."""

    profile: str
    right: int
    wrong: int
    end_over_true: int
    true_over_end: int
    false_over_end: int
    pairs: int
    prompts_with_pairs: float
    """Share of the prompts."""
    questions: int
    questions_right: int
    questions_nonsense: int
    """Questions about something that is not a depictable thing."""
    audit: str
    """go, warn or stop."""
    checks: list[dict[str, Any]]
    decisions: dict[str, int]
    """Pairs by kind of decision, as "chosen > rejected"."""
    scorer_auc: float | None
    """Of the scorer's z, true against false things that the trees claim; by the truth of the pictures.

    None for presets that do not score claims.
    """
    estimated_auc: float | None
    """The same as the audit estimates it, without the truth."""


def run_profile(profile: Profile, config: RunConfig, num_prompts: int, seed: int = 0) -> Outcome:
    """Run search, pairs, claim questions and audit on a profile, and judge them by its truth."""
    world = ProfileWorld(profile, seed, num_prompts)
    group = _scorers(world, config)
    group.set_negative_images(world.prompts, config.scorer.others, similar=world.neighbors)
    claims = ClaimScorer(group, config.method.claims)
    trees = search(
        world.prompts,
        world.propose,
        group.score,
        config.method,
        iteration=1,
        seed=seed,
        scorer=config.scorer.used,
        score_claims=claims if config.method.uses_claims else None,
    )
    pairs: list[Pair] = []
    metrics, decisions, with_pairs = [], Counter[tuple[str, str]](), 0
    for tree in trees:
        made = make_pairs(tree.prompt, tree.nodes, config.method, config.scorer.used, config.seed)
        own = [] if isinstance(made, str) else made
        with_pairs += bool(own)
        pairs += own
        metrics.append(quality.tree_metrics(tree.nodes, own, config.method, config.scorer.used))
        nodes = {node.node_id: node for node in tree.nodes}
        decisions.update(decision(pair, nodes, world) for pair in own)
    quality_metrics = quality.pair_metrics(metrics)
    checks = quality.pair_checks(quality_metrics, {})
    questions = list(_questions(world, trees, claims, config))
    return Outcome(
        profile=profile.name,
        right=sum(number for kinds, number in decisions.items() if kinds in RIGHT),
        wrong=sum(number for kinds, number in decisions.items() if kinds[::-1] in RIGHT),
        end_over_true=decisions["end", "true"],
        true_over_end=decisions["true", "end"],
        false_over_end=decisions["false", "end"],
        pairs=len(pairs),
        prompts_with_pairs=with_pairs / len(trees),
        questions=len(questions),
        questions_right=sum(right is True for right in questions),
        questions_nonsense=sum(right is None for right in questions),
        audit=quality.worst_verdict(checks).value,
        checks=quality.dump(checks),
        decisions={" > ".join(kinds): number for kinds, number in decisions.most_common()},
        scorer_auc=_scorer_auc(trees, world, config),
        estimated_auc=quality_metrics.get("estimated_auc"),
    )


def _scorer_auc(trees: Sequence[Tree], world: ProfileWorld, config: RunConfig) -> float | None:
    """Compute how well the first scorer's z separates the true things of all trees from the false ones."""
    name = config.scorer.used.split("+")[0]
    by_truth: dict[bool, list[float]] = {True: [], False: []}
    for tree in trees:
        evidence = Evidence.of(tree.nodes, config.method.reward, name)
        for thing in evidence.mentions:
            is_true = world.picture_of(tree.prompt).truth(thing) == "grounded"
            by_truth[is_true].append(evidence.significance(evidence.scores[thing], name))
    return auc(by_truth[True], by_truth[False]) if all(by_truth.values()) else None


def _scorers(world: ProfileWorld, config: RunConfig) -> ScorerGroup:
    names = [config.scorer.name, *(other.name for other in config.scorer.extra)]
    return ScorerGroup([world.judge(name, second=number > 0) for number, name in enumerate(names)])


def decision(pair: Pair, nodes: Mapping[str, Node], world: ProfileWorld) -> tuple[str, str]:
    """Name the kinds of what a pair prefers and what it refuses: true, false, mood, repeat or end.

    Pairs of siblings differ in their last sentence. Pairs of whole responses count as true
    over false where the chosen response has fewer false claims, or as many and more true ones.
    """
    sides = [[nodes[part] for part in path_ids(side.node_id)] for side in (pair.chosen, pair.rejected)]
    picture = world.picture_of(pair.prompt)
    if sides[0][:-1] == sides[1][:-1]:
        kinds = [_kind(path, picture, world) for path in sides]
        return kinds[0], kinds[1]
    chosen, rejected = (_claims(path, picture, world) for path in sides)
    better = (-chosen["false"], chosen["true"])
    worse = (-rejected["false"], rejected["true"])
    return ("true", "false") if better > worse else ("false", "true") if better < worse else ("true", "true")


def _kind(path: Sequence[Node], picture: Picture, world: ProfileWorld) -> str:
    *earlier, last = path
    if not last.sentence:
        return "end"
    sentence = world.sentences[last.sentence]
    if not sentence.claims:
        return "mood"
    if sentence.truth(picture) != "grounded":
        return "false"
    said = {claim for node in earlier if node.sentence for claim in world.sentences[node.sentence].claims}
    return "repeat" if set(sentence.claims) <= said else "true"


def _claims(path: Sequence[Node], picture: Picture, world: ProfileWorld) -> Counter[str]:
    """Count the distinct true and false claims of a response."""
    claims = {claim for node in path if node.sentence for claim in world.sentences[node.sentence].claims}
    return Counter("true" if picture.truth(claim) == "grounded" else "false" for claim in claims)


def _questions(
    world: ProfileWorld, trees: Sequence[Any], claims: ClaimScorer, config: RunConfig
) -> Iterable[bool | None]:
    """Yield for each question whether its answer is right; None where it asks about no depictable thing."""
    if not config.method.pairs.questions.per_prompt:
        return
    settings = config.method.pairs.questions
    asked: dict[str, list[Pair]] = {}
    for pair in text_pairs(world.prompts, [tree.nodes for tree in trees], claims, config, settings):
        name = pair.prompt.prompt_id.rpartition("?")[0]
        kinds = nouns_in(pair.prompt.text)
        margin = 0.0
        if world.profile.answers is not None and kinds:
            margin = world.answer(pair.prompt, kinds[0]) * (1 if pair.chosen == settings.yes else -1)
        sides = [
            Response("0", (0,), logprob, text, 1, 0.0, True)
            for text, logprob in ((pair.chosen, margin), (pair.rejected, 0.0))
        ]
        asked.setdefault(name, []).append(Pair(pair.prompt, 1, *sides))
    for name, about_one in asked.items():
        for pair in select_informative(about_one, settings, f"{config.seed}:1:{name}"):
            yield _is_right(pair, world, settings.yes)


def _is_right(pair: Pair, world: ProfileWorld, yes: str) -> bool | None:
    picture, subject = world.picture_of(pair.prompt), pair.prompt.text.lower().rstrip("?") + " "
    claims = nouns_in(subject) or places_in(subject)
    if not claims:
        return None
    return (picture.truth(claims[0]) == "grounded") == (pair.chosen.text == yes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="profile files, and key=value settings")
    parser.add_argument("--prompts", type=int, default=150, help="pictures of each profile (150)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print everything, for programs")
    options = parser.parse_args()
    overrides = [word for word in options.words if "=" in word]
    paths = [Path(word) for word in options.words if "=" not in word] or sorted(PROFILES.glob("*.yaml"))
    try:
        config = load_config(None, overrides, base=BASE)
        found = [run_profile(read_profile(path), config, options.prompts, options.seed) for path in paths]
    except CsrError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in found], indent=1))
    else:
        _print(found)
    return 0


def _print(found: Sequence[Outcome]) -> None:
    titles = (
        "profile",
        "right : wrong",
        "END > true",
        "true > END",
        "false > END",
        "pairs",
        "prompts",
        "questions",
        "right",
        "nonsense",
        "AUC",
        "estimated",
        "audit",
    )
    rows = [
        (
            o.profile,
            f"{o.right} : {o.wrong}",
            f"{o.end_over_true} ({o.end_over_true / max(o.pairs, 1):.1%})",
            str(o.true_over_end),
            str(o.false_over_end),
            str(o.pairs),
            f"{o.prompts_with_pairs:.0%}",
            str(o.questions),
            f"{o.questions_right / o.questions:.1%}" if o.questions else "-",
            str(o.questions_nonsense),
            "-" if o.scorer_auc is None else f"{o.scorer_auc:.2f}",
            "-" if o.estimated_auc is None else f"{o.estimated_auc:.2f}",
            o.audit
            + "".join(
                f"; {check['metric']} {check['value']:.2f}: {check['verdict']}"
                for check in o.checks
                if check["verdict"] != "go"
            ),
        )
        for o in found
    ]
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    for row in (titles, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
