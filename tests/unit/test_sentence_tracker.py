"""Test that decoding ends sentences at delimiters whatever their tokens look like in the vocabulary."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from csr_vlm.config.schema import DEFAULT_DELIMITERS
from csr_vlm.core.records import Finish
from csr_vlm.generation.decoding import DecodingSettings, PartialCandidate, SentenceTracker
from csr_vlm.method.sentences import SentenceRule

TOKENS = [b"", b"A cup", b"\n", b"- ", b"\xe3\x80", b"\x82", "。".encode(), b" B", b"!"]
"""Text of each token in UTF-8; tokens 4 and 5 are the two parts of a full stop; 0 ends the response."""


class Tokenizer:
    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return b"".join(TOKENS[token] for token in token_ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("delimiters", "tokens", "length", "finish"),
    [
        (DEFAULT_DELIMITERS, [1, 8, 7], 2, Finish.DELIMITER),
        (DEFAULT_DELIMITERS, [1, 6, 7], 2, Finish.DELIMITER),
        (DEFAULT_DELIMITERS, [1, 4, 5, 7], 3, Finish.DELIMITER),
        (DEFAULT_DELIMITERS, [3, 1, 2, 3], 3, Finish.DELIMITER),
        (DEFAULT_DELIMITERS, [1, 7, 0], 3, Finish.EOS),
        (".", [1, 8, 7, 0], 4, Finish.EOS),
        (".", [3, 1, 2, 3, 0], 5, Finish.EOS),
    ],
)
def test_a_sentence_ends_before_the_token_that_follows_its_delimiter(delimiters, tokens, length, finish):
    settings = DecodingSettings(max_new_tokens=9, rule=SentenceRule(delimiters), temperature=1.0)
    tracker = SentenceTracker(SimpleNamespace(tokenizer=Tokenizer(), eos_ids={0}), settings)
    candidate = PartialCandidate(group_id=0, sibling_index=0, prefix_ids=(), uniforms=None)
    for token in tokens:
        tracker.append(candidate, token, 0.0)
        if candidate.finish is not None:
            break
    assert (len(candidate.token_ids), candidate.finish) == (length, finish)
