"""Measure how well scorers tell true from false sentences and claims of captions.

With v the cosine of a scorer, a text's score is its contrast, the R_I of the presets over 100:

    contrast = v(own picture, text) - mean over other pictures of v(picture, text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter
from csr_vlm.core.records import negatives_column
from csr_vlm.evaluation.auc_intervals import Auc, AucDifference, auc_difference, clustered_auc
from csr_vlm.evaluation.labeled_captions import LabeledCaptions, LabeledText
from csr_vlm.evaluation.sentence_kinds import DETAILS, KINDS
from csr_vlm.scoring.scorer import ScorerGroup

BATCH = 128
"""Number of pictures that are each other's negative images."""
_SPREAD_TEXTS = 24
"""Number of claims of a batch that are scored against single other pictures, for the spread of cosines."""
SIZES = ("small", "medium", "large")
Rows = list[dict[str, float]]
Select = Callable[[LabeledText], bool]


@dataclass(frozen=True)
class ScoredCaptions:
    """Hold the cosines of all sentences and claims, by the columns of the ledger."""

    captions: LabeledCaptions
    scorers: tuple[str, ...]
    sentences: Rows
    claims: Rows
    unrelated: Mapping[str, tuple[tuple[float, ...], ...]]
    """Scorer to its cosines of some claims with single pictures that do not show them, one tuple per claim."""

    def contrasts(self, scorer: str, of: str) -> list[float]:
        """Return the contrast of each text; a scorer ``a+b`` has the mean of both."""
        rows = self.sentences if of == "sentences" else self.claims
        names = scorer.split("+")
        return [sum(row[name] - row[negatives_column(name)] for name in names) / len(names) for row in rows]

    def texts(self, of: str) -> tuple[LabeledText, ...]:
        """Return the sentences or the claims."""
        return self.captions.sentences if of == "sentences" else self.captions.claims


def score_captions(
    captions: LabeledCaptions, group: ScorerGroup, num_negatives: int, reporter: Reporter
) -> ScoredCaptions:
    """Score every sentence and claim against its own picture and against other pictures of its batch.

    Raises:
        CsrError: There are fewer than two pictures.
    """
    number = len(captions.pictures)
    if number < 2:
        raise CsrError("a contrast needs at least two pictures", "label and caption more pictures")
    names = tuple(scorer.name for scorer in group.scorers)
    sentences: Rows = [{} for _ in captions.sentences]
    claims: Rows = [{} for _ in captions.claims]
    unrelated: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    with reporter.stage("scoring", number) as progress:
        for batch in np.array_split(np.arange(number), -(-number // BATCH)):
            members = set(batch.tolist())
            group.set_negative_images([captions.pictures[index].prompt for index in sorted(members)], num_negatives)
            for rows, texts in ((sentences, captions.sentences), (claims, captions.claims)):
                chosen = [index for index, text in enumerate(texts) if text.picture in members]
                items = [(captions.pictures[texts[index].picture].prompt, texts[index].text) for index in chosen]
                score = group.score if rows is sentences else group.score_claims
                for index, row in zip(chosen, score(items), strict=True):
                    rows[index] = row
            for name, values in _unrelated_cosines(captions, group, sorted(members), num_negatives):
                unrelated[name].append(values)
            group.forget()
            progress.advance(len(members))
    return ScoredCaptions(captions, names, sentences, claims, {name: tuple(v) for name, v in unrelated.items()})


def _unrelated_cosines(
    captions: LabeledCaptions, group: ScorerGroup, members: Sequence[int], number: int
) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield (scorer, cosines of a claim with pictures of the batch that do not show its object)."""
    claims = [claim for claim in captions.claims if claim.picture in set(members)]
    for claim in claims[:: max(len(claims) // _SPREAD_TEXTS, 1)]:
        absent = [i for i in members if i != claim.picture and claim.claims[0] not in captions.pictures[i].objects]
        items = [(captions.pictures[index].prompt, claim.text) for index in absent[: max(number, 2)]]
        if len(items) > 1:
            for scorer in group.scorers:
                yield scorer.name, tuple(row[scorer.name] for row in scorer.score(items))


@dataclass(frozen=True)
class Contrasts:
    """Hold mean, standard deviation and number of the contrasts of one kind of text."""

    mean: float | None
    """None without a text."""
    sd: float | None
    """None with fewer than two texts."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Contrasts:
        """Describe contrasts."""
        return cls(
            float(np.mean(values)) if values else None,
            float(np.std(values, ddof=1)) if len(values) > 1 else None,
            len(values),
        )


@dataclass(frozen=True)
class Separation:
    """Hold how well a scorer tells true from false texts of one group."""

    group: str
    """Such as ``details``, ``lead``, ``size: small`` or ``against habit``."""
    auc: Auc | None
    """None without a true or a false text."""
    true: Contrasts
    false: Contrasts

    def dump(self) -> dict[str, Any]:
        return {
            "group": self.group,
            "auc": None if self.auc is None else self.auc.dump(),
            "true": asdict(self.true),
            "false": asdict(self.false),
        }


@dataclass(frozen=True)
class ScorerResult:
    """Hold everything that was measured about one scorer, or about the mean of two."""

    name: str
    sentences: tuple[Separation, ...]
    """The first one is that of all details."""
    claims: tuple[Separation, ...]
    """The first one is that of all claims."""
    mood: Contrasts

    def dump(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sentences": [one.dump() for one in self.sentences],
            "claims": [one.dump() for one in self.claims],
            "mood": asdict(self.mood),
        }


def measure(scored: ScoredCaptions, scorer: str) -> ScorerResult:
    """Compute AUCs and contrasts of a scorer, or of several as ``a+b``, by kind of sentence and size of object."""
    sentences, claims = scored.texts("sentences"), scored.texts("claims")
    values, claim_values = scored.contrasts(scorer, "sentences"), scored.contrasts(scorer, "claims")

    def sentences_on(group: str, select: Select) -> Separation:
        return _separation(group, [(t, v) for t, v in zip(sentences, values, strict=True) if select(t)])

    def claims_on(group: str, select: Select) -> Separation:
        return _separation(group, [(t, v) for t, v in zip(claims, claim_values, strict=True) if select(t)])

    by_kind = [kind for kind in KINDS if kind != "mood"]
    habits = ("habit", "random") if scored.captions.habits_known else ()
    return ScorerResult(
        scorer,
        (
            sentences_on("details", lambda text: text.kind in DETAILS),
            *(sentences_on(kind, _of_kind(kind)) for kind in by_kind),
            *(sentences_on(f"against {truth}", _is_detail_against(truth)) for truth in habits),
        ),
        (
            claims_on("claims", lambda _: True),
            *(claims_on(f"in {kind}", _of_kind(kind)) for kind in by_kind),
            *(one for size in SIZES if (one := claims_on(f"size: {size}", _of_size(size))).true.n),
            *(claims_on(f"against {truth}", _against(truth)) for truth in habits),
        ),
        Contrasts.of([value for text, value in zip(sentences, values, strict=True) if text.kind == "mood"]),
    )


def _of_kind(kind: str) -> Select:
    return lambda text: text.kind == kind


def _of_size(size: str) -> Select:
    """Select the true claims about objects of a size, and all false claims, whose objects have none."""
    return lambda text: text.truth != "grounded" or text.size == size


def _against(truth: str) -> Select:
    return lambda text: text.truth in ("grounded", truth)


def _is_detail_against(truth: str) -> Select:
    return lambda text: text.kind in DETAILS and text.truth in ("grounded", truth)


def _separation(group: str, chosen: Sequence[tuple[LabeledText, float]]) -> Separation:
    labeled = [(text, value) for text, value in chosen if text.truth is not None]
    truth = [text.truth == "grounded" for text, _ in labeled]
    values = [value for _, value in labeled]
    return Separation(
        group,
        clustered_auc(values, truth, [text.picture for text, _ in labeled]),
        Contrasts.of([value for value, is_true in zip(values, truth, strict=True) if is_true]),
        Contrasts.of([value for value, is_true in zip(values, truth, strict=True) if not is_true]),
    )


def residuals(texts: Sequence[LabeledText], values: Sequence[float]) -> np.ndarray:
    """Subtract from each contrast the mean of the texts of the same kind and truth; this is the scorer's error."""
    groups = [f"{text.kind}:{text.truth}" for text in texts]
    _, unit = np.unique(groups, return_inverse=True)
    numbers = np.asarray(values, dtype=float)
    means = np.bincount(unit, numbers) / np.bincount(unit)
    errors: np.ndarray = numbers - means[unit]
    return errors


def correlation(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float | None:
    """Compute Pearson's correlation; None with fewer than three pairs or where one side is constant."""
    first, second = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


@dataclass(frozen=True)
class ScorerPair:
    """Hold how two scorers compare on the same texts."""

    first: str
    second: str
    shared_sentence_error: float | None
    """Correlation of their errors on sentences."""
    shared_claim_error: float | None
    gain_by_sentence: AucDifference | None
    """AUC of the mean of both minus that of the better one, on details."""
    gain_by_claim: AucDifference | None

    def dump(self) -> dict[str, Any]:
        return asdict(self)


def compare_scorers(scored: ScoredCaptions, first: str, second: str) -> ScorerPair:
    """Compare the errors of two scorers, and the mean of both with the better of them."""
    shared, gains = {}, {}
    for of in ("sentences", "claims"):
        texts = scored.texts(of)
        chosen = [i for i, text in enumerate(texts) if text.truth and (of == "claims" or text.kind in DETAILS)]
        kept = [texts[index] for index in chosen]

        def values(name: str, of: str = of, chosen: Sequence[int] = chosen) -> list[float]:
            every = scored.contrasts(name, of)
            return [every[index] for index in chosen]

        shared[of] = correlation(residuals(kept, values(first)), residuals(kept, values(second))) if kept else None
        truth, pictures = [text.truth == "grounded" for text in kept], [text.picture for text in kept]
        aucs = {name: clustered_auc(values(name), truth, pictures) for name in (first, second)}
        better = max((first, second), key=lambda name: 0.0 if (auc := aucs[name]) is None else auc.value)
        gains[of] = auc_difference(values(better), values(f"{first}+{second}"), truth, pictures)
    return ScorerPair(first, second, shared["sentences"], shared["claims"], gains["sentences"], gains["claims"])
