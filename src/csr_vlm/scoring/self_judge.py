"""Score sentences with the policy as judge: the self-rewarding baseline that CSR is compared with.

No second model looks at the image. The policy is asked whether a sentence is true of it, and
P(yes) / (P(yes) + P(no)) of its next token takes the place of the cosine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from csr_vlm.config.schema import ModelConfig, OneScorerConfig
from csr_vlm.core.batching import batched
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.models.loading import load_policy
from csr_vlm.models.yes_or_no import YesOrNo


class JudgeScorer:
    """Score sentences by the policy's answer to a yes/no question (a Scorer).

    Args:
        config: Configuration of the scorer; its ``judge`` section defines the question.
        model: Configuration of the base model.
        adapter: Adapter of the last iteration; None for the base model.
        max_image_pixels: Larger images are rejected without decoding.
    """

    def __init__(
        self, config: OneScorerConfig, model: ModelConfig, adapter: Path | None, max_image_pixels: int
    ) -> None:
        self.name = config.name
        self._config = config
        self._pattern = re.compile(config.judge.pattern)
        self._policy = load_policy(model, adapter, max_image_pixels)
        self._answers = YesOrNo(self._policy)
        self._cache: dict[tuple[str, str], float] = {}
        """Scores by (image, question)."""

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute P(yes) / (P(yes) + P(no)) of each item, in 0..1."""
        questions = [(prompt.image, self.question(sentence)) for prompt, sentence in items]
        new = [key for key in dict.fromkeys(questions) if key not in self._cache]
        for chunk in batched(new, self._config.batch_size):
            self._cache |= dict(zip(chunk, self._answers.probabilities(chunk), strict=True))
        return [{self.name: self._cache[key]} for key in questions]

    def forget(self) -> None:
        """Drop the cached scores."""
        self._cache.clear()

    def question(self, sentence: str) -> str:
        """Return the question that the policy is asked about a sentence.

        Raises:
            CsrError: The template has a field that does not exist, such as a group that
                ``judge.pattern`` does not have.
        """
        match = self._pattern.search(sentence)
        option, groups = ("question", match.groups("")) if match else ("otherwise", ())
        try:
            return str(getattr(self._config.judge, option)).format(*groups, sentence=sentence)
        except (IndexError, KeyError, ValueError, AttributeError) as error:
            raise CsrError(
                f"scorer.judge.{option} cannot be formatted: {error}",
                f"it may use {{sentence}} and, for a sentence that matches {self._config.judge.pattern!r}, "
                "the pattern's groups as {0}, {1}, ...",
            ) from None
