"""Measure label-free metrics of a policy's responses: length, relevance, repetition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from csr_vlm.config.schema import DEFAULT_DELIMITERS
from csr_vlm.core.batching import batched
from csr_vlm.core.records import Finish, Prompt
from csr_vlm.evaluation.claim_marker import ClaimMarker, doubted_tally
from csr_vlm.evaluation.statistics import Tally, pooled
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.method.reward import bag_of_words
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.scoring.scorer import ScorerGroup

_BATCH = 64


def evaluate(
    engine: TransformersEngine,
    scorer: ScorerGroup,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    delimiters: str = DEFAULT_DELIMITERS,
    marker_among: Callable[[Sequence[Prompt]], ClaimMarker] | None = None,
) -> dict[str, Any]:
    """Answer prompts greedily and measure the responses.

    Args:
        engine: Answers.
        scorer: Scores sentences.
        prompts: Prompts, each with an image.
        max_new_tokens: Most tokens of a response.
        delimiters: What ends a sentence.
        marker_among: Returns what weighs the claims of responses by comparing with the images of some prompts; None
            to leave that out.

    Returns:
        ``metrics``, ``protocol`` and ``rows``, like every evaluation. The metrics, per response:
        ``sentences``, ``words``, ``repeats`` (sentences with the same words as an earlier one),
        ``complete`` (the response ended by itself) and, over non-empty responses, ``relevance``
        (the mean of R_I = max(100 cos, 0), eq. 3, over its sentences). With ``marker_among`` also ``doubted``,
        the share of claims with evidence against them; rows then have the ``evidence`` of each claim.
    """
    rule = SentenceRule(delimiters)
    marker = marker_among(prompts) if marker_among is not None else None
    rows: list[dict[str, Any]] = []
    for chunk in batched(prompts, _BATCH):
        responses = engine.respond(chunk, max_new_tokens)
        sentence_lists = [split_sentences(response.text, rule) for response in responses]
        items = [
            (prompt, sentence)
            for prompt, sentences in zip(chunk, sentence_lists, strict=True)
            for sentence in sentences
        ]
        scores = iter(scorer.score(items))
        for prompt, response, sentences in zip(chunk, responses, sentence_lists, strict=True):
            relevance = [max(100 * next(scores)[scorer.name], 0.0) for _ in sentences]
            row: dict[str, Any] = {
                "id": prompt.prompt_id,
                "text": response.sentence,
                "sentences": list(zip(sentences, relevance, strict=True)),
                "tallies": tallies(sentences, relevance, response.finish is Finish.EOS),
            }
            if marker is not None:
                row["evidence"] = marker.evidence(prompt, response.sentence)
                row["tallies"]["doubted"] = doubted_tally(row["evidence"])
            rows.append(row)
        engine.forget()
        scorer.forget()
    return {
        "metrics": {name: metric.dump() for name, metric in pooled([row["tallies"] for row in rows]).items()},
        "protocol": {
            "prompts": "held out",
            "num_prompts": len(prompts),
            "decoding": "greedy",
            "max_new_tokens": max_new_tokens,
            "scorer": scorer.name,
            "interval": "95 % over prompts",
        },
        "rows": rows,
    }


def tallies(sentences: Sequence[str], relevance: Sequence[float], complete: bool) -> dict[str, Tally]:
    """Return what one response adds to the numerator and the denominator of each metric."""
    repeats = len(sentences) - len({bag_of_words(sentence) for sentence in sentences})
    return {
        "sentences": (len(sentences), 1),
        "words": (sum(len(sentence.split()) for sentence in sentences), 1),
        "repeats": (repeats, 1),
        "complete": (int(complete), 1),
        "relevance": (fmean(relevance) if relevance else 0.0, int(bool(relevance))),
    }


def split_sentences(text: str, rule: SentenceRule) -> list[str]:
    """Split a text into sentences and drop those without a letter or digit.

    Example:
        >>> from csr_vlm.method.sentences import SentenceRule
        >>> split_sentences("It costs 3.5 euros. Ask Dr. Low. ...", SentenceRule("."))
        ['It costs 3.5 euros.', 'Ask Dr. Low.']
    """
    return [sentence for sentence in rule.cut(text) if any(char.isalnum() for char in sentence)]
