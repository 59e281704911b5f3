"""The engine that runs on transformers: many prompts and nodes at once.

A node's prompt and prefix are read once, their keys and values repeated for its
candidates, and all candidates of all nodes decode together. Log-probabilities are those
of the raw distribution; bars, temperature and diversity only steer the choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from csr_vlm.batches import batched
from csr_vlm.config import SearchConfig
from csr_vlm.generation.policy import EncodedPrompt, Policy
from csr_vlm.generation.sampling import diverse, sample, uniforms
from csr_vlm.generation.sentences import SentenceRule
from csr_vlm.records import Candidate, Expansion, Finish, Prompt


@dataclass
class _Row:
    """One candidate in the making."""

    family: int
    place: int
    prefix_text: str
    prefix_ids: tuple[int, ...]
    uniform: np.ndarray
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None


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


class TransformersEngine:
    """Proposes sentences, and writes whole responses.

    Args:
        policy: The model; the engine never changes it.
        max_rows: Sequences decoded at once.
    """

    def __init__(self, policy: Policy, max_rows: int = 512) -> None:
        self.policy = policy
        self.max_rows = max_rows
        self._encoded: dict[str, EncodedPrompt] = {}
        self._delimiter_ids: dict[str, frozenset[int]] = {}

    def propose(self, requests: Sequence[Expansion], config: SearchConfig) -> list[list[Candidate]]:
        """Continue each partial response by ``num_candidates`` sentences."""
        decoding = Decoding(
            max_new_tokens=config.max_sentence_tokens,
            rule=SentenceRule(config.delimiters),
            temperature=config.temperature,
            top_p=config.top_p,
            diversity_penalty=config.diversity_penalty if config.decoding == "diverse" else None,
            greedy_first=config.greedy_first,
        )
        return self._generate(requests, decoding)

    def respond(
        self, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Candidate]:
        """Write one whole response a prompt, greedily unless a temperature is given."""
        requests = [Expansion(prompt, "", (), 1, (seed, prompt.prompt_id, "respond")) for prompt in prompts]
        decoding = Decoding(max_new_tokens, rule=None, temperature=temperature)
        return [candidates[0] for candidates in self._generate(requests, decoding)]

    def forget(self) -> None:
        """Drop what is kept about images; call it between work items."""
        self._encoded.clear()

    def _generate(self, requests: Sequence[Expansion], decoding: Decoding) -> list[list[Candidate]]:
        self._encode_new([request.prompt for request in requests])
        widest = max((request.num_candidates for request in requests), default=1)
        results = []
        for chunk in batched(requests, max(self.max_rows // widest, 1)):
            results += self._decode(chunk, decoding)
        return results

    def _encode_new(self, prompts: Sequence[Prompt]) -> None:
        new = {prompt.prompt_id: prompt for prompt in prompts if prompt.prompt_id not in self._encoded}
        for chunk in batched(new.values(), self.max_rows):
            encoded = self.policy.with_features([self.policy.encode(prompt) for prompt in chunk])
            self._encoded |= {prompt.prompt_id: item for prompt, item in zip(chunk, encoded, strict=True)}

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Expansion], decoding: Decoding) -> list[list[Candidate]]:
        rows = self._new_rows(requests, decoding)
        encoded = [self._encoded[request.prompt.prompt_id] for request in requests]
        inputs = self.policy.model_inputs(encoded, [request.prefix_ids for request in requests], "left")
        output = self.policy.model(**inputs, use_cache=True, logits_to_keep=1)
        parents = torch.tensor([row.family for row in rows], device=self.policy.device)
        cache = output.past_key_values
        cache.batch_select_indices(parents)
        logits = output.logits[parents, -1]
        mask = inputs["attention_mask"][parents]
        shift = torch.tensor([item.shift for item in encoded], device=self.policy.device)[parents]
        live = list(range(len(rows)))
        for step in range(decoding.max_new_tokens):
            tokens = self._step(logits, [rows[index] for index in live], step, decoding)
            going = [at for at, index in enumerate(live) if rows[index].finish is None]
            if not going:
                break
            if len(going) < len(live):
                keep = torch.tensor(going, device=self.policy.device)
                cache.batch_select_indices(keep)
                tokens, mask, shift = tokens[keep], mask[keep], shift[keep]
                live = [live[at] for at in going]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            logits = self._forward(tokens, mask, mask.sum(dim=1) - 1 + shift, cache)
        return self._collect(requests, rows)

    def _new_rows(self, requests: Sequence[Expansion], decoding: Decoding) -> list[_Row]:
        return [
            _Row(
                family=family,
                place=place,
                prefix_text=self._text(request.prefix_ids),
                prefix_ids=request.prefix_ids,
                uniform=uniforms((*request.seed, place), decoding.max_new_tokens),
            )
            for family, request in enumerate(requests)
            for place in range(request.num_candidates)
        ]

    def _forward(self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        output = self.policy.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self.policy.step_positions(positions),
            past_key_values=cache,
            use_cache=True,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _step(self, logits: torch.Tensor, rows: list[_Row], step: int, decoding: Decoding) -> torch.Tensor:
        """Choose a token for each live row and note it; return the tokens."""
        logits = logits.float()
        barred = logits.clone()
        barred[:, self.policy.barred_ids] = -torch.inf
        if decoding.diversity_penalty is not None:
            family = torch.tensor([row.family for row in rows], device=logits.device)
            place = torch.tensor([row.place for row in rows], device=logits.device)
            tokens = diverse(barred, family, place, decoding.diversity_penalty)
        elif decoding.temperature == 0.0:
            tokens = barred.argmax(dim=-1)
        else:
            uniform = torch.from_numpy(np.array([row.uniform[step] for row in rows]))
            tokens = sample(barred, uniform, decoding.temperature, decoding.top_p)
            if decoding.greedy_first:
                first = torch.tensor([row.place == 0 for row in rows], device=logits.device)
                tokens = torch.where(first, barred.argmax(dim=-1), tokens)
        logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens[:, None]).squeeze(-1)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            self._note(row, token, logprob, decoding)
        return tokens

    def _note(self, row: _Row, token: int, logprob: float, decoding: Decoding) -> None:
        ends_response = token in self.policy.eos_ids
        if decoding.rule is not None and self._has_delimiter(row, decoding.rule):
            following = None if ends_response else self._text([*row.prefix_ids, *row.ids, token])
            text = self._text([*row.prefix_ids, *row.ids])
            if decoding.rule.ends(text[len(row.prefix_text) :], None if following is None else following[len(text) :]):
                # The token looked at is taken back: the next sentence draws its own.
                row.finish = Finish.DELIMITER
                return
        row.ids.append(token)
        row.logprobs.append(logprob)
        if ends_response:
            row.finish = Finish.EOS
        elif len(row.ids) >= decoding.max_new_tokens:
            row.finish = Finish.LENGTH

    def _has_delimiter(self, row: _Row, rule: SentenceRule) -> bool:
        """Cheap test on the last two tokens; a closing quote may follow the delimiter."""
        if rule.delimiters not in self._delimiter_ids:
            vocabulary = self.policy.tokenizer.get_vocab()
            self._delimiter_ids[rule.delimiters] = frozenset(
                index for token, index in vocabulary.items() if any(char in token for char in rule.delimiters)
            )
        known = self._delimiter_ids[rule.delimiters]
        return any(token in known for token in row.ids[-2:])

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.policy.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _collect(self, requests: Sequence[Expansion], rows: Sequence[_Row]) -> list[list[Candidate]]:
        families: list[list[Candidate]] = [[] for _ in requests]
        for row in rows:
            text = self._text([*row.prefix_ids, *row.ids])[len(row.prefix_text) :]
            families[row.family].append(
                Candidate(tuple(row.ids), tuple(row.logprobs), text, row.finish or Finish.LENGTH)
            )
        return families
