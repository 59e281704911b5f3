"""From logits to candidates: choosing tokens, noting them, and seeing where a sentence ends.

Both ways of running the model, :mod:`csr_vlm.generation.plain` and
:mod:`csr_vlm.generation.scheduler`, leave all of this to a :class:`Writer`, so with the
same logits they write the same candidates; engines that choose tokens themselves leave the
ends of sentences to :class:`Sentences`. Log-probabilities are those of the raw
distribution; bars, temperature and diversity only steer the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Candidate, Expansion, Finish
from csr_vlm.generation.sampling import diverse, sample, uniforms
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.policy import Policy


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and when a candidate stops."""

    max_new_tokens: int
    rule: SentenceRule | None
    """None decodes to the end of the response."""
    temperature: float
    """0 takes the most probable token."""
    top_p: float = 1.0
    diversity_penalty: float | None = None
    """Not None makes siblings avoid each other's tokens."""
    greedy_first: bool = False
    """The first sibling takes the most probable tokens, whatever the temperature."""

    @classmethod
    def of(cls, config: SearchConfig) -> Decoding:
        """Read how the search wants its sentences."""
        return cls(
            max_new_tokens=config.max_sentence_tokens,
            rule=SentenceRule(config.delimiters),
            temperature=config.temperature,
            top_p=config.top_p,
            diversity_penalty=config.diversity_penalty if config.decoding == "diverse" else None,
            greedy_first=config.greedy_first,
        )


@dataclass(slots=True)
class Row:
    """One candidate in the making."""

    family: int
    """The same for siblings, and for them alone."""
    place: int
    """Among the siblings."""
    prefix_ids: tuple[int, ...]
    uniform: np.ndarray
    prompt_id: str = ""
    prefix_text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None
    text: str | None = None
    """Of the sentence, once its end was looked for."""


class Sentences:
    """Notes rows' tokens as they come, sees where sentences end, and makes candidates of them."""

    def __init__(self, prompt_encoder: PromptEncoder, decoding: Decoding) -> None:
        self.decoding = decoding
        self._reader = prompt_encoder
        self._num_families = 0
        delimiters = decoding.rule.delimiters if decoding.rule is not None else ""
        self._delimiter_ids = frozenset(
            index
            for token, index in (prompt_encoder.tokenizer.get_vocab().items() if delimiters else ())
            if any(char in token for char in delimiters)
        )

    def start(self, request: Expansion) -> list[Row]:
        """Make the rows of a request's candidates."""
        self._num_families += 1
        prefix_text = self._text(request.prefix_ids)
        return [
            Row(
                family=self._num_families,
                place=place,
                prefix_ids=request.prefix_ids,
                uniform=uniforms((*request.seed, place), self.decoding.max_new_tokens),
                prompt_id=request.prompt.prompt_id,
                prefix_text=prefix_text,
            )
            for place in range(request.num_candidates)
        ]

    def candidate(self, row: Row) -> Candidate:
        """Give the finished row as a candidate."""
        if row.finish is not Finish.DELIMITER or row.text is None:
            row.text = self._text((*row.prefix_ids, *row.ids))[len(row.prefix_text) :]
        return Candidate(tuple(row.ids), tuple(row.logprobs), row.text, row.finish or Finish.LENGTH)

    def note(self, row: Row, token: int, logprob: float) -> None:
        """Add a token to a row, or see that the row ended before it."""
        ends_response = token in self._reader.eos_ids
        if self._may_end(row) and self._ends(row, None if ends_response else token):
            # The token looked at is taken back: the next sentence draws its own.
            row.finish = Finish.DELIMITER
            return
        row.ids.append(token)
        row.logprobs.append(logprob)
        if ends_response:
            row.finish = Finish.EOS
        elif len(row.ids) >= self.decoding.max_new_tokens:
            row.finish = Finish.LENGTH

    def _may_end(self, row: Row) -> bool:
        """Cheap test on the last two tokens; a closing quote may follow the delimiter."""
        return any(token in self._delimiter_ids for token in row.ids[-2:])

    def _ends(self, row: Row, token: int | None) -> bool:
        """Whether the sentence ends before ``token``, or with the response if that is None."""
        assert self.decoding.rule is not None
        text = self._text((*row.prefix_ids, *row.ids))
        following = None if token is None else self._text((*row.prefix_ids, *row.ids, token))[len(text) :]
        row.text = text[len(row.prefix_text) :]
        return self.decoding.rule.ends(row.text, following)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._reader.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Writer(Sentences):
    """Continues rows by a token each, chosen from the policy's logits."""

    def __init__(self, policy: Policy, decoding: Decoding) -> None:
        super().__init__(policy.prompt_encoder, decoding)
        self._barred = torch.tensor(policy.image_token_ids, dtype=torch.long, device=policy.device)

    def choose(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Choose a token for each row and note it; rows that end with it get their ``finish``.

        Args:
            logits: Of shape (rows, vocabulary).

        Returns:
            The tokens, of shape (rows,), on the logits' device.
        """
        logits = logits.float()
        _refuse_nonsense(logits, rows)
        barred = logits.index_fill(1, self._barred, -torch.inf)
        if self.decoding.diversity_penalty is not None:
            family = torch.tensor([row.family for row in rows], device=logits.device)
            place = torch.tensor([row.place for row in rows], device=logits.device)
            tokens = diverse(barred, family, place, self.decoding.diversity_penalty)
        elif self.decoding.temperature == 0.0:
            tokens = barred.argmax(dim=-1)
        else:
            uniform = torch.from_numpy(np.array([row.uniform[len(row.ids)] for row in rows]))
            tokens = sample(barred, uniform, self.decoding.temperature, self.decoding.top_p)
            if self.decoding.greedy_first:
                first = torch.tensor([row.place == 0 for row in rows], device=logits.device)
                tokens = torch.where(first, barred.argmax(dim=-1), tokens)
        logprobs = logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(dim=-1)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            self.note(row, token, logprob)
        return tokens


def _refuse_nonsense(logits: torch.Tensor, rows: Sequence[Row]) -> None:
    """Stop where a model computes what is no distribution, and name the prompt.

    Raises:
        CsrError: A row of logits holds NaN or plus infinity, or nothing but minus infinity.
    """
    sound = logits.amax(dim=-1).isfinite()  # The maximum of a row with NaN is NaN.
    if not bool(sound.all()):
        culprit = rows[int((~sound).nonzero()[0])].prompt_id
        raise CsrError(
            f"prompt {culprit}: the policy computes logits that are not finite",
            "look at its image and at the weights; float16 overflows where bfloat16 and float32 do not",
        )
