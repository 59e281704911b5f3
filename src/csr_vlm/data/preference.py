"""Share what the pair formats have in common: the exported record, its image, and conversations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Pair
from csr_vlm.data.rows import CONVERSATIONS, MESSAGES, BadRow, Row, message_texts, strip_placeholders
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.store.files import read_json

ASSISTANT_ROLES = ("gpt", "assistant")
Responses = tuple[str, str]
"""(chosen, rejected)."""


@dataclass(frozen=True)
class ExportedPair:
    """Hold one pair as texts, and the way a file refers to its image."""

    pair: Pair
    context: str
    """Sentences with which both responses begin; empty if there are none."""
    image: str
    """Path to write, absolute or relative to the file's folder."""
    content: bytes | None
    """Content of the image; None if it does not go into the file itself."""
    origin: str
    """Model of the policy that generated the pair."""
    described: bool
    """Whether the file says of each pair where its sides begin and whether they end, because some do not end."""
    formatted: FormattedPair | None = None
    """The pair in the policy's chat template, for formats that need it."""

    @property
    def question(self) -> str:
        """Return the question."""
        return self.pair.prompt.text

    @property
    def continuations(self) -> Responses:
        """Return what follows the context, with the white space before it."""
        start = len(self.context)
        return self.pair.chosen.text[start:], self.pair.rejected.text[start:]

    @property
    def both_end(self) -> bool:
        """Return whether the policy ended both responses."""
        return self.pair.chosen.complete and self.pair.rejected.complete

    def in_turns(self) -> tuple[str, str, str]:
        """Return a prompt and two answers for trainers that end every answer.

        If a response goes on after its last sentence, the prompt holds the context and asks for the next sentence. The
        end of an answer then means the end of that sentence, and the word END stands for the end of the response.
        """
        if self.both_end:
            return self.question, self.pair.chosen.text, self.pair.rejected.text
        sides = zip(self.continuations, (self.pair.chosen, self.pair.rejected), strict=True)
        chosen, rejected = (f"{text.strip()}{' END' if side.complete else ''}".strip() for text, side in sides)
        if not self.context:
            request = "Write only the first sentence of the answer, then END if the answer is complete."
            return f"{self.question}\n\n{request}", chosen, rejected
        request = "Write only its next sentence, then END if the answer is complete."
        return f"{self.question}\n\nThe answer begins:\n{self.context}\n\n{request}", chosen, rejected

    def encoded_image(self) -> dict[str, Any]:
        """Return the image as Hugging Face stores it: bytes if embedded, else None, and a path."""
        return {"bytes": self.content, "path": self.image if self.content is None else Path(self.image).name}

    def measured(self) -> dict[str, Any]:
        """Return the rewards and the margin; in a file that describes its pairs, also the fields of SENTINEL."""
        pair = self.pair
        values = {
            "chosen_reward": pair.chosen.reward,
            "rejected_reward": pair.rejected.reward,
            "margin": pair.margin,
        }
        return {**self.continued(), **values} if self.described else values

    def continued(self) -> dict[str, Any]:
        """Return question, context and both continuations, and whether each response ends with its continuation."""
        chosen, rejected = self.continuations
        return {
            "question": self.question,
            "context": self.context,
            "y_win": chosen,
            "y_lose": rejected,
            "chosen_ends": self.pair.chosen.complete,
            "rejected_ends": self.pair.rejected.complete,
        }


@dataclass(frozen=True)
class FormattedPair:
    """Hold a pair as the texts that the policy reads and writes: chat template, image placeholder, end token."""

    prompt: str
    chosen: str
    rejected: str


MEASURED = {
    "chosen_reward": pa.float64(),
    "rejected_reward": pa.float64(),
    "margin": pa.float64(),
}
"""Types of :meth:`ExportedPair.measured` in a file whose pairs all end."""
CONTINUED = {
    **{name: pa.string() for name in ("question", "context", "y_win", "y_lose")},
    "chosen_ends": pa.bool_(),
    "rejected_ends": pa.bool_(),
}
"""Types of :meth:`ExportedPair.continued`."""


def describes_pairs(pairs: Iterable[ExportedPair]) -> tuple[bool, Iterator[ExportedPair]]:
    """Return whether a file has to describe its pairs, which all or none do, and the pairs again."""
    iterator = iter(pairs)
    first = list(islice(iterator, 1))
    return bool(first) and first[0].described, chain(first, iterator)


def image_bytes(path: str) -> bytes:
    """Read an image file of a run.

    Raises:
        CsrError: The file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CsrError(f"the image {path} cannot be read: {error.strerror}", "restore the file") from None


def common_context(chosen: str, rejected: str, rule: SentenceRule) -> str:
    """Return the sentences with which both texts begin, without white space after the last one.

    Example:
        >>> common_context("A boat. A red one.", "A boat. A fish.", SentenceRule("."))
        'A boat.'
    """
    end = 0
    for left, right in zip(rule.cut(chosen), rule.cut(rejected), strict=False):
        after = chosen.index(left, end) + len(left)
        if left != right or chosen[:after] != rejected[:after]:
            break
        end = after
    return chosen[:end]


def last_responses(chosen: Any, rejected: Any) -> Responses:
    """Return the assistant's last message of each of two conversations; empty if there is none."""
    texts = (message_texts(conversation, *ASSISTANT_ROLES) for conversation in (chosen, rejected))
    first, second = ((messages or [""])[-1] for messages in texts)
    return first, second


def num_user_turns(row: Row) -> int:
    """Count the questions of a row's conversation; 1 if the question is plain text."""
    conversations = [row.get(name) for name in CONVERSATIONS]
    if isinstance(row.get("history"), list) and row["history"]:
        return 1 + len(row["history"])
    return max(
        [len(message_texts(value, "human", "user")) for value in conversations if isinstance(value, list)], default=1
    )


def require_one_prompt(row: Row) -> None:
    """Verify that both responses of a row answer the same question about the same image.

    Raises:
        BadRow: They do not.
    """
    conversations = [message_texts(row[name], "human", "user") for name in MESSAGES if isinstance(row.get(name), list)]
    asked = [[strip_placeholders(text) for text in texts] for texts in conversations if texts]
    if any(texts != asked[0] for texts in asked):
        raise BadRow("chosen and rejected answer different questions")
    rejected = row.get("rejected_images")
    if rejected and rejected != row.get("images"):
        raise BadRow("another image for the rejected response")


def read_registry(path: Path, empty: Any) -> Any:
    """Read a dataset_info.json that an earlier export may have written; ``empty`` if there is none.

    Raises:
        CsrError: The file has another form.
    """
    if not path.exists():
        return empty
    try:
        registry = read_json(path)
    except CsrError:
        registry = None
    if not isinstance(registry, type(empty)):
        raise CsrError(f"{path} is not a valid list of datasets for this format", "choose another --out")
    return registry
