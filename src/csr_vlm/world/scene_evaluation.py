"""Evaluate a policy on scenes with known contents.

CHAIR_S, CHAIR_I and recall are those of :mod:`csr_vlm.evaluation.chair`; a mention is the
name of a kind of object. Recall and the other metrics are reported beside CHAIR because
short responses have few hallucinations. Answers are parsed by POPE's strict parser.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Finish, Prompt
from csr_vlm.evaluation import chair
from csr_vlm.evaluation.claim_marker import ClaimMarker, doubted_tally
from csr_vlm.evaluation.pope import parse_strict
from csr_vlm.evaluation.statistics import Metric, Tally, auc, pooled
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.scoring.scorer import ScorerGroup
from csr_vlm.world.corpus import absent_companions, sentence, yes_no_question
from csr_vlm.world.dataset import write_images
from csr_vlm.world.scenes import Scene, Split, World, check_for_evaluation, make_scenes, random_stream
from csr_vlm.world.truth import Judgement, judge

_BATCH = 256


@dataclass(frozen=True)
class Described:
    """Hold a scene, the policy's description of it, and the comparison of the two."""

    scene: Scene
    text: str
    complete: bool
    judgement: Judgement
    sentences: Sequence[tuple[str, float]] = ()
    """Sentences of the text with the R_I of each; empty without a scorer."""
    evidence: Mapping[str, float] | None = None
    """Evidence of each claim, in nats; None if it was not weighed."""

    @property
    def relevance(self) -> float | None:
        """Return the mean R_I of the sentences; None without a scorer or a sentence."""
        return float(np.mean([score for _, score in self.sentences])) if self.sentences else None


def evaluate(
    world: World,
    engine: TransformersEngine,
    scorer: ScorerGroup | None,
    *,
    split: Split,
    seed: int,
    num_scenes: int,
    temperature: float = 0.0,
    tick: Callable[[int], None] = lambda done: None,
    marker_among: Callable[[Sequence[Prompt]], ClaimMarker] | None = None,
) -> dict[str, Any]:
    """Let the policy describe scenes and answer questions about them, and compute metrics.

    Args:
        split: Development or test.
        temperature: 0 for greedy decoding.
        tick: Called with the number of scenes finished since the last call.
        marker_among: Returns what weighs the claims of descriptions by comparing with the images of some prompts;
            None to leave that out.

    Returns:
        ``metrics`` (name to value, interval and n), ``protocol`` and ``rows`` (one per scene).

    Raises:
        CsrError: The split is used for training, or the seed belongs to the other split.
    """
    check_for_evaluation(split, seed)
    described: list[Described] = []
    answers: list[dict[str, bool]] = []
    for scenes in batched(make_scenes(world, split, seed, num_scenes), _BATCH):
        with tempfile.TemporaryDirectory() as directory:
            prompts = write_images(scenes, Path(directory))
            marker = marker_among(prompts) if marker_among is not None else None
            described += _describe(world, engine, scorer, scenes, prompts, temperature, marker)
            answers += _question(world, engine, scenes, prompts)
        engine.forget()
        if scorer is not None:
            scorer.forget()
        tick(len(scenes))
    return {
        "metrics": {name: metric.dump() for name, metric in summarize(world, described, answers).items()},
        "protocol": {
            "world": world.name,
            "split": split.value,
            "seed": seed,
            "num_scenes": num_scenes,
            "decoding": "greedy" if temperature == 0 else f"sampled at temperature {temperature}",
            "max_new_tokens": world.max_new_tokens,
            "interval": "95 % over scenes",
        },
        "rows": [
            {
                "id": item.scene.scene_id,
                "text": item.text,
                "hallucinated": list(item.judgement.hallucinated),
                "relevance": item.relevance,
                "sentences": item.sentences,
                **({} if item.evidence is None else {"evidence": item.evidence}),
                "tallies": tallies(world, item, answered),
            }
            for item, answered in zip(described, answers, strict=True)
        ],
    }


def _describe(
    world: World,
    engine: TransformersEngine,
    scorer: ScorerGroup | None,
    scenes: Sequence[Scene],
    prompts: Sequence[Prompt],
    temperature: float,
    marker: ClaimMarker | None,
) -> list[Described]:
    responses = engine.respond(prompts, world.max_new_tokens, temperature)
    scored: list[list[tuple[str, float]]] = [[] for _ in prompts]
    if scorer is not None:
        scored = sentence_relevance(scorer, prompts, [response.text for response in responses])
    weighed = [
        None if marker is None else marker.evidence(p, r.sentence) for p, r in zip(prompts, responses, strict=True)
    ]
    return [
        Described(scene, r.sentence, r.finish is Finish.EOS, judge(world, scene, r.text), sentences, evidence)
        for scene, r, sentences, evidence in zip(scenes, responses, scored, weighed, strict=True)
    ]


def sentence_relevance(
    scorer: ScorerGroup, prompts: Sequence[Prompt], texts: Sequence[str]
) -> list[list[tuple[str, float]]]:
    """Return the sentences of each text with their R_I (eq. 3), in 0..100."""
    split = [[part.strip() + "." for part in text.split(".") if part.strip()] for text in texts]
    items = [(prompt, part) for prompt, sentences in zip(prompts, split, strict=True) for part in sentences]
    scores = iter(scorer.score(items))
    return [[(part, max(100 * next(scores)[scorer.name], 0.0)) for part in sentences] for sentences in split]


def _question(
    world: World, engine: TransformersEngine, scenes: Sequence[Scene], prompts: Sequence[Prompt]
) -> list[dict[str, bool]]:
    """Ask about a present object, an absent object and an absent companion of each scene.

    Returns:
        For each scene, a map from the kind of question to whether the answer was correct; an
        answer that is neither yes nor no counts as wrong.
    """
    asked: list[tuple[int, str, bool, Prompt]] = []
    for index, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
        rng = random_stream("questions", scene.scene_id)
        companions = sorted(absent_companions(world, scene))
        absent = [kind for kind in world.kinds if kind not in scene.kinds and kind not in companions]
        pools = {"present": sorted(scene.kinds), "absent": absent, "companion": companions}
        for name, pool in pools.items():
            if pool:
                question = yes_no_question(pool[rng.integers(len(pool))])
                asked.append(
                    (index, name, name == "present", Prompt(f"{scene.scene_id}/{name}", prompt.image, question))
                )
    answers = engine.respond([prompt for *_, prompt in asked], max_new_tokens=8)
    correct: list[dict[str, bool]] = [{} for _ in scenes]
    for (index, name, truth, _), answer in zip(asked, answers, strict=True):
        correct[index][name] = parse_strict(answer.text) is truth
    return correct


def tallies(world: World, item: Described, answers: Mapping[str, bool]) -> dict[str, Tally]:
    """Compute the contribution of one scene to the numerator and the denominator of each metric."""
    judged, kinds = item.judgement, item.scene.kinds
    triggers = {prior.companion: trigger for trigger, prior in world.companions.items()}
    companions = {kind for kind in kinds if triggers.get(kind) in kinds}
    return {
        **chair.tallies(judged, kinds),
        "companion_recall": (len(judged.recalled & companions), len(companions)),
        "attributes_right": (judged.colors_right, judged.colors_right + judged.colors_wrong),
        "repeats": (judged.repeats, 1),
        "words": (judged.words, 1),
        "complete": (int(item.complete), 1),
        "relevance": (item.relevance or 0.0, int(item.relevance is not None)),
        **({} if item.evidence is None else {"doubted": doubted_tally(item.evidence)}),
        **{f"yes_no_{name}": (int(correct), 1) for name, correct in answers.items()},
    }


def summarize(world: World, described: Sequence[Described], answers: Sequence[dict[str, bool]]) -> dict[str, Metric]:
    """Pool the tallies of all scenes into metrics."""
    return pooled([tallies(world, item, answered) for item, answered in zip(described, answers, strict=True)])


def evaluate_scorer(world: World, scorer: ScorerGroup, *, split: Split, seed: int, num_scenes: int) -> dict[str, float]:
    """Measure how well the scorer's cosines separate true from false sentences.

    Returns:
        ``auc_absent`` (against sentences about absent kinds) and ``auc_attribute`` (against
        sentences with the wrong color), each the probability that a true sentence about a
        scene scores higher than a false one about any scene.

    Raises:
        CsrError: The split is used for training, or the seed belongs to the other split.
    """
    check_for_evaluation(split, seed)
    true: list[float] = []
    absent: list[float] = []
    recolored: list[float] = []
    for scenes in batched(make_scenes(world, split, seed, num_scenes), _BATCH):
        with tempfile.TemporaryDirectory() as directory:
            prompts = write_images(scenes, Path(directory))
            items = [(p, k, c) for p in prompts for k in world.kinds for c in world.colors]
            scores = scorer.score([(prompt, sentence(world, (kind, color))) for prompt, kind, color in items])
        by_id = {scene.scene_id: scene for scene in scenes}
        for (prompt, kind, color), cosines in zip(items, scores, strict=True):
            truth = by_id[prompt.prompt_id].color_of(kind)
            (absent if truth is None else true if truth == color else recolored).append(cosines[scorer.name])
        scorer.forget()
    return {"auc_absent": auc(true, absent), "auc_attribute": auc(true, recolored)}
