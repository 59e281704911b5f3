"""Ask a policy yes-or-no questions, and read the probability of yes from its next token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.models.policy import Policy


class YesOrNo:
    """Ask one policy.

    Raises:
        CsrError: The first tokens of yes and no are the same.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._yes_ids, self._no_ids = _answer_ids(policy)

    @torch.inference_mode()
    def probabilities(self, questions: Sequence[tuple[str, str]]) -> list[float]:
        """Compute P(yes) / (P(yes) + P(no)) of each (path of an image, question)."""
        encoded = self._policy.with_features([self._policy.encode(Prompt("", *item)) for item in questions])
        inputs = self._policy.model_inputs(encoded, [()] * len(encoded), "left")
        logits = self._policy.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        probabilities = torch.softmax(logits, dim=-1)  # (questions, vocabulary)
        yes, no = (probabilities[:, ids].sum(dim=-1) for ids in (self._yes_ids, self._no_ids))
        return [float(value) for value in yes / (yes + no)]


def _answer_ids(policy: Policy) -> tuple[list[int], list[int]]:
    """Return the ids of the first tokens of "yes" and of "no", in both cases and with or without a leading space.

    Raises:
        CsrError: The first tokens of both words are the same.
    """

    def first_ids(word: str) -> set[int]:
        forms = [space + form for form in (word, word.lower()) for space in ("", " ")]
        return {policy.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}

    yes_ids, no_ids = first_ids("Yes"), first_ids("No")
    common_ids = yes_ids & no_ids  # such as a lone space, where the tokenizer splits it off
    if not yes_ids - common_ids or not no_ids - common_ids:
        raise CsrError(
            "the policy's tokenizer does not distinguish yes and no by their first token", "use another scorer"
        )
    return sorted(yes_ids - common_ids), sorted(no_ids - common_ids)
