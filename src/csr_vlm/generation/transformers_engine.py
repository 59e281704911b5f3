"""The engine that runs on transformers: many prompts and nodes at once."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Candidate, Expansion, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import Decoding, Writer
from csr_vlm.generation.plain import PlainDecoder
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_attention_check import sharing_trouble
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.method.search import Proposer, RoundProposer
from csr_vlm.models.policy import Policy

Attention = Literal["auto", "shared", "plain"]


class TransformersEngine:
    """Proposes sentences, and writes whole responses.

    Args:
        policy: The model. With shared attention its attention function is replaced by one
            that computes the same; nothing else of it changes.
        max_rows: Sequences decoded at once.
        attention: ``shared`` stores keys and values once for all candidates, ``plain`` copies
            them; ``auto`` shares where that gives what plain gives.
        notice: Called with a sentence when ``auto`` has to do without sharing.
    """

    def __init__(
        self,
        policy: Policy,
        max_rows: int = 512,
        attention: Attention = "auto",
        notice: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.counters = Counters()
        self._attention = attention
        self._notice = notice
        self._plain = PlainDecoder(policy, max_rows, self.counters)
        self._shared: SharedModel | None = None
        self._shares: bool | None = None
        """None until it was tried."""

    def proposer(self, config: SearchConfig, example: Prompt) -> Proposer:
        """Give what a search asks for sentences; ``example`` is a prompt that it will ask about."""
        # What a prompt has in the making once its beam is full.
        rows_per_prompt = config.num_candidates * (config.keep_top + config.keep_bottom)
        return self._proposer(Decoding.of(config), rows_per_prompt, example)

    def propose(self, requests: Sequence[Expansion], config: SearchConfig) -> list[list[Candidate]]:
        """Continue each partial response by ``num_candidates`` sentences."""
        if not requests:
            return []
        return _answers(self.proposer(config, requests[0].prompt), requests)

    def respond(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Candidate]:
        """Write one whole response a prompt, greedily unless a temperature is given."""
        if not prompts:
            return []
        requests = [Expansion(prompt, "", (), 1, (seed, prompt.prompt_id, "respond")) for prompt in prompts]
        decoding = Decoding(max_new_tokens, rule=None, temperature=temperature)
        return [candidates[0] for candidates in _answers(self._proposer(decoding, 1, prompts[0]), requests)]

    def forget(self) -> None:
        """Drop what is kept about images; call it between work items."""
        self._plain.forget()

    def _proposer(self, decoding: Decoding, rows_per_prompt: int, example: Prompt) -> Proposer:
        writer = Writer(self.policy, decoding)
        if self._shares is None:
            self._shares = self._attention != "plain" and self._sharing_works(example)
        if not self._shares:
            return RoundProposer(lambda requests: self._plain.answer(requests, writer))
        if self._shared is None:
            self._shared = SharedModel(self.policy, self.counters)
        return Scheduler(
            self._shared, writer, max_rows=self.max_rows, max_prompts=max(self.max_rows // rows_per_prompt, 1)
        )

    def _sharing_works(self, example: Prompt) -> bool:
        """Try shared attention on a prompt.

        Raises:
            CsrError: It does not work, and was asked for.
        """
        trouble = sharing_trouble(self.policy, example)
        if trouble is None:
            return True
        name = type(self.policy.base_model).__name__
        if self._attention == "shared":
            raise CsrError(f"{name} does not decode with shared attention: {trouble}", "generation.attention=auto")
        self._notice(f"{name} decodes without shared attention, which is slower: {trouble}")
        return False


def _answers(proposer: Proposer, requests: Sequence[Expansion]) -> list[list[Candidate]]:
    """Ask all requests at once and wait for all answers, in their order."""
    proposer.submit(requests)
    by_prompt: dict[str, Iterator[list[Candidate]]] = {}
    waiting = {request.prompt.prompt_id for request in requests}
    while waiting - by_prompt.keys():
        found: dict[str, list[list[Candidate]]] = defaultdict(list)
        for request, candidates in proposer.collect():
            found[request.prompt.prompt_id].append(list(candidates))
        for prompt_id, answers in found.items():
            by_prompt[prompt_id] = iter(answers)
            proposer.release(prompt_id)
    return [next(by_prompt[request.prompt.prompt_id]) for request in requests]
