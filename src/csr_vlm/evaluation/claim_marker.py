"""Find the claims of an answer, and weigh the evidence for each as the method does.

Each claim is made once in an answer, so its evidence is that of :mod:`csr_vlm.method.claim_evidence`
without self-consistency.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from csr_vlm.config.schema import MethodConfig
from csr_vlm.core.records import Prompt
from csr_vlm.evaluation.statistics import Tally
from csr_vlm.method.claim_evidence import Evidence, thing_of, words_of
from csr_vlm.method.claim_places import Level, Mark, claim_places, level_of
from csr_vlm.method.claims import claim_finder
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.scoring.claim_scorer import ClaimScorer
from csr_vlm.scoring.scorer import ScorerGroup

NUM_OTHERS = 32
"""Other pictures that a claim is compared with, at most."""


class ClaimMarker:
    """Mark the claims of texts about pictures.

    Args:
        scorer: Scorer of texts on pictures.
        method: Settings of claims, sentences and evidence.
        used: Scorers whose mean evidence counts, as in ``scorer.use``.
        others: Prompts with other pictures, of which the first count; at least two of them differ from the one that
            a text is about.
    """

    def __init__(self, scorer: ScorerGroup, method: MethodConfig, used: str, others: Sequence[Prompt]) -> None:
        self._scorer = scorer
        self._claims = ClaimScorer(scorer, method.claims)
        self._reward = method.reward.model_copy(update={"consistency": 0.0})
        self._used = used
        self._finder = claim_finder(method.claims.lexicon)
        self._rule = SentenceRule(method.search.delimiters)
        # One more, since the picture of a text may be among them.
        self._others = list({prompt.image: prompt for prompt in others}.values())[: NUM_OTHERS + 1]

    def marks(self, prompt: Prompt, text: str) -> list[Mark]:
        """Return the claims of a text in their order, each as often as it is made."""
        found = self._places(text)
        nats = self._evidence(prompt, [claim for _, _, claim in found])
        return [Mark(start, end, words_of(key), nats[key]) for start, end, key in found if key in nats]

    def evidence(self, prompt: Prompt, text: str) -> dict[str, float]:
        """Return the evidence of each distinct claim of a text, in nats, by its name in the ledger."""
        return self._evidence(prompt, [claim for _, _, claim in self._places(text)])

    def _places(self, text: str) -> list[tuple[int, int, str]]:
        places: list[tuple[int, int, str]] = []
        position = 0
        for sentence in self._rule.cut(text):
            position = text.index(sentence, position)
            found = claim_places(sentence, self._finder.find(sentence))
            places += ((position + start, position + end, key) for start, end, key in found)
            position += len(sentence)
        return places

    def _evidence(self, prompt: Prompt, keys: Sequence[str]) -> dict[str, float]:
        """Return the evidence of each claim; a thing with its color has the lower of both.

        There is none if there are no other pictures to compare with.
        """
        others = [other for other in self._others if other.image != prompt.image][:NUM_OTHERS]
        if len(others) < 2 or not keys:
            return {}
        self._scorer.set_negative_images([prompt, *others], len(others))
        claims = list(dict.fromkeys(name for key in keys for name in (thing_of(key), key)))
        rows = self._claims.score([(prompt, claim) for claim in claims])
        things = Counter(dict.fromkeys(map(thing_of, claims), 1))
        evidence = Evidence(dict(zip(claims, rows, strict=True)), things, self._used, self._reward)
        return {key: min(evidence.nats[key], evidence.nats[thing_of(key)]) for key in keys}


def doubted_tally(evidence: Mapping[str, float]) -> Tally:
    """Return what one text adds to the share of claims with evidence against them.

    Example:
        >>> doubted_tally({"boat": 3.0, "fish": -2.0, "tree": -0.5})
        (1, 3)
    """
    return num_doubted(evidence), len(evidence)


def num_doubted(evidence: Mapping[str, float]) -> int:
    """Count the claims with evidence against them.

    Example:
        >>> num_doubted({"boat": 3.0, "fish": -2.0, "tree": -0.5})
        1
    """
    return sum(level_of(nats) is Level.DOUBTED for nats in evidence.values())
