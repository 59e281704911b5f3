"""Search over an engine that is asked for one candidate at a time and gives its tokens as they come.

Such an engine (vLLM) chooses tokens, batches, shares prefixes and keeps images encoded by
itself, so everything that a search asks for goes in at once. What is left to do here is what
the engine cannot know: where a sentence ends. A candidate whose sentence has ended is called
off; the token that showed it is taken back, as everywhere in this package.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Candidate, Expansion, Prompt
from csr_vlm.generation.decoding import Decoding, Row, Sentences
from csr_vlm.generation.sampling import stream_key
from csr_vlm.method.search import Proposer
from csr_vlm.models.encoding import PromptEncoder

_BAR = -100.0
"""Added to a barred token's logit, the most that vLLM takes; log-probabilities are recorded without it."""


@dataclass(frozen=True)
class Asked:
    """A request for one candidate."""

    key: str
    prompt: Prompt
    token_ids: list[int]
    """The prompt with ONE token in the image's place, which the engine expands, then the partial response."""
    sampling: dict[str, Any]
    """Fields of vLLM's SamplingParams."""


@dataclass(frozen=True)
class Piece:
    """Some more tokens of a candidate."""

    key: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """log P(r_o | x, r_<o) of the raw distribution."""
    ended: bool
    """Whether no more will come."""
    prompt_ids: Sequence[int] | None = None
    """The prompt and partial response as the engine read them, the image's token expanded."""


class TokenStream(Protocol):
    """An engine that streams."""

    def start(self, asked: Asked) -> None:
        """Take on a request."""
        ...

    def pieces(self) -> Sequence[Piece]:
        """Wait until there are some, of any of the requests."""
        ...

    def stop(self, keys: Sequence[str]) -> None:
        """Give requests up; a few more of their tokens may still come."""
        ...

    def forget(self, prompt_id: str) -> None:
        """Drop what is kept about a prompt's image."""
        ...


class StreamingEngine:
    """Proposes sentences through a stream of tokens."""

    def __init__(self, stream: TokenStream, prompt_encoder: PromptEncoder) -> None:
        self.prompt_encoder = prompt_encoder
        self._stream = stream

    def proposer(self, config: SearchConfig, example: Prompt) -> Proposer:
        """Give what a search asks for sentences."""
        return StreamProposer(self._stream, self.prompt_encoder, Decoding.of(config))

    def forget(self) -> None:
        """Nothing is kept between work items but what the engine keeps by itself."""

    def check(self, prompt: Prompt) -> None:
        """See that the engine reads a prompt, and a partial response to it, as training will.

        Raises:
            CsrError: It does not, as with an image that is expanded otherwise, or twice.
        """
        whole: list[int] = self.prompt_encoder.process(prompt)["input_ids"][0].tolist()
        short = self.prompt_encoder.short_ids(prompt)
        said = [
            token
            for token in short
            if token not in {*self.prompt_encoder.image_token_ids, *self.prompt_encoder.eos_ids}
        ][-3:]
        for number, begun in enumerate(([], said)):
            sampling = {"max_tokens": 1, "temperature": 0.0, "logprobs": 0, "detokenize": False}
            self._stream.start(Asked(f"check-{number}", prompt, [*short, *begun], sampling))
            pieces: list[Piece] = []
            while not (pieces and pieces[-1].ended):
                pieces += self._stream.pieces()
            if list(pieces[0].prompt_ids or ()) != [*whole, *begun]:
                raise CsrError(
                    f"the engine reads prompt {prompt.prompt_id} as other tokens than the model's processor writes",
                    "generation.engine=transformers",
                )
        self._stream.forget(prompt.prompt_id)


class StreamProposer:
    """Continues partial responses of many prompts, each prompt at its own pace."""

    def __init__(self, stream: TokenStream, prompt_encoder: PromptEncoder, decoding: Decoding) -> None:
        self._stream = stream
        self._reader = prompt_encoder
        self._decoding = decoding
        self._sentences = Sentences(prompt_encoder, decoding)
        self._keys = map(str, count())
        self._short_ids: dict[str, list[int]] = {}
        self._live: dict[str, tuple[str, Row]] = {}
        self._num_live: Counter[str] = Counter()
        self._asked: dict[str, list[tuple[Expansion, list[Row]]]] = defaultdict(list)

    def submit(self, requests: Sequence[Expansion]) -> None:
        for request in requests:
            prompt = request.prompt
            if prompt.prompt_id not in self._short_ids:
                self._short_ids[prompt.prompt_id] = self._reader.short_ids(prompt)
            rows = self._sentences.start(request)
            self._asked[prompt.prompt_id].append((request, rows))
            self._num_live[prompt.prompt_id] += len(rows)
            for row in rows:
                key = next(self._keys)
                self._live[key] = prompt.prompt_id, row
                ids = [*self._short_ids[prompt.prompt_id], *request.prefix_ids]
                self._stream.start(Asked(key, prompt, ids, self._sampling(request, row)))

    def collect(self) -> Sequence[tuple[Expansion, Sequence[Candidate]]]:
        while not (done := [prompt_id for prompt_id in self._asked if not self._num_live[prompt_id]]) and self._live:
            over = [piece.key for piece in self._stream.pieces() if self._is_over(piece)]
            if over:
                self._stream.stop(over)
        return [
            (request, [self._sentences.candidate(row) for row in rows])
            for prompt_id in done
            for request, rows in self._asked.pop(prompt_id)
        ]

    def release(self, prompt_id: str) -> None:
        del self._short_ids[prompt_id]
        self._stream.forget(prompt_id)

    def _is_over(self, piece: Piece) -> bool:
        """Note a candidate's tokens, and tell whether it has ended before the engine knew."""
        if piece.key not in self._live:
            return False
        prompt_id, row = self._live[piece.key]
        for token, logprob in zip(piece.token_ids, piece.logprobs, strict=True):
            self._sentences.note(row, token, logprob)
            if row.finish is not None:
                del self._live[piece.key]
                self._num_live[prompt_id] -= 1
                return not piece.ended
        if piece.ended:
            raise CsrError(
                f"the engine broke off a sentence of prompt {prompt_id} after {len(row.ids)} tokens",
                "raise its max_model_len, or lower method.search.max_sentences",
            )
        return False

    def _sampling(self, request: Expansion, row: Row) -> dict[str, Any]:
        """Say how a candidate's tokens are drawn: as far as vLLM goes, as :class:`Writer` does."""
        decoding = self._decoding
        greedy = decoding.temperature == 0.0 or (decoding.greedy_first and row.place == 0)
        return {
            "max_tokens": decoding.max_new_tokens,
            "temperature": 0.0 if greedy else decoding.temperature,
            "top_p": 1.0 if greedy else decoding.top_p,
            "seed": stream_key((*request.seed, row.place)) % 2**63,
            "logprobs": 0,  # of the chosen token alone
            "logit_bias": dict.fromkeys(self._reader.image_token_ids, _BAR),
            "stop_token_ids": sorted(self._reader.eos_ids),
            "detokenize": False,
        }
