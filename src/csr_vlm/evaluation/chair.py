"""Compute CHAIR: the share of the objects named in captions that are not in the image.

    CHAIR_I = mentions of objects that are not in the image / mentions of objects
    CHAIR_S = captions with such a mention / captions
    recall  = objects of the images that their captions name / objects of the images

(Rohrbach et al. 2018, arXiv 1809.02156; recall as in OPERA's evaluator.) Mentions are pooled
over captions, and repetitions count. The objects of an image are the categories of its
instances and the objects named in its reference captions, extracted by the same
:class:`ObjectReader` that reads the captions under test. Everything that looks for objects in
text, the embedded world included, goes through :class:`ObjectReader` and :func:`check_mentions`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from csr_vlm.evaluation.objects import ObjectMentions, ObjectTable, find_objects
from csr_vlm.evaluation.statistics import Metric, Tally, pooled, share_of_sums
from csr_vlm.evaluation.words import WordRule, word_rule

_LENGTH_BINS = 4


@dataclass(frozen=True)
class ObjectReader:
    """Extract object mentions from text with a word rule and an object table."""

    rule: WordRule
    table: ObjectTable

    def read(self, text: str) -> ObjectMentions:
        return find_objects(self.rule.read(text), self.table)


@dataclass(frozen=True)
class Caption:
    """Represent a text about an image."""

    caption_id: str | int
    image_id: str | int
    text: str


@dataclass(frozen=True)
class CheckedMentions:
    """Hold the objects that a text mentions, compared with the objects in the image."""

    mentioned: tuple[str, ...]
    """Objects named, in order, repetitions included."""
    hallucinated: tuple[str, ...]
    """The mentioned objects that are not in the image, in order, repetitions included."""
    hallucinated_words: tuple[str, ...]
    """The words that named them."""
    hallucinated_positions: tuple[int, ...]
    """Their positions in the text, as in :class:`~csr_vlm.evaluation.objects.ObjectMentions`."""
    recalled: frozenset[str]
    """Objects that are both in the image and named."""


def check_mentions(mentions: ObjectMentions, truth: Set[str]) -> CheckedMentions:
    """Compare the objects that a text mentions with ``truth``, the objects in the image."""
    absent = [index for index, name in enumerate(mentions.objects) if name not in truth]
    return CheckedMentions(
        mentioned=mentions.objects,
        hallucinated=tuple(mentions.objects[index] for index in absent),
        hallucinated_words=tuple(mentions.words[index] for index in absent),
        hallucinated_positions=tuple(mentions.positions[index] for index in absent),
        recalled=frozenset(mentions.objects) & truth,
    )


@dataclass(frozen=True)
class CaptionScore:
    """Hold the CHAIR scores of one caption and everything they were computed from."""

    caption: Caption
    mentions: ObjectMentions
    checked: CheckedMentions
    truth: frozenset[str]
    """Objects in the image."""

    @property
    def chair_i(self) -> float:
        """Return the share of its mentions that are hallucinated; 0 without a mention."""
        return len(self.checked.hallucinated) / max(len(self.checked.mentioned), 1)

    @property
    def recall(self) -> float:
        """Return the share of the image's objects that it names; 0 where the image has none."""
        return len(self.checked.recalled) / max(len(self.truth), 1)

    @property
    def num_words(self) -> int:
        return len(self.caption.text.split())

    @property
    def tallies(self) -> dict[str, Tally]:
        """Return its contribution to each rate and to the mean lengths."""
        lengths = {"words": (self.num_words, 1), "tokens": (len(self.mentions.tokens), 1)}
        return {**tallies(self.checked, self.truth), **lengths}

    def dump(self) -> dict[str, Any]:
        return {
            "id": self.caption.caption_id,
            "image_id": self.caption.image_id,
            "mentioned": list(self.checked.mentioned),
            "hallucinated": list(self.checked.hallucinated),
            "matched_words": list(self.mentions.words),
            "hallucinated_words": list(self.checked.hallucinated_words),
            "truth": sorted(self.truth),
            "chair_s": int(bool(self.checked.hallucinated)),
            "chair_i": self.chair_i,
            "recall": self.recall,
            "words": self.num_words,
            "tokens": len(self.mentions.tokens),
        }


def evaluate(
    captions: Sequence[Caption], truth: Mapping[str | int, Set[str]], reader: ObjectReader
) -> list[CaptionScore]:
    """Score every caption.

    Args:
        truth: Image id to the objects in the image; must contain the image of every caption.
    """
    scores = []
    for caption in captions:
        objects = frozenset(truth[caption.image_id])
        mentions = reader.read(caption.text)
        scores.append(CaptionScore(caption, mentions, check_mentions(mentions, objects), objects))
    return scores


class ObjectCounts(Protocol):
    """Describe what CHAIR's rates need to know about a text; :class:`CheckedMentions` provides it."""

    @property
    def mentioned(self) -> Sized: ...
    @property
    def hallucinated(self) -> Sized: ...
    @property
    def recalled(self) -> Sized: ...


def tallies(checked: ObjectCounts, truth: Sized) -> dict[str, Tally]:
    """Return what one text adds to the numerator and the denominator of each rate."""
    return {
        "chair_s": (int(len(checked.hallucinated) > 0), 1),
        "chair_i": (len(checked.hallucinated), len(checked.mentioned)),
        "recall": (len(checked.recalled), len(truth)),
    }


def summarize(scores: Sequence[CaptionScore]) -> dict[str, Metric]:
    """Compute all metrics of a set of captions.

    Returns:
        ``chair_s``, ``chair_i``, ``recall``; ``f1``, the harmonic mean of 1 - CHAIR_I and
        recall; ``words`` and ``tokens``, the mean caption length in whitespace-separated words
        and in CHAIR's tokens after merging.
    """
    return {**pooled([score.tallies for score in scores]), "f1": _f1(scores)}


def evaluation_document(scores: Sequence[CaptionScore], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation in the form that runs store: ``metrics``, ``protocol`` and ``rows`` with tallies."""
    return {
        "metrics": {name: metric.dump() for name, metric in summarize(scores).items()},
        "protocol": dict(protocol),
        "rows": [{**score.dump(), "text": score.caption.text, "tallies": score.tallies} for score in scores],
    }


def object_reader(words: str, synonyms: Path | None = None, nltk_data: Path | None = None) -> tuple[ObjectReader, str]:
    """Return a reader with a word rule and a synonym file (default: the built-in table of COCO), and the table's name.

    Raises:
        CsrError: The rule is unknown, or a file cannot be read.
    """
    table = ObjectTable.read(synonyms, of_coco=words != "plain") if synonyms else ObjectTable.coco()
    return ObjectReader(word_rule(words, nltk_data), table), synonyms.name if synonyms else "csr-vlm's own"


def protocol(reader: ObjectReader, synonyms: str, annotations: Mapping[str, str]) -> dict[str, Any]:
    """Return the choices that CHAIR's numbers depend on.

    Args:
        synonyms: Name of the synonym table.
        annotations: Name to SHA-256 of the annotation files.
    """
    return {
        "metric": "CHAIR",
        "words": {"rule": reader.rule.name, **reader.rule.source},
        "synonyms": {"file": synonyms, "sha256": reader.table.sha256},
        "annotations": dict(annotations),
        "interval": "95 % over captions",
    }


def _f1(scores: Sequence[CaptionScore]) -> Metric:
    columns = [
        [float(len(score.checked.mentioned) - len(score.checked.hallucinated)) for score in scores],
        [float(len(score.checked.mentioned)) for score in scores],
        [float(len(score.checked.recalled)) for score in scores],
        [float(len(score.truth)) for score in scores],
    ]

    def harmonic_mean(sums: np.ndarray) -> np.ndarray:
        true, mentioned, recalled, present = sums
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = true / mentioned, recalled / present
            both = precision + recall
            return np.where(both == 0, 0.0, 2 * precision * recall / both)

    return share_of_sums(columns, harmonic_mean)


def by_length(scores: Sequence[CaptionScore]) -> list[dict[str, Any]]:
    """Compute the rates for each quarter of the captions, from the shortest to the longest.

    Longer captions mention more objects, and more that are absent. Policies whose captions
    differ in length can be compared fairly only where the lengths overlap.
    """
    ordered = sorted(scores, key=lambda score: score.num_words)
    quarters = [indices for indices in np.array_split(np.arange(len(ordered)), _LENGTH_BINS) if len(indices)]
    table = []
    for indices in quarters:
        quarter = [ordered[index] for index in indices]
        metrics = summarize(quarter)
        table.append(
            {
                "words": [quarter[0].num_words, quarter[-1].num_words],
                "n": len(quarter),
                **{name: metrics[name].value for name in ("chair_s", "chair_i", "recall", "f1")},
            }
        )
    return table


def counts(scores: Sequence[CaptionScore]) -> dict[str, int]:
    """Count captions, images and mentions, and the cases that the rates hide (empty or repeated captions...)."""
    texts = [(score.caption.image_id, score.caption.text) for score in scores]
    return {
        "captions": len(scores),
        "images": len({score.caption.image_id for score in scores}),
        "empty": sum(not score.caption.text.strip() for score in scores),
        "without_objects": sum(not score.checked.mentioned for score in scores),
        "repeated": len(texts) - len(set(texts)),
        "images_without_objects": len({score.caption.image_id for score in scores if not score.truth}),
        "mentions": sum(len(score.checked.mentioned) for score in scores),
        "hallucinated": sum(len(score.checked.hallucinated) for score in scores),
    }
