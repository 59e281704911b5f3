"""The policy as its own judge: the self-rewarding that CSR's calibration is compared with.

No second model looks at the image: the policy is asked whether a sentence is true of it,
and P(yes) / (P(yes) + P(no)) of its next token stands in the cosine's place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from csr_vlm.config.schema import ModelConfig, OneScorerConfig
from csr_vlm.core.batching import batched
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.models.loading import load_policy
from csr_vlm.models.policy import Policy


class JudgeScorer:
    """Scores sentences by what the policy answers about them.

    Args:
        config: Its ``judge`` section words the question.
        model: The base model.
        adapter: The last iteration's adapter; None for the base model.
    """

    def __init__(
        self, config: OneScorerConfig, model: ModelConfig, adapter: Path | None, max_image_pixels: int
    ) -> None:
        self.name = config.name
        self._config = config
        self._pattern = re.compile(config.judge.pattern)
        self._policy = load_policy(model, adapter, max_image_pixels)
        self._yes, self._no = _answer_ids(self._policy)
        self._known: dict[tuple[str, str], float] = {}

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Compute P(yes) / (P(yes) + P(no)) of each item, in 0..1."""
        asked = [(prompt.image, self.question(sentence)) for prompt, sentence in items]
        new = [key for key in dict.fromkeys(asked) if key not in self._known]
        for chunk in batched(new, self._config.batch_size):
            self._known |= dict(zip(chunk, self._ask(chunk), strict=True))
        return [{self.name: self._known[key]} for key in asked]

    def forget(self) -> None:
        self._known.clear()

    def question(self, sentence: str) -> str:
        """Word the question about a sentence.

        Raises:
            CsrError: The template asks for what there is not, such as a group that ``judge.pattern`` does not have.
        """
        found = self._pattern.search(sentence)
        option, groups = ("question", found.groups("")) if found else ("otherwise", ())
        try:
            return str(getattr(self._config.judge, option)).format(*groups, sentence=sentence)
        except (IndexError, KeyError, ValueError, AttributeError) as error:
            raise CsrError(
                f"scorer.judge.{option} cannot be filled in: {error}",
                f"it may use {{sentence}} and, of a sentence where {self._config.judge.pattern!r} is found, "
                "the pattern's groups as {0}, {1}, ...",
            ) from None

    @torch.inference_mode()
    def _ask(self, questions: Sequence[tuple[str, str]]) -> list[float]:
        encoded = self._policy.with_features([self._policy.encode(Prompt("", *item)) for item in questions])
        inputs = self._policy.model_inputs(encoded, [()] * len(encoded), "left")
        logits = self._policy.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        probabilities = torch.softmax(logits, dim=-1)
        yes, no = (probabilities[:, ids].sum(dim=-1) for ids in (self._yes, self._no))
        return [float(value) for value in yes / (yes + no)]


def _answer_ids(policy: Policy) -> tuple[list[int], list[int]]:
    """Return the first tokens of yes and of no, with and without capital and leading space."""

    def first_ids(word: str) -> set[int]:
        forms = [space + form for form in (word, word.lower()) for space in ("", " ")]
        return {policy.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}

    yes, no = first_ids("Yes"), first_ids("No")
    both = yes & no  # a lone space, where the tokenizer splits it off
    if not yes - both or not no - both:
        raise CsrError("the policy's tokenizer does not tell yes from no by the first token", "use another scorer")
    return sorted(yes - both), sorted(no - both)
