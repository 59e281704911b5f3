"""Find the claims of sentences and score each once per image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from csr_vlm.config.schema import ClaimsConfig
from csr_vlm.core.records import EARLIER_COLUMN, Prompt
from csr_vlm.method.claim_evidence import claim_key, thing_of, words_of
from csr_vlm.method.claims import claim_finder
from csr_vlm.scoring.scorer import ScorerGroup


class ClaimScorer:
    """Score the claims of sentences against images, as captions such as "a photo of a red boat".

    Args:
        group: Scorers; their negative images must be set before the first call.
        config: Lexicon of the things that can be claimed, and the caption of a claim.
        earlier: Number of sampled sentences of the iterations before, by prompt and thing; None in the first.
    """

    def __init__(
        self, group: ScorerGroup, config: ClaimsConfig, earlier: Mapping[tuple[str, str], int] | None = None
    ) -> None:
        self._group = group
        self._config = config
        self._earlier = earlier
        self._finder = claim_finder(config.lexicon)
        self._known: dict[tuple[str, str], dict[str, float]] = {}
        """Cosines by image and claim."""

    def __call__(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, dict[str, float]]]:
        """Return the claims of each (prompt, sentence) with their cosines by ledger column."""
        found = [self.claims_in(sentence) for _, sentence in items]
        wanted = [(prompt, claim) for (prompt, _), claims in zip(items, found, strict=True) for claim in claims]
        scores = iter(self.score(wanted))
        return [{claim: next(scores) for claim in claims} for claims in found]

    def claims_in(self, sentence: str) -> list[str]:
        """List the claims of a sentence: each thing and, where it has a color, the thing with it."""
        found = self._finder.find(sentence)
        return list(dict.fromkeys(claim_key(c.name, color) for c in found for color in dict.fromkeys(("", c.color))))

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Return the cosines of each (prompt, claim) by ledger column."""
        new = {(p.image, claim): p for p, claim in items if (p.image, claim) not in self._known}
        captions = [(prompt, self._written(claim)) for (_, claim), prompt in new.items()]
        self._known |= dict(zip(new, self._group.score_claims(captions), strict=True))
        return [self._known[prompt.image, claim] | self._made_earlier(prompt, claim) for prompt, claim in items]

    def _made_earlier(self, prompt: Prompt, claim: str) -> dict[str, float]:
        if self._earlier is None:
            return {}
        return {EARLIER_COLUMN: float(self._earlier.get((prompt.prompt_id, thing_of(claim)), 0))}

    def forget(self) -> None:
        """Drop the known scores; called between work items, whose negative images differ."""
        self._known.clear()

    def _written(self, claim: str) -> str:
        return self._config.caption_of(words_of(claim))
