"""CHAIR: how many of the objects that captions name are not there.

    CHAIR_I = mentions of objects that are not in the image / mentions of objects
    CHAIR_S = captions with such a mention / captions
    recall  = objects of the images that their captions name / objects of the images

(Rohrbach et al. 2018, arXiv 1809.02156; recall as in OPERA's evaluator.) Mentions are
pooled over captions and repetitions count. The objects of an image are the categories of
its instances together with the objects that its reference captions name, found by the
same function that reads the captions under test. Everything that names objects in text,
the embedded world included, goes through :class:`Reader` and :func:`judge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from csr_vlm.evaluation.objects import ObjectTable, Reading, find_objects
from csr_vlm.evaluation.statistics import Metric, Tally, bootstrap, pooled
from csr_vlm.evaluation.words import WordRule

_LENGTH_BINS = 4


@dataclass(frozen=True)
class Reader:
    """A word rule and a table of objects: all that decides what a text mentions."""

    rule: WordRule
    table: ObjectTable

    def read(self, text: str) -> Reading:
        return find_objects(self.rule.read(text), self.table)


@dataclass(frozen=True)
class Caption:
    """A text about an image."""

    caption_id: str | int
    image_id: str | int
    text: str


@dataclass(frozen=True)
class Verdict:
    """What a text mentions, against what is there."""

    mentioned: tuple[str, ...]
    """Objects named, in order, repetitions included."""
    hallucinated: tuple[str, ...]
    """Those of them that are not there."""
    hallucinated_words: tuple[str, ...]
    """The words that named them."""
    hallucinated_places: tuple[int, ...]
    recalled: frozenset[str]
    """Objects that are there and named."""


def judge(reading: Reading, truth: Set[str]) -> Verdict:
    """Compare the objects that a text names with those that are there."""
    absent = [index for index, name in enumerate(reading.objects) if name not in truth]
    return Verdict(
        mentioned=reading.objects,
        hallucinated=tuple(reading.objects[index] for index in absent),
        hallucinated_words=tuple(reading.words[index] for index in absent),
        hallucinated_places=tuple(reading.places[index] for index in absent),
        recalled=frozenset(reading.objects) & truth,
    )


@dataclass(frozen=True)
class Row:
    """One caption, judged."""

    caption: Caption
    reading: Reading
    verdict: Verdict
    truth: frozenset[str]

    @property
    def chair_i(self) -> float:
        """Its share of hallucinated mentions; 0 without a mention."""
        return len(self.verdict.hallucinated) / max(len(self.verdict.mentioned), 1)

    @property
    def recall(self) -> float:
        """Its share of the image's objects; 0 where the image has none."""
        return len(self.verdict.recalled) / max(len(self.truth), 1)

    @property
    def num_words(self) -> int:
        return len(self.caption.text.split())

    @property
    def tallies(self) -> dict[str, Tally]:
        """What it adds to each rate and to the mean lengths."""
        lengths = {"words": (self.num_words, 1), "tokens": (len(self.reading.tokens), 1)}
        return {**tallies(self.verdict, self.truth), **lengths}

    def dump(self) -> dict[str, Any]:
        return {
            "id": self.caption.caption_id,
            "image_id": self.caption.image_id,
            "mentioned": list(self.verdict.mentioned),
            "hallucinated": list(self.verdict.hallucinated),
            "matched_words": list(self.reading.words),
            "hallucinated_words": list(self.verdict.hallucinated_words),
            "truth": sorted(self.truth),
            "chair_s": int(bool(self.verdict.hallucinated)),
            "chair_i": self.chair_i,
            "recall": self.recall,
            "words": self.num_words,
            "tokens": len(self.reading.tokens),
        }


def evaluate(captions: Sequence[Caption], truth: Mapping[str | int, Set[str]], reader: Reader) -> list[Row]:
    """Judge every caption.

    Args:
        truth: Image id to the objects in the image, for every image of a caption.
    """
    rows = []
    for caption in captions:
        objects = frozenset(truth[caption.image_id])
        reading = reader.read(caption.text)
        rows.append(Row(caption, reading, judge(reading, objects), objects))
    return rows


class Judged(Protocol):
    """What rates are computed from; :class:`Verdict` is one."""

    @property
    def mentioned(self) -> Sized: ...
    @property
    def hallucinated(self) -> Sized: ...
    @property
    def recalled(self) -> Sized: ...


def tallies(judged: Judged, truth: Sized) -> dict[str, Tally]:
    """Return what one text adds to the numerator and the denominator of each rate."""
    return {
        "chair_s": (int(len(judged.hallucinated) > 0), 1),
        "chair_i": (len(judged.hallucinated), len(judged.mentioned)),
        "recall": (len(judged.recalled), len(truth)),
    }


def summarise(rows: Sequence[Row]) -> dict[str, Metric]:
    """Compute all metrics of some judged captions.

    Returns:
        ``chair_s``, ``chair_i``, ``recall``; ``f1``, the harmonic mean of 1 - CHAIR_I and
        recall; ``words`` and ``tokens``, mean lengths by white space and by CHAIR's own
        tokens after merging.
    """
    return {**pooled([row.tallies for row in rows]), "f1": _f1(rows)}


def document(rows: Sequence[Row], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the evaluation in the form that runs store: ``metrics``, ``protocol`` and ``rows`` with tallies."""
    return {
        "metrics": {name: metric.dump() for name, metric in summarise(rows).items()},
        "protocol": dict(protocol),
        "rows": [{**row.dump(), "text": row.caption.text, "tallies": row.tallies} for row in rows],
    }


def _f1(rows: Sequence[Row]) -> Metric:
    columns = [
        [float(len(row.verdict.mentioned) - len(row.verdict.hallucinated)) for row in rows],
        [float(len(row.verdict.mentioned)) for row in rows],
        [float(len(row.verdict.recalled)) for row in rows],
        [float(len(row.truth)) for row in rows],
    ]

    def harmonic_mean(sums: np.ndarray) -> np.ndarray:
        true, mentioned, recalled, present = sums
        with np.errstate(divide="ignore", invalid="ignore"):
            precision, recall = true / mentioned, recalled / present
            both = precision + recall
            return np.where(both == 0, 0.0, 2 * precision * recall / both)

    return bootstrap(columns, harmonic_mean)


def by_length(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Compute the rates in quarters of the captions, from the shortest to the longest.

    A longer caption mentions more, and more that is absent: two policies whose captions
    differ in length are compared fairly only where their lengths overlap.
    """
    ordered = sorted(rows, key=lambda row: row.num_words)
    parts = [part for part in np.array_split(np.arange(len(ordered)), _LENGTH_BINS) if len(part)]
    table = []
    for part in parts:
        mine = [ordered[index] for index in part]
        metrics = summarise(mine)
        table.append(
            {
                "words": [mine[0].num_words, mine[-1].num_words],
                "n": len(mine),
                **{name: metrics[name].value for name in ("chair_s", "chair_i", "recall", "f1")},
            }
        )
    return table


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Count what the rates alone hide."""
    texts = [(row.caption.image_id, row.caption.text) for row in rows]
    return {
        "captions": len(rows),
        "images": len({row.caption.image_id for row in rows}),
        "empty": sum(not row.caption.text.strip() for row in rows),
        "without_objects": sum(not row.verdict.mentioned for row in rows),
        "repeated": len(texts) - len(set(texts)),
        "images_without_objects": len({row.caption.image_id for row in rows if not row.truth}),
        "mentions": sum(len(row.verdict.mentioned) for row in rows),
        "hallucinated": sum(len(row.verdict.hallucinated) for row in rows),
    }
