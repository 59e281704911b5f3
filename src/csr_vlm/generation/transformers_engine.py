"""Generate with transformers: many prompts and nodes at once."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from PIL import Image

from csr_vlm.config.schema import SearchConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.memory import available_memory
from csr_vlm.core.records import Candidate, Expansion, Prompt
from csr_vlm.generation.counters import Counters
from csr_vlm.generation.decoding import DecodingSettings, TokenSampler
from csr_vlm.generation.plain_decoder import PlainDecoder
from csr_vlm.generation.reading_ahead import ReadingAhead
from csr_vlm.generation.row_budget import CPU_ROWS, RowShape, row_budget
from csr_vlm.generation.scheduler import Scheduler
from csr_vlm.generation.shared_attention import is_gpu
from csr_vlm.generation.shared_attention_check import shared_attention_problem
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.method.search import Proposer, RoundProposer
from csr_vlm.models.architecture import architecture_of
from csr_vlm.models.policy import Policy

Attention = Literal["auto", "shared", "plain"]
_LARGE_PICTURE = (1280, 960)
"""Width and height of a picture that has more tokens than most, for families in which the number varies."""


class TransformersEngine:
    """Propose sentences for a search, and generate whole responses.

    Args:
        policy: Model to generate with. With shared attention its attention function is replaced
            by one that computes the same; nothing else of it changes.
        max_rows: Most sequences decoded at once; ``auto`` is as many as the free memory of a GPU holds.
        attention: ``shared`` stores keys and values once for all candidates, ``plain`` copies
            them to each; ``auto`` uses ``shared`` if it passes
            :mod:`csr_vlm.generation.shared_attention_check`, else ``plain``.
        warn: Called with a message when ``auto`` falls back to ``plain``, and with the rows that fit.
    """

    def __init__(
        self,
        policy: Policy,
        max_rows: int | Literal["auto"] = "auto",
        attention: Attention = "auto",
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self.counters = Counters()
        self._attention = attention
        self._warn = warn
        self._plain_decoder = PlainDecoder(policy, self.counters)
        self._reading: ReadingAhead | None = None
        """Reads pictures while a GPU decodes."""
        self._budgets: dict[RowShape, int] = {}
        """Rows that fit the GPU, by their shape."""
        self._last_rows = 1
        """Most rows of the last proposer."""
        self._shared_model: SharedModel | None = None
        self._uses_shared_attention: bool | None = None
        """None until the first proposer is created."""

    def proposer(self, config: SearchConfig, example: Prompt) -> Proposer:
        """Return a proposer of sentences for a search; ``example`` is one of its prompts."""
        return self._proposer(DecodingSettings.from_search(config), RowShape.longest(config), example)

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
        shape = RowShape(candidates=1, beam=1, path_tokens=0, sentence_tokens=max_new_tokens)
        return [candidates[0] for candidates in _answer_all(self._proposer(decoding, shape, prompts[0]), requests)]

    def forget(self) -> None:
        """Drop cached images; call this between work items."""
        self._plain_decoder.forget()
        if self._reading is not None:
            self._reading.forget()

    def _proposer(self, decoding: DecodingSettings, shape: RowShape, example: Prompt) -> Proposer:
        sampler = TokenSampler(self.policy, decoding)
        if self._uses_shared_attention is None:
            self._uses_shared_attention = self._attention != "plain" and self._check_shared_attention(example)
        if not self._uses_shared_attention:
            # Every row has a copy of its prompt and path.
            rows = self._num_rows(replace(shape, candidates=1, beam=1, prompts_per_beam=1), example)
            return RoundProposer(lambda requests: self._plain_decoder.answer(requests, sampler, rows))
        if self._shared_model is None:
            self._shared_model = SharedModel(self.policy, self.counters)
        if not self.gains_from_more_prompts:
            shape = replace(shape, prompts_per_beam=1)
        rows = self._num_rows(shape, example)
        if self._reading is None and self.gains_from_more_prompts:
            self._reading = ReadingAhead(self.policy)
        most = shape.num_prompts(rows)
        return Scheduler(self._shared_model, sampler, max_rows=rows, max_prompts=most, reading=self._reading)

    def _num_rows(self, shape: RowShape, example: Prompt) -> int:
        """Return the most rows of this shape that decode at once; the rows of a GPU are chosen once per shape."""
        if self.max_rows != "auto":
            self._last_rows = self.max_rows
        elif (free := available_memory(self.policy.device)) is None:
            self._last_rows = CPU_ROWS
        else:
            if shape not in self._budgets:
                self._budgets[shape] = self._fitting_rows(shape, example, free)
                if shape.beam > 1:
                    rows, gigabytes = self._budgets[shape], free / 1e9
                    self._warn(f"up to {rows} rows are decoded at once, in {gigabytes:.0f} GB of free GPU memory")
            self._last_rows = self._budgets[shape]
        return self._last_rows

    def _fitting_rows(self, shape: RowShape, example: Prompt, free: int) -> int:
        encoder, model = self.policy.prompt_encoder, self.policy.base_model
        large = encoder.process_image(example.text, Image.new("RGB", _LARGE_PICTURE))
        longest = max(large["input_ids"].shape[1], len(self.policy.encode(example).input_ids))
        return row_budget(free, shape, longest, architecture_of(model.config), model.dtype.itemsize)

    @property
    def gains_from_more_prompts(self) -> bool:
        """Return whether the model is on a GPU, which decodes many rows in the time of few."""
        return is_gpu(self.policy.device)

    def shrink(self) -> int | None:
        """Halve the rows; return their number, or None if there is only one."""
        if self._last_rows == 1:
            return None
        self.max_rows = self._last_rows // 2
        self.forget()
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
