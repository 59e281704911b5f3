"""Schedule the decoding of many prompts: which candidates decode now, and what stays cached for the next round.

A :class:`SiblingGroup` holds the candidates of one expansion: they continue the same node,
start together and decode in lockstep, while other groups are at other steps, of other
sentences, of other prompts. A row leaves when its candidate ends; a group leaves with its last
row and another enters. What a finished group computed is kept until the search decides which
of its sentences to continue; their keys and values then become the path that the next groups
attend to, so no token is prefilled or decoded twice.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation.decoding import PartialCandidate
from csr_vlm.generation.reading_ahead import PROMPTS_AHEAD, ReadingAhead
from csr_vlm.generation.row_budget import MAX_PREFILL_TOKENS
from csr_vlm.generation.shared_attention import (
    CacheView,
    DecodeStep,
    KVCache,
    RowLayout,
    SiblingLayout,
    grid_of,
    padding_mask,
    to_device,
)
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.models.encoding import EncodedPrompt

MAX_PREFILL_PROMPTS = 16
"""Most prompts prefilled in one forward pass."""
READY_SHARE = 0.25
"""Answers are returned once their candidates exceed this share of the live ones: small enough
to keep the batch full, large enough to score answers together."""


class Sampler(Protocol):
    """Define what the scheduler needs of a :class:`csr_vlm.generation.decoding.TokenSampler`."""

    def start(self, request: Expansion) -> list[PartialCandidate]:
        """Create the candidates of a request."""
        ...

    def choose(self, logits: torch.Tensor, candidates: Sequence[PartialCandidate]) -> torch.Tensor:
        """Choose and append a token for each candidate; return the tokens, of shape (candidates,)."""
        ...

    def completed(self, candidate: PartialCandidate) -> Candidate:
        """Return a finished candidate as a record."""
        ...


@dataclass(frozen=True)
class CachedResponse:
    """Hold the keys and values of a partial response that may be continued."""

    block: torch.Tensor
    """Keys and values of its sibling group, of shape (layers, 2, key heads, tokens, head size)."""
    token_index: torch.Tensor
    """Index in the block of each of the response's tokens, of shape (path tokens,)."""
    hidden_state: torch.Tensor
    """Final hidden state of its last token, of shape (width,)."""

    def path(self) -> torch.Tensor:
        """Return the response's keys and values, of shape (layers, 2, key heads, path tokens, head size)."""
        return self.block.index_select(3, self.token_index)


@dataclass
class ActivePrompt:
    """Hold a prompt whose keys and values are cached, with its current round of requests."""

    prompt: Prompt
    num_tokens: int
    next_position: int
    """Position id of the first response token."""
    root: CachedResponse
    """The empty response."""
    slot: int = -1
    requests: list[Expansion] = field(default_factory=list)
    answers: dict[int, list[Candidate]] = field(default_factory=dict)
    """Finished candidates by the request's index in ``requests``."""
    responses: dict[tuple[int, ...], CachedResponse] = field(default_factory=dict)
    """Partial responses that may be continued, by their token ids."""

    @property
    def is_answered(self) -> bool:
        """Return whether all requests of the round have their candidates."""
        return len(self.answers) == len(self.requests)


@dataclass
class SiblingGroup:
    """Hold the candidates of one request while they decode."""

    prompt: ActivePrompt
    request_index: int
    """Index of the request in ``prompt.requests``."""
    candidates: list[PartialCandidate]
    path_length: int
    """Tokens of the partial response that the candidates continue."""
    slot: int = -1
    num_steps: int = 0
    """Tokens that each live candidate has stored."""
    end_states: dict[int, torch.Tensor] = field(default_factory=dict)
    """Final hidden state of the last token of each finished sentence, by sibling index."""

    @property
    def num_tokens(self) -> int:
        """Return the tokens in the group's block: the path, then one per sibling and step."""
        return self.path_length + self.num_steps * len(self.candidates)

    def token_index(self, candidate: PartialCandidate) -> list[int]:
        """List the indices in the block of the path's and the candidate's tokens."""
        tokens = range(self.path_length + candidate.sibling_index, self.num_tokens, len(self.candidates))
        return [*range(self.path_length), *tokens[: len(candidate.token_ids)]]

    @property
    def is_done(self) -> bool:
        """Return whether all candidates have ended."""
        return all(candidate.finish is not None for candidate in self.candidates)


class Scheduler:
    """Answer requests as they come (a :class:`csr_vlm.method.search.Proposer`).

    Args:
        model: Model to prefill and decode with.
        sampler: Sampler that chooses the tokens.
        max_rows: Most candidates decoded at once; a single larger request decodes alone.
        max_prompts: Most prompts cached at once.
        reading: Encodes waiting prompts meanwhile; without it, prompts are encoded when they are prefilled.
    """

    def __init__(
        self,
        model: SharedModel,
        sampler: Sampler,
        *,
        max_rows: int,
        max_prompts: int,
        reading: ReadingAhead | None = None,
    ) -> None:
        self._policy = model.policy
        self._reading = reading
        self._counters = model.counters
        self._model = model
        self._sampler = sampler
        self._max_rows = max_rows
        self._max_prompts = max_prompts
        self._waiting: deque[list[Expansion]] = deque()
        """Requests of prompts that are not active, one list per prompt."""
        self._queue: deque[tuple[ActivePrompt, int]] = deque()
        """Requests of active prompts that have not started, by index."""
        self._active: dict[str, ActivePrompt] = {}
        self._prompt_cache: KVCache[ActivePrompt] = KVCache(max_prompts)
        self._group_cache: KVCache[SiblingGroup] = KVCache(max_rows)
        self._image_features: dict[str, tuple[torch.Tensor, ...] | None] = {}
        """Features of images that waiting prompts need again."""
        self._live: list[tuple[SiblingGroup, PartialCandidate]] = []
        """Candidates that are decoding, in the order of the model's rows."""
        self._hidden_states: torch.Tensor | None = None
        """Final hidden states that each live row's next token is chosen from, of shape (rows, width)."""

    def submit(self, requests: Sequence[Expansion]) -> None:
        """Accept the next round of some prompts; responses that it does not continue are dropped."""
        by_prompt: dict[str, list[Expansion]] = defaultdict(list)
        for request in requests:
            by_prompt[request.prompt.prompt_id].append(request)
        for prompt_id, prompt_requests in by_prompt.items():
            prompt = self._active.get(prompt_id)
            if prompt is None:
                self._waiting.append(prompt_requests)
                if self._reading is not None:
                    self._reading.expect([prompt_requests[0].prompt])
            else:
                self._begin_round(prompt, prompt_requests)

    @torch.inference_mode()
    def release(self, prompt_id: str) -> None:
        """Drop a prompt and its cache."""
        self._prompt_cache.remove(self._active.pop(prompt_id))

    def wants_prompts(self) -> bool:
        """Return whether so few prompts wait to be prefilled that the next should be read."""
        return len(self._waiting) < (1 if self._reading is None else PROMPTS_AHEAD // 2)

    @torch.inference_mode()
    def collect(self) -> list[tuple[Expansion, list[Candidate]]]:
        """Decode until some prompts have all their requests answered, and return those answers."""
        while True:
            self._admit()
            ready = [prompt for prompt in self._active.values() if prompt.requests and prompt.is_answered]
            num_ready = sum(len(candidates) for prompt in ready for candidates in prompt.answers.values())
            if not self._live or num_ready > READY_SHARE * len(self._live):
                break
            self._advance()
        answers = [
            (request, prompt.answers[index]) for prompt in ready for index, request in enumerate(prompt.requests)
        ]
        for prompt in ready:
            prompt.requests, prompt.answers = [], {}
        return answers

    def _begin_round(self, prompt: ActivePrompt, requests: list[Expansion]) -> None:
        continued = {request.prefix_ids for request in requests}
        prompt.responses = {ids: response for ids, response in prompt.responses.items() if ids in continued}
        prompt.requests, prompt.answers = requests, {}
        self._queue += [(prompt, index) for index in range(len(requests))]

    def _admit(self) -> None:
        """Start requests while there is room: those of active prompts first, then those of waiting prompts."""
        while True:
            started = []
            while self._queue and self._fits(self._queue[0][0].requests[self._queue[0][1]].num_candidates):
                started.append(self._start(*self._queue.popleft()))
            if started:
                earlier = [] if self._hidden_states is None else [self._hidden_states]
                self._hidden_states = torch.cat(earlier + started)
            if self._queue or not self._activate_prompts():
                return

    def _fits(self, num_rows: int) -> bool:
        return not self._live or len(self._live) + num_rows <= self._max_rows

    def _start(self, prompt: ActivePrompt, request_index: int) -> torch.Tensor:
        """Start a request's sibling group; return its rows' hidden states, (candidates, width)."""
        request = prompt.requests[request_index]
        response = prompt.responses.pop(request.prefix_ids, None) if request.prefix_ids else prompt.root
        if response is None:
            response = self._prefill_response(prompt, request.prefix_ids)
        candidates = self._sampler.start(request)
        group = SiblingGroup(prompt, request_index, candidates, path_length=len(response.token_index))
        self._group_cache.insert(group, response.path())
        self._live += [(group, candidate) for candidate in candidates]
        return response.hidden_state.expand(len(candidates), -1)

    def _prefill_response(self, prompt: ActivePrompt, prefix_ids: tuple[int, ...]) -> CachedResponse:
        """Prefill a partial response that this scheduler did not generate, such as that of a resumed run."""
        (encoded,) = self._encode([prompt.prompt])
        (prefill,) = self._model.prefill([encoded], [prefix_ids])
        tokens = torch.arange(prompt.num_tokens, prompt.num_tokens + len(prefix_ids), device=prefill.kv.device)
        return CachedResponse(prefill.kv, tokens, prefill.hidden_state)

    def _activate_prompts(self) -> bool:
        """Prefill waiting prompts that there is room for; return whether there were any."""
        admitted: list[list[Expansion]] = []
        num_rows = len(self._live)
        while self._waiting and len(self._active) + len(admitted) < self._max_prompts:
            num_rows += sum(request.num_candidates for request in self._waiting[0])
            if num_rows > self._max_rows and (self._live or admitted):
                break
            admitted.append(self._waiting.popleft())
        for chunk in batched(admitted, MAX_PREFILL_PROMPTS):
            encoded = self._encode([requests[0].prompt for requests in chunk])
            longest = max(len(item.input_ids) for item in encoded)
            for batch in batched(zip(chunk, encoded, strict=True), max(MAX_PREFILL_TOKENS // longest, 1)):
                self._prefill_prompts([requests for requests, _ in batch], [item for _, item in batch])
        return bool(admitted)

    def _prefill_prompts(self, rounds: Sequence[list[Expansion]], encoded: Sequence[EncodedPrompt]) -> None:
        """Prefill prompts in one forward pass and begin their first rounds."""
        for requests, prefill in zip(rounds, self._model.prefill(encoded, [()] * len(encoded)), strict=True):
            no_tokens = torch.arange(0, device=prefill.kv.device)
            # A copy, so that the storage of the whole batch is not kept alive.
            root = CachedResponse(prefill.kv[:, :, :, :0].clone(), no_tokens, prefill.hidden_state.clone())
            prompt = ActivePrompt(requests[0].prompt, prefill.kv.shape[3], prefill.next_position, root)
            self._active[prompt.prompt.prompt_id] = prompt
            self._prompt_cache.insert(prompt, prefill.kv)
            self._begin_round(prompt, requests)

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Encode prompts, each image once for all given and waiting prompts that show it."""
        started = time.perf_counter()
        if self._reading is None:
            encoded = [self._policy.encode(prompt) for prompt in prompts]
        else:
            encoded = self._reading.encode(prompts)
        self._counters.seconds_reading += time.perf_counter() - started
        if not self._policy.reuses_features:
            self._counters.vision_encodes += len(prompts)
            return encoded
        by_image = {prompt.image: item for prompt, item in zip(prompts, encoded, strict=True)}
        new = {image: item for image, item in by_image.items() if image not in self._image_features}
        if new:
            self._counters.vision_encodes += len(new)
            with_features = self._policy.with_features(list(new.values()))
            self._image_features |= {image: item.features for image, item in zip(new, with_features, strict=True)}
        result = [
            replace(item, features=self._image_features[prompt.image])
            for prompt, item in zip(prompts, encoded, strict=True)
        ]
        still_needed = {requests[0].prompt.image for requests in self._waiting}
        self._image_features = {
            image: features for image, features in self._image_features.items() if image in still_needed
        }
        return result

    def _advance(self) -> None:
        """Choose every live row's next token, drop the rows that end, and feed the others' tokens."""
        assert self._hidden_states is not None
        logits = self._model.logits(self._hidden_states)
        tokens = self._sampler.choose(logits, [candidate for _, candidate in self._live])
        unfinished = []
        done = {}
        for row, (group, candidate) in enumerate(self._live):
            if candidate.finish is None:
                unfinished.append(row)
                continue
            if candidate.finish is Finish.DELIMITER:
                group.end_states[candidate.sibling_index] = self._hidden_states[row].clone()
            if group.is_done:
                done[id(group)] = group
        for group in done.values():
            self._finish_group(group)
        if not unfinished:
            self._live, self._hidden_states = [], None
            return
        if len(unfinished) < len(self._live):
            self._live = [self._live[row] for row in unfinished]
            tokens = tokens[torch.tensor(unfinished, device=tokens.device)]
        positions, decode_step = self._next_step()
        self._hidden_states = self._model.decode(tokens, positions, decode_step)

    def _finish_group(self, group: SiblingGroup) -> None:
        """Answer a request whose candidates have ended, and keep the cache of its sentences for the next round."""
        prompt = group.prompt
        block = self._group_cache.read(group).clone() if group.end_states else None
        for candidate in group.candidates:
            if block is not None and candidate.sibling_index in group.end_states:
                token_index = torch.tensor(group.token_index(candidate), device=block.device)
                prompt.responses[(*candidate.prefix_ids, *candidate.token_ids)] = CachedResponse(
                    block, token_index, group.end_states[candidate.sibling_index]
                )
        self._group_cache.remove(group)
        prompt.answers[group.request_index] = [self._sampler.completed(candidate) for candidate in group.candidates]

    def _next_step(self) -> tuple[torch.Tensor, DecodeStep]:
        """Arrange the live rows' next tokens; return their position ids, (rows,), and the step."""
        groups: list[SiblingGroup] = self._group_cache.owners
        for group in groups:
            group.num_steps += 1
        self._group_cache.set_lengths([group.num_tokens for group in groups])
        per_group = [
            (g.prompt.slot, g.prompt.num_tokens, g.prompt.next_position, g.path_length, len(g.candidates), g.num_steps)
            for g in groups
        ]
        slot = np.array([group.slot for group, _ in self._live])
        sibling = np.array([candidate.sibling_index for _, candidate in self._live])
        prompt, prompt_length, position, path, siblings, num_steps = np.array(per_group).T[:, slot]  # each (rows,)
        step = num_steps - 1
        sibling_layout = SiblingLayout(
            prompt_lengths=[group.prompt.num_tokens for group in groups],
            path_lengths=[group.path_length for group in groups],
            num_siblings=[len(group.candidates) for group in groups],
            lengths=self._group_cache.lengths,
            width=self._group_cache.width,
            device=self._policy.device,
        )
        *prompt_grid, prompt_shape = grid_of(prompt, _running_count(prompt), len(self._prompt_cache.owners))
        *group_grid, group_shape = grid_of(slot, sibling, len(groups))
        token_index = prompt_length + path + step
        indices = [
            *prompt_grid,
            *group_grid,
            slot,
            path + step * siblings + sibling,
            position + path + step,
            token_index,
        ]
        tensors = to_device(indices, self._policy.device)
        padding = padding_mask(self._prompt_cache.lengths, self._prompt_cache.width, self._policy.device)
        mask = sibling_layout.mask(group_shape[1])
        return tensors[6], DecodeStep(
            prompts=CacheView(self._prompt_cache, RowLayout(tensors[0], tensors[1], prompt_shape), padding),
            groups=CacheView(self._group_cache, RowLayout(tensors[2], tensors[3], group_shape), mask, sibling_layout),
            write_index=self._group_cache.flat_index(tensors[4], tensors[5]),
            token_index=tensors[7],
            last_token_index=int(token_index.max()),
        )


def _running_count(values: np.ndarray) -> np.ndarray:
    """Count, for each value, how often it came before: 5 5 3 5 gives 0 1 0 2."""
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    counts = np.empty_like(order)
    counts[order] = np.arange(len(values)) - np.searchsorted(in_order, in_order)
    return counts
