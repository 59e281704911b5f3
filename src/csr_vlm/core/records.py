"""Define the frozen records that the parts of the package exchange.

Each record says what it holds and why it is kept; none of them knows a model. Token ids are
the state of a response: its text is derived from them and is never tokenized again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

SCHEMA_VERSION = 1
"""Version of the stored records; incremented whenever one of them changes its meaning."""


@dataclass(frozen=True)
class Prompt:
    """Hold an image and a question about it."""

    prompt_id: str
    image: str
    """Resolved path of the image file."""
    text: str
    image_sha256: str = field(default="", compare=False)
    """SHA-256 of the image file when the inputs were checked; empty if that was not recorded."""


def negatives_column(scorer: str) -> str:
    """Return the name of the ledger column with a sentence's mean cosine over negative images.

    Negative images are those of other prompts.
    """
    return f"{scorer}:others"


def spread_column(scorer: str) -> str:
    """Return the name of the ledger column with the spread of a claim's cosines over negative images."""
    return f"{scorer}:spread"


def nearest_column(scorer: str) -> str:
    """Return the name of the ledger column with a claim's mean cosine over the most similar of the other images."""
    return f"{scorer}:nearest"


EARLIER_COLUMN = "mentions:earlier"
"""Name of the ledger column with the number of sampled sentences of all iterations before that make a claim."""


class Finish(StrEnum):
    """Enumerate the reasons why a candidate sentence ends."""

    DELIMITER = "delimiter"
    """The sentence is complete; the response may continue."""
    EOS = "eos"
    """The response is complete."""
    LENGTH = "length"
    """The token budget ran out inside the sentence; the response cannot continue."""


class NodeStatus(StrEnum):
    """Enumerate what the search did with a node."""

    TOP = "top"
    """Kept among the best partial responses, and expanded."""
    BOTTOM = "bottom"
    """Kept among the worst partial responses, and expanded."""
    FINISHED = "finished"
    """Ends a complete response."""
    TRUNCATED = "truncated"
    """Ends a response that reached a limit before its end."""
    PRUNED = "pruned"
    """Neither among the best nor among the worst."""
    DUPLICATE = "duplicate"
    """Has the same tokens as an earlier sibling."""
    FILTERED = "filtered"
    """Rejected by a candidate filter."""


@dataclass(frozen=True)
class Expansion:
    """Request an engine to continue a partial response by one sentence."""

    prompt: Prompt
    node_id: str
    """Last node of the partial response; empty for the prompt itself."""
    prefix_ids: tuple[int, ...]
    """Token ids of the partial response, from its first sentence on."""
    num_candidates: int
    seed: tuple[int | str, ...]
    """Candidate i samples from the stream named ``(*seed, i)``, whatever else is in the batch."""


class _Sentence:
    """Derive values from the text and the tokens of one sentence."""

    text: str
    token_logprobs: tuple[float, ...]

    @property
    def sentence(self) -> str:
        """Return the text without surrounding white space; empty if it only ends the response."""
        return self.text.strip()

    @property
    def logprob(self) -> float:
        """Return the log-probability of the whole sentence in nats: sum_o log P(r_o | x, r_<o)."""
        return sum(self.token_logprobs)


@dataclass(frozen=True)
class Candidate(_Sentence):
    """Hold one sentence that an engine proposes."""

    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    """log P(r_o | x, r_<o) under the raw distribution: temperature 1, before any logits processor."""
    text: str
    """Text that the tokens add to the response, including leading white space."""
    finish: Finish


@dataclass(frozen=True)
class Node(_Sentence):
    """Hold a candidate sentence in a prompt's tree, with everything measured about it.

    Rewards, ranks and pairs are derived from nodes and never stored with them, so they can
    be recomputed under other settings without generating again.
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
    """Text that the tokens add to the response, including leading white space."""
    finish: Finish
    status: NodeStatus
    cosines: Mapping[str, float] = field(default_factory=dict)
    """Maps a scorer's name to cos(F_I(image), F_T(text)), in -1..1, and :func:`negatives_column`
    to the mean over negative images; empty if there is no sentence."""
    claims: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Maps each claim of the sentence, such as ``boat`` and ``boat/red``, to its own cosines: those of a sentence,
    :func:`spread_column` and :func:`nearest_column`; empty unless ``method.reward.unit`` is ``claim``."""


@dataclass(frozen=True)
class Response:
    """Hold a path from a first sentence to a leaf."""

    node_id: str
    """The leaf; its path names the other nodes."""
    token_ids: tuple[int, ...]
    logprob: float
    """Sum over tokens under the policy that generated it: DPO's reference log-probability, in nats."""
    text: str
    num_sentences: int
    reward: float
    """R(y), in the units of the configured reward."""
    complete: bool
    """Whether the policy ended the response itself."""


@dataclass(frozen=True)
class Pair:
    """Hold a preference for one prompt: chosen over rejected."""

    prompt: Prompt
    iteration: int
    chosen: Response
    rejected: Response
    shared_tokens: int = 0
    """Tokens that both responses begin with, on which nothing is trained."""
    shared_logprob: float = 0.0
    """Log-probability of these tokens, which is part of that of both responses, in nats."""

    @property
    def margin(self) -> float:
        """Return R(chosen) - R(rejected)."""
        return self.chosen.reward - self.rejected.reward
