"""Many prompts in flight: which candidates decode now, and what is kept for the next.

A *family* is the candidates of one expansion: they start together from the same node and
decode in lockstep with each other, while other families are at other steps, of other
sentences, of other prompts. A row leaves when its candidate ends; a family leaves with its
last row and another enters. What a finished family computed is kept until the search says
which of its sentences go on; their keys and values then become the path that the next
families read, so no token is read twice.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.generation.decoding import Row
from csr_vlm.generation.shared_attention import Blocks, CacheView, DecodeStep, KVCache, RowLayout, hidden_padding
from csr_vlm.generation.shared_model import SharedModel
from csr_vlm.models.encoding import EncodedPrompt

READ_PROMPTS = 16
READ_TOKENS = 8192
"""Most prompts and most of their tokens read in one forward pass."""
READY_SHARE = 0.25
"""Answers are handed over when their candidates are so many, measured by those still decoding:
few enough to keep the batch full, enough to score them together."""


class Writes(Protocol):
    """What the scheduler needs of a :class:`csr_vlm.generation.decoding.Writer`."""

    def start(self, request: Expansion) -> list[Row]: ...
    def choose(self, logits: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor: ...
    def candidate(self, row: Row) -> Candidate: ...


@dataclass(frozen=True)
class Branch:
    """A finished sentence that may be continued."""

    block: torch.Tensor
    """Keys and values of its family, of shape (layers, 2, key heads, tokens, head size)."""
    tokens: torch.Tensor
    """Which of the block's tokens lie on the path to its end."""
    hidden: torch.Tensor
    """Final hidden state of its last token, of shape (width,)."""

    def path(self) -> torch.Tensor:
        """Keys and values of the partial response, of shape (layers, 2, key heads, tokens, head size)."""
        return self.block.index_select(3, self.tokens)


@dataclass
class Held:
    """A prompt whose keys and values are stored."""

    prompt: Prompt
    num_tokens: int
    next_position: int
    root: Branch
    slot: int = -1
    requests: list[Expansion] = field(default_factory=list)
    answers: dict[int, list[Candidate]] = field(default_factory=dict)
    """By the request's place in ``requests``."""
    branches: dict[tuple[int, ...], Branch] = field(default_factory=dict)
    """By the partial response's token ids."""

    @property
    def is_answered(self) -> bool:
        return len(self.answers) == len(self.requests)


@dataclass
class SiblingGroup:
    """The rows of one request while they decode."""

    held: Held
    number: int
    """The request's place among its prompt's."""
    rows: list[Row]
    path_length: int
    slot: int = -1
    num_steps: int = 0
    """Tokens that each live row has stored."""
    ends: dict[int, torch.Tensor] = field(default_factory=dict)
    """By place, the final hidden state of a finished sentence's last token."""

    @property
    def num_tokens(self) -> int:
        """Of its block: the path, then a token of each sibling a step, in turn."""
        return self.path_length + self.num_steps * len(self.rows)

    def tokens_of(self, row: Row) -> list[int]:
        """Which tokens of the block lie on the path to a row's end."""
        own = range(self.path_length + row.place, self.num_tokens, len(self.rows))
        return [*range(self.path_length), *own[: len(row.ids)]]

    @property
    def is_done(self) -> bool:
        return all(row.finish is not None for row in self.rows)


class Scheduler:
    """Answers requests as they come, with at most ``max_rows`` rows decoding at once.

    Args:
        max_prompts: Prompts held at once.
    """

    def __init__(self, model: SharedModel, writer: Writes, *, max_rows: int, max_prompts: int) -> None:
        self._policy = model.policy
        self._counters = model.counters
        self._model = model
        self._writer = writer
        self._max_rows = max_rows
        self._max_prompts = max_prompts
        self._waiting: deque[list[Expansion]] = deque()
        """Requests of prompts that are not held, prompt by prompt."""
        self._next: deque[tuple[Held, int]] = deque()
        """Requests of prompts that are held."""
        self._held: dict[str, Held] = {}
        self._prompts: KVCache[Held] = KVCache(max_prompts)
        self._families: KVCache[SiblingGroup] = KVCache(max_rows)
        self._images: dict[str, tuple[torch.Tensor, ...] | None] = {}
        """Features of images that waiting prompts will need again."""
        self._live: list[tuple[SiblingGroup, Row]] = []
        self._hidden: torch.Tensor | None = None
        """From which each live row's next token is chosen, of shape (rows, width)."""

    def submit(self, requests: Sequence[Expansion]) -> None:
        """Take on the next round of some prompts; branches it does not continue are forgotten."""
        by_prompt: dict[str, list[Expansion]] = defaultdict(list)
        for request in requests:
            by_prompt[request.prompt.prompt_id].append(request)
        for prompt_id, own in by_prompt.items():
            held = self._held.get(prompt_id)
            if held is None:
                self._waiting.append(own)
            else:
                self._begin_round(held, own)

    @torch.inference_mode()
    def release(self, prompt_id: str) -> None:
        """Forget a prompt."""
        self._prompts.take(self._held.pop(prompt_id))

    @torch.inference_mode()
    def collect(self) -> list[tuple[Expansion, list[Candidate]]]:
        """Decode until some prompts have all their requests answered, and return those answers."""
        while True:
            self._admit()
            ready = [held for held in self._held.values() if held.requests and held.is_answered]
            num_ready = sum(len(candidates) for held in ready for candidates in held.answers.values())
            if not self._live or num_ready > READY_SHARE * len(self._live):
                break
            self._advance()
        answers = [(request, held.answers[number]) for held in ready for number, request in enumerate(held.requests)]
        for held in ready:
            held.requests, held.answers = [], {}
        return answers

    def _begin_round(self, held: Held, requests: list[Expansion]) -> None:
        wanted = {request.prefix_ids for request in requests}
        held.branches = {ids: branch for ids, branch in held.branches.items() if ids in wanted}
        held.requests, held.answers = requests, {}
        self._next += [(held, number) for number in range(len(requests))]

    def _admit(self) -> None:
        """Let requests in while there is room: first of prompts that are held, then of others."""
        while True:
            starts = []
            while self._next and self._fits(self._next[0][0].requests[self._next[0][1]].num_candidates):
                starts.append(self._enter(*self._next.popleft()))
            if starts:
                earlier = [] if self._hidden is None else [self._hidden]
                self._hidden = torch.cat(earlier + starts)
            if self._next or not self._open():
                return

    def _fits(self, num_rows: int) -> bool:
        return not self._live or len(self._live) + num_rows <= self._max_rows

    def _enter(self, held: Held, number: int) -> torch.Tensor:
        """Start a request's family; return the hidden states that its rows start from."""
        request = held.requests[number]
        branch = held.branches.pop(request.prefix_ids, None) if request.prefix_ids else held.root
        if branch is None:
            branch = self._read_again(held, request.prefix_ids)
        rows = self._writer.start(request)
        family = SiblingGroup(held, number, rows, path_length=len(branch.tokens))
        self._families.put(family, branch.path())
        self._live += [(family, row) for row in rows]
        return branch.hidden.expand(len(rows), -1)

    def _read_again(self, held: Held, prefix_ids: tuple[int, ...]) -> Branch:
        """Read a partial response that was not generated here, such as that of a run that goes on."""
        (encoded,) = self._encode([held.prompt])
        (reading,) = self._model.read([encoded], [prefix_ids])
        tokens = torch.arange(held.num_tokens, held.num_tokens + len(prefix_ids), device=reading.kv.device)
        return Branch(reading.kv, tokens, reading.hidden)

    def _open(self) -> bool:
        """Read the prompts of waiting requests that there is room for; tell whether there were any."""
        opened: list[list[Expansion]] = []
        num_rows = len(self._live)
        while self._waiting and len(self._held) + len(opened) < self._max_prompts:
            num_rows += sum(request.num_candidates for request in self._waiting[0])
            if num_rows > self._max_rows and (self._live or opened):
                break
            opened.append(self._waiting.popleft())
        for chunk in batched(opened, READ_PROMPTS):
            encoded = self._encode([requests[0].prompt for requests in chunk])
            longest = max(len(item.input_ids) for item in encoded)
            for some in batched(zip(chunk, encoded, strict=True), max(READ_TOKENS // longest, 1)):
                self._hold([requests for requests, _ in some], [item for _, item in some])
        return bool(opened)

    def _hold(self, opened: Sequence[list[Expansion]], encoded: Sequence[EncodedPrompt]) -> None:
        """Read some prompts in one forward pass and begin their first rounds."""
        for requests, reading in zip(opened, self._model.read(encoded, [()] * len(encoded)), strict=True):
            prompt = requests[0].prompt
            nothing = torch.arange(0, device=reading.kv.device)
            # A copy, so that the storage of the whole batch is not kept alive.
            root = Branch(reading.kv[:, :, :, :0].clone(), nothing, reading.hidden.clone())
            held = Held(prompt, reading.kv.shape[3], reading.next_position, root)
            self._held[prompt.prompt_id] = held
            self._prompts.put(held, reading.kv)
            self._begin_round(held, requests)

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Encode prompts, each image once for all the prompts in sight that show it."""
        encoded = [self._policy.encode(prompt) for prompt in prompts]
        if not self._policy.reuses_features:
            self._counters.vision_encodes += len(prompts)
            return encoded
        new = {prompt.image: item for prompt, item in zip(prompts, encoded, strict=True)}
        new = {image: item for image, item in new.items() if image not in self._images}
        if new:
            self._counters.vision_encodes += len(new)
            found = self._policy.with_features(list(new.values()))
            self._images |= {image: item.features for image, item in zip(new, found, strict=True)}
        result = [
            replace(item, features=self._images[prompt.image]) for prompt, item in zip(prompts, encoded, strict=True)
        ]
        still_needed = {requests[0].prompt.image for requests in self._waiting}
        self._images = {image: features for image, features in self._images.items() if image in still_needed}
        return result

    def _advance(self) -> None:
        """Choose every live row's next token; drop the rows that end; feed the others' tokens."""
        assert self._hidden is not None
        tokens = self._writer.choose(self._model.logits(self._hidden), [row for _, row in self._live])
        going = []
        done = {}
        for place, (family, row) in enumerate(self._live):
            if row.finish is None:
                going.append(place)
                continue
            if row.finish is Finish.DELIMITER:
                family.ends[row.place] = self._hidden[place].clone()
            if family.is_done:
                done[id(family)] = family
        for family in done.values():
            self._close(family)
        if not going:
            self._live, self._hidden = [], None
            return
        if len(going) < len(self._live):
            self._live = [self._live[place] for place in going]
            tokens = tokens[torch.tensor(going, device=tokens.device)]
        positions, step = self._next_step()
        self._hidden = self._model.step(tokens, positions, step)

    def _close(self, family: SiblingGroup) -> None:
        """Answer a request whose candidates are complete, and keep what their successors will read."""
        held = family.held
        block = self._families.of(family).clone() if family.ends else None
        for row in family.rows:
            if block is not None and row.place in family.ends:
                tokens = family.tokens_of(row)
                held.branches[(*row.prefix_ids, *row.ids)] = Branch(
                    block, torch.tensor(tokens, device=block.device), family.ends[row.place]
                )
        self._families.take(family)
        held.answers[family.number] = [self._writer.candidate(row) for row in family.rows]

    def _next_step(self) -> tuple[torch.Tensor, DecodeStep]:
        """Lay out the live rows' next tokens; return their positions, (rows,), and the step."""
        families: list[SiblingGroup] = self._families.owners
        for family in families:
            family.num_steps += 1
        self._families.lengthen([family.num_tokens for family in families])
        of_families = [
            (f.held.slot, f.held.num_tokens, f.held.next_position, f.path_length, len(f.rows), f.num_steps - 1)
            for f in families
        ]
        slot = np.array([family.slot for family, _ in self._live])
        place = np.array([row.place for _, row in self._live])
        prompt, prompt_length, position, path, siblings, step = np.array(of_families).T[:, slot]
        blocks = Blocks(
            prompt_lengths=[family.held.num_tokens for family in families],
            path_lengths=[family.path_length for family in families],
            num_siblings=[len(family.rows) for family in families],
            lengths=self._families.lengths,
            width=self._families.width,
            device=self._policy.device,
        )
        prompt_grid = RowLayout.of(prompt, _running_count(prompt), len(self._prompts.owners), blocks.device)
        family_grid = RowLayout.of(slot, place, len(families), blocks.device)
        padding = hidden_padding(self._prompts.lengths, self._prompts.width, blocks.device)
        write_at = self._families.flat(*self._tensors(slot, path + step * siblings + place))
        positions, index = self._tensors(position + path + step, prompt_length + path + step)
        return positions, DecodeStep(
            prompts=CacheView(self._prompts, prompt_grid, padding),
            families=CacheView(self._families, family_grid, blocks.hidden(family_grid.shape[1]), blocks.token_index()),
            write_at=write_at,
            index=index,
        )

    def _tensors(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(array).to(self._policy.device) for array in arrays]


def _running_count(values: np.ndarray) -> np.ndarray:
    """Count, for each value, how often it came before: 5 5 3 5 gives 0 1 0 2."""
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    counts = np.empty_like(order)
    counts[order] = np.arange(len(values)) - np.searchsorted(in_order, in_order)
    return counts
