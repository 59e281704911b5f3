"""Search with an engine that generates one candidate per request and streams its tokens.

Such an engine (vLLM) chooses tokens, batches, shares prefixes and caches images by itself, so
all of a search's requests are submitted at once. This module adds what the engine cannot know:
where a sentence ends. A request whose sentence has ended is aborted, and the token that showed
the end is discarded, as by :class:`csr_vlm.generation.decoding.SentenceTracker` everywhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import CsrError, PromptError
from csr_vlm.core.records import Candidate, Expansion, Prompt
from csr_vlm.generation.decoding import DecodingSettings, PartialCandidate, SentenceTracker
from csr_vlm.generation.sampling import stream_key
from csr_vlm.method.search import Proposer
from csr_vlm.models.encoding import PromptEncoder

_IMAGE_TOKEN_BIAS = -100.0
"""Added to the logits of image tokens, the most that vLLM accepts; log-probabilities are recorded without it."""


@dataclass(frozen=True)
class TokenRequest:
    """Request the tokens of one candidate."""

    request_id: str
    prompt: Prompt
    token_ids: list[int]
    """Prompt with ONE token in the image's place, which the engine expands, then the partial response."""
    sampling: dict[str, Any]
    """Fields of vLLM's SamplingParams."""


@dataclass(frozen=True)
class TokenChunk:
    """Hold further tokens of a candidate."""

    request_id: str
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    """log P(r_o | x, r_<o) of the raw distribution, in nats, one per token."""
    is_last: bool
    """Whether the engine has finished the request."""
    prompt_ids: Sequence[int] | None = None
    """Prompt and partial response as the engine tokenized them, the image's token expanded."""


class TokenStream(Protocol):
    """Define what :class:`StreamingEngine` needs of an engine that streams tokens."""

    def add(self, request: TokenRequest) -> None:
        """Start a request."""
        ...

    def next_chunks(self) -> Sequence[TokenChunk]:
        """Wait for chunks of any requests, and return them."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests; a few more of their chunks may still be returned."""
        ...

    def release(self, prompt_id: str) -> None:
        """Drop a prompt's cached image."""
        ...


class StreamingEngine:
    """Propose sentences through a stream of tokens (a :class:`csr_vlm.generation.engines.Engine`).

    Args:
        max_live: Candidates that the engine decodes at once.
    """

    def __init__(self, stream: TokenStream, prompt_encoder: PromptEncoder, max_live: int = 512) -> None:
        self._max_live = max_live
        self.prompt_encoder = prompt_encoder
        self._stream = stream
        self._request_ids = map(str, count())
        self._proposers: list[StreamProposer] = []

    def proposer(self, config: SearchConfig, example: Prompt) -> Proposer:
        """Return a proposer of sentences for a search."""
        decoding = DecodingSettings.from_search(config)
        proposer = StreamProposer(self._stream, self.prompt_encoder, decoding, self._request_ids, self._max_live)
        self._proposers.append(proposer)
        return proposer

    def forget(self) -> None:
        """Abort what a search that failed left running; only the engine itself caches anything between work items."""
        while self._proposers:
            self._proposers.pop().abort()

    @property
    def gains_from_more_prompts(self) -> bool:
        """Return True: the engine batches whatever it is given."""
        return True

    def shrink(self) -> None:
        """Return None: the engine has reserved its memory when it started."""

    def check(self, prompt: Prompt) -> None:
        """Check that the engine reads a prompt, and a partial response to it, as the same tokens as training.

        Raises:
            CsrError: The tokens differ, such as an image that is expanded differently, or twice.
        """
        prompt_ids: list[int] = self.prompt_encoder.process(prompt)["input_ids"][0].tolist()
        short_ids = self.prompt_encoder.short_ids(prompt)
        special_ids = {*self.prompt_encoder.image_token_ids, *self.prompt_encoder.eos_ids}
        partial_response = [token for token in short_ids if token not in special_ids][-3:]
        for index, prefix_ids in enumerate(([], partial_response)):
            sampling = {"max_tokens": 1, "temperature": 0.0, "logprobs": 0, "detokenize": False}
            self._stream.add(TokenRequest(f"check-{index}", prompt, [*short_ids, *prefix_ids], sampling))
            chunks: list[TokenChunk] = []
            while not (chunks and chunks[-1].is_last):
                chunks += self._stream.next_chunks()
            if list(chunks[0].prompt_ids or ()) != [*prompt_ids, *prefix_ids]:
                raise CsrError(
                    f"the engine tokenizes prompt {prompt.prompt_id} differently from the model's processor",
                    "set generation.engine=transformers",
                )
        self._stream.release(prompt.prompt_id)


class StreamProposer:
    """Continue partial responses of many prompts, each prompt at its own pace.

    Args:
        request_ids: Ids that no other request to the stream has.
        max_live: Candidates that the engine decodes at once.
    """

    def __init__(
        self,
        stream: TokenStream,
        prompt_encoder: PromptEncoder,
        decoding: DecodingSettings,
        request_ids: Iterator[str] | None = None,
        max_live: int = 512,
    ) -> None:
        self._stream = stream
        self._prompt_encoder = prompt_encoder
        self._decoding = decoding
        self._max_live = max_live
        self._tracker = SentenceTracker(prompt_encoder, decoding)
        self._next_ids = map(str, count()) if request_ids is None else request_ids
        self._short_ids: dict[str, list[int]] = {}
        """Token ids of each prompt, with one token in the image's place."""
        self._live: dict[str, tuple[str, PartialCandidate]] = {}
        """Prompt id and candidate of each unfinished request, by request id."""
        self._num_live: Counter[str] = Counter()
        """Unfinished candidates of each prompt."""
        self._submitted: dict[str, list[tuple[Expansion, list[PartialCandidate]]]] = defaultdict(list)
        """Requests of each prompt's current round, with their candidates."""

    def submit(self, requests: Sequence[Expansion]) -> None:
        """Start one token request for each candidate of each request."""
        for request in requests:
            prompt = request.prompt
            if prompt.prompt_id not in self._short_ids:
                self._short_ids[prompt.prompt_id] = self._prompt_encoder.short_ids(prompt)
            candidates = self._tracker.start(request)
            self._submitted[prompt.prompt_id].append((request, candidates))
            self._num_live[prompt.prompt_id] += len(candidates)
            for candidate in candidates:
                request_id = next(self._next_ids)
                self._live[request_id] = prompt.prompt_id, candidate
                token_ids = [*self._short_ids[prompt.prompt_id], *request.prefix_ids]
                sampling = self._sampling(request, candidate.sibling_index)
                self._stream.add(TokenRequest(request_id, prompt, token_ids, sampling))

    def collect(self) -> Sequence[tuple[Expansion, Sequence[Candidate]]]:
        """Wait until some prompts have all their requests answered, and return those answers."""
        while not (done := [id_ for id_ in self._submitted if not self._num_live[id_]]) and self._live:
            ended = [chunk.request_id for chunk in self._stream.next_chunks() if self._must_abort(chunk)]
            if ended:
                self._stream.abort(ended)
        return [
            (request, [self._tracker.completed(candidate) for candidate in candidates])
            for prompt_id in done
            for request, candidates in self._submitted.pop(prompt_id)
        ]

    def release(self, prompt_id: str) -> None:
        """Drop a prompt and its cached image."""
        del self._short_ids[prompt_id]
        self._stream.release(prompt_id)

    def wants_prompts(self) -> bool:
        """Return whether fewer candidates are in progress than the engine decodes at once."""
        return len(self._live) < self._max_live

    def abort(self) -> None:
        """Abort all requests that are not answered, and drop their prompts."""
        if self._live:
            self._stream.abort(list(self._live))
        for prompt_id in list(self._short_ids):
            self.release(prompt_id)
        self._live.clear()

    def _must_abort(self, chunk: TokenChunk) -> bool:
        """Record a chunk's tokens; return whether its sentence ended while the engine still generates.

        Raises:
            CsrError: The engine finished the request before the sentence ended.
        """
        if chunk.request_id not in self._live:
            return False
        prompt_id, candidate = self._live[chunk.request_id]
        for token, logprob in zip(chunk.token_ids, chunk.logprobs, strict=True):
            self._tracker.append(candidate, token, logprob)
            if candidate.finish is not None:
                del self._live[chunk.request_id]
                self._num_live[prompt_id] -= 1
                return not chunk.is_last
        if chunk.is_last:
            raise PromptError(
                f"the engine stopped a sentence of prompt {prompt_id} early, after {len(candidate.token_ids)} tokens",
                "raise its max_model_len, or lower method.search.max_sentences",
            )
        return False

    def _sampling(self, request: Expansion, sibling_index: int) -> dict[str, Any]:
        """Build vLLM's sampling parameters, as close to :class:`csr_vlm.generation.decoding.TokenSampler` as it can."""
        decoding = self._decoding
        is_greedy = decoding.temperature == 0.0 or (decoding.greedy_first and sibling_index == 0)
        return {
            "max_tokens": decoding.max_new_tokens,
            "temperature": 0.0 if is_greedy else decoding.temperature,
            "top_p": 1.0 if is_greedy else decoding.top_p,
            "seed": stream_key((*request.seed, sibling_index)) % 2**63,
            "logprobs": 0,  # of the chosen token alone
            "logit_bias": dict.fromkeys(self._prompt_encoder.image_token_ids, _IMAGE_TOKEN_BIAS),
            "stop_token_ids": sorted(self._prompt_encoder.eos_ids),
            "detokenize": False,
        }
