"""Measure the policy and the judges of ``prose`` and compare every number with its bound.

CHAIR's own code (:func:`csr_vlm.world.truth.reader_of`) finds the objects that a sentence names.
A sentence is true if all of them are present, and false if one is absent. A claim is one kind that
a sentence names; a judge scores it as "a photo of a fork". With v the cosine,

    contrast = v(own picture, text) - mean over other pictures of v(picture, text)

and the AUC is the probability that a true text has a higher contrast than a false one.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csr_vlm.config.schema import ClaimsConfig, ModelConfig, ScorerConfig
from csr_vlm.core.batching import batched
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import Finish, Prompt, negatives_column
from csr_vlm.evaluation import chair
from csr_vlm.evaluation.statistics import Metric, auc, pooled
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.loading import load_policy
from csr_vlm.scoring.registry import load_scorer
from csr_vlm.scoring.scorer import ScorerGroup
from csr_vlm.world.dataset import write_images
from csr_vlm.world.prose_scenes import PROSE, ProseScene
from csr_vlm.world.scenes import Split, check_for_evaluation, make_scenes
from csr_vlm.world.truth import reader_of

JUDGES = ("clip", "clip_b")
OTHER_PICTURES = 16
"""Number of other pictures in the contrast."""
_BATCH = 128
_END = re.compile(r"(?<=\.)\s+")
_MOOD = re.compile(r"\b(?:atmosphere|mood|feeling|impression|moment|feels)\b")
_BACKGROUND = re.compile(r"\b(?:in the background|in the distance|further back|behind all|far behind|in the back)\b")
_RELATION = re.compile(
    r"\b(?:to the (?:left|right) of the|above the|below the|next to the|close to the|beside the|near the"
    r"|far from the|around the|shares? this part of the scene)\b"
    r"|^the [^,]*\b(?:to the (?:left|right) of|above|below|next to|close to|beside|near)\b"
)
_SIDE = re.compile(r"\bnear the (?:top|bottom|center)\b")


def sentences_of(text: str) -> list[str]:
    r"""Split a response after full stops; each list item is a sentence.

    Example:
        >>> sentences_of("A list:\n- A red boat.\n- Two trees.")
        ['A list:\n- A red boat.', '- Two trees.']
    """
    return [part for part in _END.split(text.strip()) if part.strip(" .-")]


def kind_of(sentence: str, position: int) -> str:
    """Classify a sentence of a response by its words.

    Returns:
        ``lead`` for the first one, else ``mood``, ``background``, ``item`` (of a list), ``relation``
        (seen from something named before) or ``detail``.

    Example:
        >>> kind_of("The mood seems calm.", 4), kind_of("The dog is near a cat.", 2)
        ('mood', 'relation')
    """
    lowered = sentence.lower()
    if position == 0:
        return "lead"
    if _MOOD.search(lowered):
        return "mood"
    if _BACKGROUND.search(lowered):
        return "background"
    if lowered.startswith("-"):
        return "item"
    return "relation" if _RELATION.search(_SIDE.sub("", lowered)) else "detail"


@dataclass(frozen=True)
class Response:
    """Hold what the policy wrote about a scene."""

    scene: ProseScene
    prompt: Prompt
    text: str
    finished: bool


@dataclass(frozen=True)
class ScoredText:
    """Hold a sentence or a claim of a response with its contrast by a judge."""

    kind: str
    """Kind of the sentence."""
    position: int
    true: bool | None
    """None where nothing is named."""
    contrast: float


def describe(
    engine: TransformersEngine, seed: int, num_scenes: int, directory: Path, tick: Callable[[int], None]
) -> list[Response]:
    """Return the policy's greedy descriptions of development scenes; the pictures go to ``directory``."""
    responses: list[Response] = []
    for scenes in batched(make_scenes(PROSE, Split.DEVELOPMENT, seed, num_scenes), _BATCH):
        prompts = write_images(scenes, directory)
        written = engine.respond(prompts, PROSE.max_new_tokens)
        engine.forget()
        for scene, prompt, one in zip(scenes, prompts, written, strict=True):
            assert isinstance(scene, ProseScene)
            responses.append(Response(scene, prompt, one.text.strip(), one.finish is Finish.EOS))
        tick(len(scenes))
    return responses


def policy_metrics(responses: Sequence[Response]) -> dict[str, Metric]:
    """Compute CHAIR's rates and the shape of responses.

    Returns:
        ``chair_s``, ``chair_i``, ``recall``, ``unfinished`` (share), ``sentences`` and ``words`` (means),
        ``lists`` (share), and ``false_at_N``: hallucinated mentions / mentions in sentence N, from 1.
    """
    reader = reader_of(PROSE)
    tallies: list[dict[str, tuple[float, float]]] = []
    for one in responses:
        parts = sentences_of(one.text)
        checked = chair.check_mentions(reader.read(one.text), one.scene.kinds)
        row: dict[str, tuple[float, float]] = {
            **chair.tallies(checked, one.scene.kinds),
            "unfinished": (int(not one.finished), 1),
            "sentences": (len(parts), 1),
            "words": (len(one.text.split()), 1),
            "lists": (int("\n-" in one.text), 1),
        }
        for position, part in enumerate(parts[:7], start=1):
            checked = chair.check_mentions(reader.read(part), one.scene.kinds)
            row[f"false_at_{position}"] = (len(checked.hallucinated), len(checked.mentioned))
        tallies.append(row)
    names = sorted({name for row in tallies for name in row}, key=lambda name: (name.startswith("false"), name))
    return pooled([{name: row.get(name, (0, 0)) for name in names} for row in tallies])


def score_texts(scorer: ScorerGroup, responses: Sequence[Response], by_claim: bool) -> list[ScoredText]:
    """Score every sentence, or every claim, of the responses.

    The other pictures of the contrast come from the same batch.
    """
    reader = reader_of(PROSE)
    scored: list[ScoredText] = []
    for batch in batched(responses, _BATCH):
        items: list[tuple[Prompt, str]] = []
        labels: list[tuple[str, int, bool | None]] = []
        for one in batch:
            for position, part in enumerate(sentences_of(one.text)):
                kind = kind_of(part, position)
                checked = chair.check_mentions(reader.read(part), one.scene.kinds)
                if by_claim:
                    for name in dict.fromkeys(checked.mentioned):
                        items.append((one.prompt, ClaimsConfig().caption_of(name)))
                        labels.append((kind, position, name not in checked.hallucinated))
                else:
                    items.append((one.prompt, part.removeprefix("- ")))
                    labels.append((kind, position, not checked.hallucinated if checked.mentioned else None))
        scorer.set_negative_images([one.prompt for one in batch], OTHER_PICTURES)
        for (kind, position, true), row in zip(labels, scorer.score(items), strict=True):
            contrast = row[scorer.name] - row[negatives_column(scorer.name)]
            scored.append(ScoredText(kind, position, true, contrast))
        scorer.forget()
    return scored


_DETAILS = frozenset({"detail", "relation", "item", "background"})
"""Kinds of sentences that count as details: all but leads and mood."""


def judge_metrics(sentences: Sequence[ScoredText], claims: Sequence[ScoredText]) -> dict[str, float]:
    """Compute how well a judge separates true from false, and its mean contrast by kind of sentence.

    Returns:
        ``auc_sentence`` and ``auc_claim`` (claims outside leads); mean contrasts ``lead``,
        ``true_detail``, ``false_detail``, ``mood``, ``true_claim``, ``false_claim``; the ratios
        ``true_to_lead``, ``false_to_true`` and ``mood_to_true``.
    """
    true, false = _split(sentences)
    true_claims, false_claims = _split(claims)
    means = {
        "lead": _mean(s.contrast for s in sentences if s.kind == "lead" and s.true),
        "true_detail": _mean(true),
        "false_detail": _mean(false),
        "mood": _mean(s.contrast for s in sentences if s.kind == "mood"),
        "true_claim": _mean(true_claims),
        "false_claim": _mean(false_claims),
    }
    return {
        "auc_sentence": auc(true, false),
        "auc_claim": auc(true_claims, false_claims),
        **means,
        "true_to_lead": means["true_detail"] / means["lead"],
        "false_to_true": means["false_detail"] / means["true_detail"],
        "mood_to_true": means["mood"] / means["true_detail"],
    }


def _split(scored: Sequence[ScoredText]) -> tuple[list[float], list[float]]:
    """Return the contrasts of true and of false texts among the details."""
    asked = [one for one in scored if one.kind in _DETAILS and one.true is not None]
    return [one.contrast for one in asked if one.true], [one.contrast for one in asked if not one.true]


def _mean(values: Any) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else float("nan")


def error_correlation(ones: Sequence[ScoredText], others: Sequence[ScoredText]) -> float:
    """Return the correlation of two judges' errors on the same texts.

    The error of a text is its contrast minus the mean contrast of all true, or all false, texts.
    """
    residuals = []
    for scored in (ones, others):
        values = np.array([one.contrast for one in scored if one.true is not None and one.kind in _DETAILS])
        truth = np.array([one.true for one in scored if one.true is not None and one.kind in _DETAILS])
        for label in (True, False):
            if (truth == label).any():
                values[truth == label] -= values[truth == label].mean()
        residuals.append(values)
    return float(np.corrcoef(residuals[0], residuals[1])[0, 1])


@dataclass(frozen=True)
class Bound:
    """Hold a measured number and its required range, ends included; None for no limit."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool:
        """Return whether the number lies in the range; an undefined number does not."""
        if self.value is None or self.value != self.value:
            return False
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    def dump(self) -> dict[str, Any]:
        """Return the bound as JSON."""
        return {"name": self.name, "value": self.value, "low": self.low, "high": self.high, "met": self.met}


_SHARED_ERRORS = 0.85
"""Highest correlation at which the errors of two judges count as only partly shared."""
_MEGABYTES = 12.0


def bounds(
    policy: Mapping[str, Metric],
    judges: Mapping[str, Mapping[str, float]],
    shared: Mapping[str, float],
    megabytes: float,
) -> list[Bound]:
    """List every number of the world with its bound.

    Args:
        policy: Result of :func:`policy_metrics`.
        judges: Results of :func:`judge_metrics` by ``clip`` and ``clip_b``.
        shared: Results of :func:`error_correlation` by ``sentence`` and ``claim``.
        megabytes: Size of all weights.
    """
    first, second = judges["clip"], judges["clip_b"]
    return [
        Bound("policy chair_s", policy["chair_s"].value, 0.40, 0.65),
        Bound("policy chair_i", policy["chair_i"].value, 0.10, 0.20),
        Bound("policy recall", policy["recall"].value, 0.75),
        Bound("policy unfinished", policy["unfinished"].value, None, 0.05),
        Bound("policy sentences", policy["sentences"].value, 4.0),
        Bound("clip auc_sentence", first["auc_sentence"], 0.65, 0.80),
        Bound("clip auc_claim", first["auc_claim"], 0.78, 0.90),
        Bound("clip true_to_lead", first["true_to_lead"], 0.3, 0.6),
        Bound("clip false_to_true", first["false_to_true"], 0.6, 0.9),
        Bound("clip mood_to_true", first["mood_to_true"], None, first["false_to_true"]),
        Bound("clip_b auc_sentence", second["auc_sentence"], 0.5, first["auc_sentence"]),
        Bound("clip_b auc_claim", second["auc_claim"], 0.5, first["auc_claim"]),
        Bound("shared errors, sentences", shared["sentence"], None, _SHARED_ERRORS),
        Bound("shared errors, claims", shared["claim"], None, _SHARED_ERRORS),
        Bound("weights, MB", megabytes, None, _MEGABYTES),
    ]


def check_prose(directory: Path, num_scenes: int, seed: int, reporter: Reporter) -> dict[str, Any]:
    """Measure the models in ``llava/``, ``clip/`` and ``clip_b/`` on development scenes.

    Returns:
        ``policy``: metrics with intervals; ``judges``: name to :func:`judge_metrics`; ``shared_errors``;
        ``bounds``: each number with its range and whether it is met; ``protocol``; ``examples``: responses.
    """
    check_for_evaluation(Split.DEVELOPMENT, seed)
    engine = TransformersEngine(load_policy(ModelConfig(path=str(directory / "llava")), adapter=None))
    with tempfile.TemporaryDirectory() as pictures:
        with reporter.stage("describing", num_scenes) as progress:
            responses = describe(engine, seed, num_scenes, Path(pictures), progress.advance)
        policy = policy_metrics(responses)
        sentences, claims = {}, {}
        with reporter.stage("judging", len(JUDGES)) as progress:
            for name in JUDGES:
                scorer = load_scorer(ScorerConfig(path=str(directory / name)), str(engine.policy.device))
                sentences[name] = score_texts(scorer, responses, by_claim=False)
                claims[name] = score_texts(scorer, responses, by_claim=True)
                progress.advance()
    judges = {name: judge_metrics(sentences[name], claims[name]) for name in JUDGES}
    shared = {
        "sentence": error_correlation(*(sentences[name] for name in JUDGES)),
        "claim": error_correlation(*(claims[name] for name in JUDGES)),
    }
    megabytes = sum(path.stat().st_size for path in directory.glob("*/*.safetensors")) / 1e6
    return {
        "policy": {name: metric.dump() for name, metric in policy.items()},
        "judges": judges,
        "counts": _counts(sentences["clip"], claims["clip"]),
        "shared_errors": shared,
        "bounds": [bound.dump() for bound in bounds(policy, judges, shared, megabytes)],
        "protocol": {
            "world": PROSE.name,
            "split": Split.DEVELOPMENT.value,
            "seed": seed,
            "num_scenes": num_scenes,
            "decoding": "greedy",
            "max_new_tokens": PROSE.max_new_tokens,
            "words": reader_of(PROSE).rule.name,
            "synonyms": reader_of(PROSE).table.sha256,
            "other_pictures": OTHER_PICTURES,
        },
        "examples": [one.text for one in responses[:5]],
    }


def _counts(sentences: Sequence[ScoredText], claims: Sequence[ScoredText]) -> dict[str, int]:
    """Count the texts behind each AUC, and the sentences of each kind."""
    true, false = _split(sentences)
    true_claims, false_claims = _split(claims)
    kinds = {kind: sum(one.kind == kind for one in sentences) for kind in sorted({one.kind for one in sentences})}
    return {
        "true_details": len(true),
        "false_details": len(false),
        "true_claims": len(true_claims),
        "false_claims": len(false_claims),
        **kinds,
    }
