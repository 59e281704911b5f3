"""The frozen records that cross the borders between the parts.

Each says what it holds and why it is kept; none knows a model. Token ids are the state of
a response: text is derived from them and never encoded again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

SCHEMA_VERSION = 1
"""Grows whenever a stored record changes its meaning."""


@dataclass(frozen=True)
class Prompt:
    """An image and a question about it."""

    prompt_id: str
    image: str
    """Path of the image file, resolved."""
    text: str


def negatives_column(scorer: str) -> str:
    """Name the ledger's column with a sentence's mean cosine over other prompts' images."""
    return f"{scorer}:others"


class Finish(StrEnum):
    """Why a candidate sentence ends."""

    DELIMITER = "delimiter"
    """The sentence is complete; the response may go on."""
    EOS = "eos"
    """The response is complete."""
    LENGTH = "length"
    """The token budget ran out in mid-sentence; the response cannot go on."""


class NodeStatus(StrEnum):
    """What the search did with a node."""

    TOP = "top"
    """Kept among the best partial responses, and expanded."""
    BOTTOM = "bottom"
    """Kept among the worst partial responses, and expanded."""
    FINISHED = "finished"
    """Ends a complete response."""
    TRUNCATED = "truncated"
    """Ends a response that ran into a limit before its end."""
    PRUNED = "pruned"
    """Neither among the best nor among the worst."""
    DUPLICATE = "duplicate"
    """Same tokens as an earlier sibling."""
    FILTERED = "filtered"
    """Refused by a candidate filter."""


@dataclass(frozen=True)
class Expansion:
    """A request to an engine: continue this partial response by one sentence."""

    prompt: Prompt
    node_id: str
    """The partial response's last node; empty for the prompt itself."""
    prefix_ids: tuple[int, ...]
    """Token ids of the partial response, from its first sentence on."""
    num_candidates: int
    seed: tuple[int | str, ...]
    """Candidate i draws from the stream named by (*seed, i), whatever else is in the batch."""


class _Said:
    """What a candidate and the node made of it both know of their words."""

    text: str
    token_logprobs: tuple[float, ...]

    @property
    def sentence(self) -> str:
        """The text without surrounding white space; empty where it only ends the response."""
        return self.text.strip()

    @property
    def logprob(self) -> float:
        """Log-probability of the whole sentence, in nats."""
        return sum(self.token_logprobs)


@dataclass(frozen=True)
class Candidate(_Said):
    """One sentence that an engine proposes."""

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    """log P(r_o | x, r_<o) of the raw distribution: untempered, before any processor."""
    text: str
    """What the ids add to the response's text, leading white space included."""
    finish: Finish


@dataclass(frozen=True)
class Node(_Said):
    """A candidate sentence in a prompt's tree, with everything measured about it.

    Rewards, ranks and pairs are derived from nodes and never stored with them, so they
    can be computed anew under other settings without generating again.
    """

    prompt_id: str
    iteration: int
    node_id: str
    """Path of sibling indices from the root, such as ``2.0.3``."""
    parent_id: str
    """Empty for a first sentence."""
    depth: int
    """1 for a first sentence."""
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    text: str
    """What the ids add to the response's text, leading white space included."""
    finish: Finish
    status: NodeStatus
    cosines: Mapping[str, float] = field(default_factory=dict)
    """Scorer name to cos(F_I(image), F_T(text)), in -1..1, and :func:`others_column` to its
    mean over other images; empty where there is no sentence."""


@dataclass(frozen=True)
class Response:
    """A whole path from a first sentence to a leaf."""

    node_id: str
    """The leaf; its path names the other nodes."""
    token_ids: tuple[int, ...]
    logprob: float
    """Sum over tokens under the policy that generated it: DPO's reference log-probability."""
    text: str
    num_sentences: int
    reward: float
    """R(y), in the units of the reward that was configured."""
    complete: bool
    """Whether it ended by itself."""


@dataclass(frozen=True)
class Pair:
    """A preference: chosen over rejected, for one prompt."""

    prompt: Prompt
    iteration: int
    chosen: Response
    rejected: Response

    @property
    def margin(self) -> float:
        """R(chosen) - R(rejected)."""
        return self.chosen.reward - self.rejected.reward
