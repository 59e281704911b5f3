"""Generate with transformers: many prompts and nodes at once."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.batching import PROMPTS_PER_FULL_BEAM
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Candidate, Expansion, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import DecodingSettings, TokenSampler
from csr_vlm.generation.plain_decoder import PlainDecoder
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_attention import is_gpu
from csr_vlm.generation.shared_attention_check import shared_attention_problem
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.method.search import Proposer, RoundProposer
from csr_vlm.models.policy import Policy

Attention = Literal["auto", "shared", "plain"]


class TransformersEngine:
    """Propose sentences for a search, and generate whole responses.

    Args:
        policy: Model to generate with. With shared attention its attention function is replaced
            by one that computes the same; nothing else of it changes.
        max_rows: Most sequences decoded at once.
        attention: ``shared`` stores keys and values once for all candidates, ``plain`` copies
            them to each; ``auto`` uses ``shared`` if it passes
            :mod:`csr_vlm.generation.shared_attention_check`, else ``plain``.
        warn: Called with a message when ``auto`` falls back to ``plain``.
    """

    def __init__(
        self,
        policy: Policy,
        max_rows: int = 512,
        attention: Attention = "auto",
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.counters = Counters()
        self._attention = attention
        self._warn = warn
        self._plain_decoder = PlainDecoder(policy, max_rows, self.counters)
        self._shared_model: SharedModel | None = None
        self._uses_shared_attention: bool | None = None
        """None until the first proposer is created."""

    def proposer(self, config: SearchConfig, example: Prompt) -> Proposer:
        """Return a proposer of sentences for a search; ``example`` is one of its prompts."""
        # The most candidates of one prompt that decode at once, with a full beam.
        rows_per_prompt = config.num_candidates * (config.keep_top + config.keep_bottom)
        return self._proposer(DecodingSettings.from_search(config), rows_per_prompt, example)

    def propose(self, requests: Sequence[Expansion], config: SearchConfig) -> list[list[Candidate]]:
        """Continue each partial response by ``num_candidates`` sentences, in the order of the requests."""
        if not requests:
            return []
        return _answer_all(self.proposer(config, requests[0].prompt), requests)

    def respond(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Candidate]:
        """Generate one whole response per prompt, greedily at temperature 0."""
        if not prompts:
            return []
        requests = [Expansion(prompt, "", (), 1, (seed, prompt.prompt_id, "respond")) for prompt in prompts]
        decoding = DecodingSettings(max_new_tokens, rule=None, temperature=temperature)
        return [candidates[0] for candidates in _answer_all(self._proposer(decoding, 1, prompts[0]), requests)]

    def forget(self) -> None:
        """Drop cached images; call this between work items."""
        self._plain_decoder.forget()

    def _proposer(self, decoding: DecodingSettings, rows_per_prompt: int, example: Prompt) -> Proposer:
        sampler = TokenSampler(self.policy, decoding)
        if self._uses_shared_attention is None:
            self._uses_shared_attention = self._attention != "plain" and self._check_shared_attention(example)
        if not self._uses_shared_attention:
            return RoundProposer(lambda requests: self._plain_decoder.answer(requests, sampler))
        if self._shared_model is None:
            self._shared_model = SharedModel(self.policy, self.counters)
        # Sentences of a round end at different steps; on a GPU other prompts use the rows meanwhile.
        per_row = PROMPTS_PER_FULL_BEAM if self.gains_from_more_prompts else 1
        max_prompts = max(per_row * self.max_rows // rows_per_prompt, 1)
        return Scheduler(self._shared_model, sampler, max_rows=self.max_rows, max_prompts=max_prompts)

    @property
    def gains_from_more_prompts(self) -> bool:
        """Return whether the model is on a GPU, which decodes many rows in the time of few."""
        return is_gpu(self.policy.device)

    def shrink(self) -> int | None:
        """Halve the rows; return their number, or None if there is only one."""
        if self.max_rows == 1:
            return None
        self.max_rows //= 2
        self._plain_decoder = PlainDecoder(self.policy, self.max_rows, self.counters)
        return self.max_rows

    def _check_shared_attention(self, example: Prompt) -> bool:
        """Return whether shared attention works for the policy, checked on a prompt.

        Raises:
            CsrError: It does not work, and ``attention`` is ``shared``.
        """
        problem = shared_attention_problem(self.policy, example)
        if problem is None:
            return True
        name = type(self.policy.base_model).__name__
        if self._attention == "shared":
            raise CsrError(f"{name} does not support shared attention: {problem}", "set generation.attention=auto")
        self._warn(f"{name} decodes without shared attention, which is slower: {problem}")
        return False


def _answer_all(proposer: Proposer, requests: Sequence[Expansion]) -> list[list[Candidate]]:
    """Submit all requests at once and wait for all answers, in the order of the requests."""
    proposer.submit(requests)
    by_prompt: dict[str, Iterator[list[Candidate]]] = {}
    waiting = {request.prompt.prompt_id for request in requests}
    while waiting - by_prompt.keys():
        collected: dict[str, list[list[Candidate]]] = defaultdict(list)
        for request, candidates in proposer.collect():
            collected[request.prompt.prompt_id].append(list(candidates))
        for prompt_id, answers in collected.items():
            by_prompt[prompt_id] = iter(answers)
            proposer.release(prompt_id)
    return [next(by_prompt[request.prompt.prompt_id]) for request in requests]
