"""Measuring a policy on scenes whose truth is known.

CHAIR_S, CHAIR_I and recall are those of :mod:`csr_vlm.evaluation.chair`; a mention is a
kind of object named by its word. Recall and the rest stand beside CHAIR, because silence
hallucinates nothing. Answers to questions are read by POPE's strict parser.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csr_vlm.core.batching import batched
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Finish, Prompt
from csr_vlm.evaluation import chair
from csr_vlm.evaluation.pope import parse_strict
from csr_vlm.evaluation.statistics import Metric, Tally, auc, pooled
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.scoring.scorer import ScorerGroup
from csr_vlm.world.corpus import absent_companions, sentence, yes_no_question
from csr_vlm.world.dataset import write_images
from csr_vlm.world.scenes import Scene, Split, World, make_scenes, random_stream
from csr_vlm.world.truth import Judgement, judge

_ALLOWED = (Split.DEVELOPMENT, Split.TEST)
_BATCH = 256


@dataclass(frozen=True)
class Described:
    """A scene, what the policy wrote about it, and how that compares."""

    scene: Scene
    text: str
    complete: bool
    judgement: Judgement
    sentences: Sequence[tuple[str, float]] = ()
    """With the R_I of each; empty without a scorer."""

    @property
    def relevance(self) -> float | None:
        """Mean R_I of its sentences; None without a scorer or a sentence."""
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
            "max_new_tokens": world.max_new_tokens,
            "interval": "95 % percentile bootstrap over scenes",
        },
        "rows": [
            {
                "id": item.scene.scene_id,
                "text": item.text,
                "hallucinated": list(item.judgement.hallucinated),
                "relevance": item.relevance,
                "sentences": item.sentences,
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
) -> list[Described]:
    responses = engine.respond(prompts, world.max_new_tokens, temperature)
    said: list[list[tuple[str, float]]] = [[] for _ in prompts]
    if scorer is not None:
        said = sentence_relevance(scorer, prompts, [response.text for response in responses])
    return [
        Described(scene, r.sentence, r.finish is Finish.EOS, judge(world, scene, r.text), mine)
        for scene, r, mine in zip(scenes, responses, said, strict=True)
    ]


def sentence_relevance(
    scorer: ScorerGroup, prompts: Sequence[Prompt], texts: Sequence[str]
) -> list[list[tuple[str, float]]]:
    """Each text's sentences with their R_I (eq. 3)."""
    parts = [[part.strip() + "." for part in text.split(".") if part.strip()] for text in texts]
    items = [(prompt, part) for prompt, mine in zip(prompts, parts, strict=True) for part in mine]
    scores = iter(scorer.score(items))
    return [[(part, max(100 * next(scores)[scorer.name], 0.0)) for part in mine] for mine in parts]


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


def tallies(world: World, item: Described, answers: Mapping[str, bool]) -> dict[str, Tally]:
    """What one scene adds to the numerator and the denominator of each metric."""
    judged, kinds = item.judgement, item.scene.kinds
    companions = {habit.companion: trigger for trigger, habit in world.companions.items()}
    tempting = {kind for kind in kinds if companions.get(kind) in kinds}
    return {
        **chair.tallies(judged, kinds),
        "companion_recall": (len(judged.recalled & tempting), len(tempting)),
        "attributes_right": (judged.colors_right, judged.colors_right + judged.colors_wrong),
        "repeats": (judged.repeats, 1),
        "words": (judged.words, 1),
        "complete": (int(item.complete), 1),
        "relevance": (item.relevance or 0.0, int(item.relevance is not None)),
        **{f"yes_no_{name}": (int(right), 1) for name, right in answers.items()},
    }


def summarise(world: World, described: Sequence[Described], answers: Sequence[dict[str, bool]]) -> dict[str, Metric]:
    """Pool what each scene adds into metrics."""
    return pooled([tallies(world, item, answered) for item, answered in zip(described, answers, strict=True)])


def evaluate_scorer(world: World, scorer: ScorerGroup, *, split: Split, seed: int, num_scenes: int) -> dict[str, float]:
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
            scores = scorer.score([(prompt, sentence(world, (kind, color))) for prompt, kind, color in items])
        by_id = {scene.scene_id: scene for scene in scenes}
        for (prompt, kind, color), cosines in zip(items, scores, strict=True):
            truth = by_id[prompt.prompt_id].color_of(kind)
            (absent if truth is None else true if truth == color else recolored).append(cosines[scorer.name])
        scorer.forget()
    return {"auc_absent": auc(true, absent), "auc_attribute": auc(true, recolored)}
