"""Turn logits into candidates: choose tokens, record them, and detect where a sentence ends.

Both decoders, :mod:`csr_vlm.generation.plain_decoder` and :mod:`csr_vlm.generation.scheduler`,
use one :class:`TokenSampler`, so equal logits give equal candidates. Engines that choose tokens
themselves use :class:`SentenceTracker` alone. Recorded log-probabilities are those of the raw
distribution; masked image tokens, temperature, top-p and diversity only affect the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import PromptError
from csr_vlm.core.records import Candidate, Expansion, Finish
from csr_vlm.generation.sampling import choose_diverse, sample, uniforms
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.policy import Policy


@dataclass(frozen=True)
class DecodingSettings:
    """Configure how tokens are chosen and when a candidate stops."""

    max_new_tokens: int
    rule: SentenceRule | None
    """Where a sentence ends; None decodes to the end of the response."""
    temperature: float
    """0 selects the most probable token."""
    top_p: float = 1.0
    diversity_penalty: float | None = None
    """Penalty of diverse beam search among siblings; None samples each sibling independently."""
    greedy_first: bool = False
    """Whether the first sibling is decoded greedily at any temperature."""

    @classmethod
    def from_search(cls, config: SearchConfig) -> DecodingSettings:
        """Build the settings that decode one sentence of a search."""
        return cls(
            max_new_tokens=config.max_sentence_tokens,
            rule=SentenceRule(config.delimiters),
            temperature=config.temperature,
            top_p=config.top_p,
            diversity_penalty=config.diversity_penalty if config.decoding == "diverse" else None,
            greedy_first=config.greedy_first,
        )


@dataclass(slots=True)
class PartialCandidate:
    """Represent a candidate while it is being decoded."""

    group_id: int
    """Id of its sibling group: equal for siblings, different for all other candidates."""
    sibling_index: int
    """Index among the siblings, from 0."""
    prefix_ids: tuple[int, ...]
    """Token ids of the partial response that the candidate continues."""
    uniforms: np.ndarray
    """Numbers in [0, 1) that its tokens are drawn with, of shape (max_new_tokens,)."""
    prompt_id: str = ""
    prefix_text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """log P(r_o | x, r_<o) of the raw distribution, in nats, one per token."""
    finish: Finish | None = None
    """Why the candidate ended; None while it is decoding."""
    text: str | None = None
    """Text of the sentence as of the last check for its end; None before the first check."""


class SentenceTracker:
    """Record candidates' tokens, detect where their sentences end, and build the finished candidates."""

    def __init__(self, prompt_encoder: PromptEncoder, decoding: DecodingSettings) -> None:
        self.decoding = decoding
        self._prompt_encoder = prompt_encoder
        self._num_groups = 0
        self._has_delimiter: dict[int, bool] = {}
        """Whether the text of a token may hold a delimiter, by token id; filled as tokens appear."""

    def start(self, request: Expansion) -> list[PartialCandidate]:
        """Create the candidates of a request, all of one sibling group."""
        self._num_groups += 1
        prefix_text = self._decode(request.prefix_ids)
        return [
            PartialCandidate(
                group_id=self._num_groups,
                sibling_index=index,
                prefix_ids=request.prefix_ids,
                uniforms=uniforms((*request.seed, index), self.decoding.max_new_tokens),
                prompt_id=request.prompt.prompt_id,
                prefix_text=prefix_text,
            )
            for index in range(request.num_candidates)
        ]

    def append(self, candidate: PartialCandidate, token: int, logprob: float) -> None:
        """Add a token to a candidate, or set its ``finish`` if its sentence ended before the token.

        Args:
            token: Token id that the engine chose.
            logprob: Log-probability of the token under the raw distribution, in nats.
        """
        ends_response = token in self._prompt_encoder.eos_ids
        if self._may_end(candidate) and self._ends(candidate, None if ends_response else token):
            # The token is discarded: the next sentence draws its own first token.
            candidate.finish = Finish.DELIMITER
            return
        candidate.token_ids.append(token)
        candidate.logprobs.append(logprob)
        if ends_response:
            candidate.finish = Finish.EOS
        elif len(candidate.token_ids) >= self.decoding.max_new_tokens:
            candidate.finish = Finish.LENGTH

    def completed(self, candidate: PartialCandidate) -> Candidate:
        """Return a finished candidate as a record."""
        if candidate.finish is not Finish.DELIMITER or candidate.text is None:
            candidate.text = self._decode((*candidate.prefix_ids, *candidate.token_ids))[len(candidate.prefix_text) :]
        return Candidate(
            tuple(candidate.token_ids),
            tuple(candidate.logprobs),
            candidate.text,
            candidate.finish or Finish.LENGTH,
        )

    def _may_end(self, candidate: PartialCandidate) -> bool:
        """Check cheaply for a delimiter among the last two tokens; a closing quote may follow the delimiter."""
        return any(map(self._may_delimit, candidate.token_ids[-2:]))

    def _may_delimit(self, token: int) -> bool:
        """Check whether the text of a token holds a delimiter, or is a part of one ("�")."""
        if self.decoding.rule is None:
            return False
        if token not in self._has_delimiter:
            text = self._decode((token,))
            self._has_delimiter[token] = any(char in text for char in self.decoding.rule.delimiters + "\ufffd")
        return self._has_delimiter[token]

    def _ends(self, candidate: PartialCandidate, token: int | None) -> bool:
        """Check whether the sentence ends before ``token``; None stands for the end of the response."""
        assert self.decoding.rule is not None
        text = self._decode((*candidate.prefix_ids, *candidate.token_ids))
        following = None
        if token is not None:
            following = self._decode((*candidate.prefix_ids, *candidate.token_ids, token))[len(text) :]
        candidate.text = text[len(candidate.prefix_text) :]
        return self.decoding.rule.ends(candidate.text, following)

    def _decode(self, token_ids: Sequence[int]) -> str:
        text: str = self._prompt_encoder.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


class TokenSampler(SentenceTracker):
    """Choose candidates' next tokens from the policy's logits."""

    def __init__(self, policy: Policy, decoding: DecodingSettings) -> None:
        super().__init__(policy.prompt_encoder, decoding)
        self._image_token_ids = torch.tensor(policy.image_token_ids, dtype=torch.long, device=policy.device)

    def choose(self, logits: torch.Tensor, candidates: Sequence[PartialCandidate]) -> torch.Tensor:
        """Choose a token for each candidate and append it; candidates that end get their ``finish``.

        Args:
            logits: Logits of shape (candidates, vocabulary), row i for candidate i.

        Returns:
            Token ids of shape (candidates,), on the device of the logits.

        Raises:
            CsrError: A row of logits holds NaN or plus infinity, or nothing but minus infinity.
        """
        logits = logits.float()
        _require_finite(logits, candidates)
        masked = logits.index_fill(1, self._image_token_ids, -torch.inf)
        if self.decoding.diversity_penalty is not None:
            group_ids = torch.tensor([candidate.group_id for candidate in candidates], device=logits.device)
            indices = torch.tensor([candidate.sibling_index for candidate in candidates], device=logits.device)
            tokens = choose_diverse(masked, group_ids, indices, self.decoding.diversity_penalty)
        elif self.decoding.temperature == 0.0:
            tokens = masked.argmax(dim=-1)
        else:
            drawn = np.array([candidate.uniforms[len(candidate.token_ids)] for candidate in candidates])
            tokens = sample(masked, torch.from_numpy(drawn), self.decoding.temperature, self.decoding.top_p)
            if self.decoding.greedy_first:
                is_first = torch.tensor(
                    [candidate.sibling_index == 0 for candidate in candidates], device=logits.device
                )
                tokens = torch.where(is_first, masked.argmax(dim=-1), tokens)
        logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
        for candidate, token, logprob in zip(candidates, tokens.tolist(), logprobs.tolist(), strict=True):
            self.append(candidate, token, logprob)
        return tokens


def _require_finite(logits: torch.Tensor, candidates: Sequence[PartialCandidate]) -> None:
    """Refuse logits that define no distribution, and name the prompt.

    Raises:
        CsrError: A row of logits holds NaN or plus infinity, or nothing but minus infinity.
    """
    is_finite = logits.amax(dim=-1).isfinite()  # The maximum of a row with NaN is NaN.
    if not bool(is_finite.all()):
        prompt_id = candidates[int((~is_finite).nonzero()[0])].prompt_id
        raise PromptError(
            f"prompt {prompt_id}: the policy computes logits that are not finite",
            "check its image and the weights; float16 overflows where bfloat16 and float32 do not",
        )
