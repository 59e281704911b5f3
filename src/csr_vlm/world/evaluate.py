"""Measuring a policy on scenes whose truth is known.

CHAIR_S, CHAIR_I and recall are those of :mod:`csr_vlm.evaluation.chair`; a mention is a
kind of object named by its word. Recall and the rest stand beside CHAIR, because silence
hallucinates nothing. Answers to questions are read by POPE's strict parser.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csr_vlm.batches import batched
from csr_vlm.errors import CsrError
from csr_vlm.evaluation.chair import rates
from csr_vlm.evaluation.pope import parse_strict
from csr_vlm.evaluation.statistics import Metric, ratio
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.records import Finish, Prompt
from csr_vlm.scoring.clip import ClipScorer
from csr_vlm.world.corpus import absent_companions, sentence, yes_no_question
from csr_vlm.world.dataset import write_images
from csr_vlm.world.scenes import Scene, Split, World, make_scenes, random_stream
from csr_vlm.world.truth import Judgement, judge

MAX_NEW_TOKENS = 96
_ALLOWED = (Split.DEVELOPMENT, Split.TEST)
_BATCH = 256


@dataclass(frozen=True)
class Described:
    """A scene, what the policy wrote about it, and how that compares."""

    scene: Scene
    text: str
    complete: bool
    judgement: Judgement
    relevance: float | None
    """Mean R_I of its sentences; None without a scorer or a sentence."""


def evaluate(
    world: World,
    engine: TransformersEngine,
    scorer: ClipScorer | None,
    *,
    split: Split,
    seed: int,
    num_scenes: int,
    temperature: float = 0.0,
    tick: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Describe scenes and question the policy about them.

    Args:
        split: Development or test; anything else is refused.
        temperature: 0 for greedy decoding.
        tick: Called with the number of scenes finished since the last call.

    Returns:
        ``metrics`` (name to value, interval and n), ``protocol`` and ``rows`` (one a scene).
    """
    if split not in _ALLOWED:
        raise CsrError(f"scenes of the split {split.value!r} are not for evaluation", "use development or test")
    described: list[Described] = []
    answers: list[dict[str, bool]] = []
    for scenes in batched(make_scenes(world, split, seed, num_scenes), _BATCH):
        with tempfile.TemporaryDirectory() as directory:
            prompts = write_images(scenes, Path(directory))
            described += _describe(world, engine, scorer, scenes, prompts, temperature)
            answers += _question(world, engine, scenes, prompts)
        engine.forget()
        if scorer is not None:
            scorer.forget()
        tick(len(scenes))
    return {
        "metrics": {name: metric.dump() for name, metric in summarise(world, described, answers).items()},
        "protocol": {
            "world": world.name,
            "split": split.value,
            "seed": seed,
            "num_scenes": num_scenes,
            "decoding": "greedy" if temperature == 0 else f"sampled at temperature {temperature}",
            "max_new_tokens": MAX_NEW_TOKENS,
            "interval": "95 % percentile bootstrap over scenes",
        },
        "rows": [
            {
                "id": item.scene.scene_id,
                "text": item.text,
                "hallucinated": list(item.judgement.hallucinated),
                "relevance": item.relevance,
            }
            for item in described
        ],
    }


def _describe(
    world: World,
    engine: TransformersEngine,
    scorer: ClipScorer | None,
    scenes: Sequence[Scene],
    prompts: Sequence[Prompt],
    temperature: float,
) -> list[Described]:
    responses = engine.respond(prompts, MAX_NEW_TOKENS, temperature)
    relevance: list[float | None] = [None] * len(prompts)
    if scorer is not None:
        relevance = _relevance(scorer, prompts, [response.text for response in responses])
    return [
        Described(scene, r.sentence, r.finish is Finish.EOS, judge(world, scene, r.text), value)
        for scene, r, value in zip(scenes, responses, relevance, strict=True)
    ]


def _relevance(scorer: ClipScorer, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float | None]:
    """Mean R_I (eq. 3) over each text's sentences."""
    parts = [[part.strip() + "." for part in text.split(".") if part.strip()] for text in texts]
    items = [(prompt, part) for prompt, mine in zip(prompts, parts, strict=True) for part in mine]
    scores = iter(scorer.score(items))
    values = [[max(100 * next(scores)[scorer.name], 0.0) for _ in mine] for mine in parts]
    return [float(np.mean(mine)) if mine else None for mine in values]


def _question(
    world: World, engine: TransformersEngine, scenes: Sequence[Scene], prompts: Sequence[Prompt]
) -> list[dict[str, bool]]:
    """Ask each scene about a present, a random absent and a tempting absent object.

    Returns:
        For each scene, kind of question to whether the answer was right; an answer that is
        neither yes nor no is wrong.
    """
    asked: list[tuple[int, str, bool, Prompt]] = []
    for index, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
        rng = random_stream("questions", scene.scene_id)
        tempting = sorted(absent_companions(world, scene))
        absent = [kind for kind in world.kinds if kind not in scene.kinds and kind not in tempting]
        pools = {"present": sorted(scene.kinds), "absent": absent, "companion": tempting}
        for name, pool in pools.items():
            if pool:
                question = yes_no_question(pool[rng.integers(len(pool))])
                asked.append(
                    (index, name, name == "present", Prompt(f"{scene.scene_id}/{name}", prompt.image, question))
                )
    answers = engine.respond([prompt for *_, prompt in asked], max_new_tokens=8)
    right: list[dict[str, bool]] = [{} for _ in scenes]
    for (index, name, truth, _), answer in zip(asked, answers, strict=True):
        right[index][name] = parse_strict(answer.text) is truth
    return right


def summarise(world: World, described: Sequence[Described], answers: Sequence[dict[str, bool]]) -> dict[str, Metric]:
    """Pool the judgements of some responses into metrics."""
    judged = [item.judgement for item in described]
    ones = [1.0] * len(judged)
    companions = {habit.companion: trigger for trigger, habit in world.companions.items()}
    tempted = [{kind for kind in item.scene.kinds if companions.get(kind) in item.scene.kinds} for item in described]
    colored = [j.colors_right + j.colors_wrong for j in judged]
    scored = [item.relevance for item in described]
    metrics = {
        **rates(judged, [item.scene.kinds for item in described]),
        "companion_recall": ratio(
            [len(j.recalled & kinds) for j, kinds in zip(judged, tempted, strict=True)], [len(k) for k in tempted]
        ),
        "attributes_right": ratio([j.colors_right for j in judged], colored),
        "repeats": ratio([j.repeats for j in judged], ones),
        "words": ratio([j.words for j in judged], ones),
        "complete": ratio([item.complete for item in described], ones),
        "relevance": ratio([value or 0.0 for value in scored], [float(value is not None) for value in scored]),
    }
    for name in ("present", "absent", "companion"):
        rows = [row for row in answers if name in row]
        metrics[f"yes_no_{name}"] = ratio([row[name] for row in rows], [1.0] * len(rows))
    return metrics


def evaluate_scorer(world: World, scorer: ClipScorer, *, split: Split, seed: int, num_scenes: int) -> dict[str, float]:
    """Measure how well cosines separate what is there from what is not.

    Returns:
        ``auc_absent`` (against sentences about absent kinds) and ``auc_attribute`` (against
        sentences with the wrong colour), each the probability that a true sentence about a
        scene scores higher than a false one about any scene.
    """
    if split not in _ALLOWED:
        raise CsrError(f"scenes of the split {split.value!r} are not for evaluation", "use development or test")
    true: list[float] = []
    absent: list[float] = []
    recolored: list[float] = []
    for scenes in batched(make_scenes(world, split, seed, num_scenes), _BATCH):
        with tempfile.TemporaryDirectory() as directory:
            prompts = write_images(scenes, Path(directory))
            items = [(p, k, c) for p in prompts for k in world.kinds for c in world.colors]
            scores = scorer.score([(prompt, sentence(kind, color)) for prompt, kind, color in items])
        by_id = {scene.scene_id: scene for scene in scenes}
        for (prompt, kind, color), cosines in zip(items, scores, strict=True):
            truth = by_id[prompt.prompt_id].color_of(kind)
            (absent if truth is None else true if truth == color else recolored).append(cosines[scorer.name])
        scorer.forget()
    return {"auc_absent": auc(true, absent), "auc_attribute": auc(true, recolored)}


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """P(a positive > a negative) + P(equal) / 2."""
    ordered = np.sort(np.asarray(negative))
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).mean() / 2 / len(ordered))
