"""What a policy's responses show without any truth: how long, how relevant, how repetitive."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Finish, Prompt
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
    delimiters: str = ".",
) -> dict[str, Any]:
    """Answer prompts greedily and measure the responses.

    Returns:
        ``metrics``, ``protocol`` and ``rows``, as every evaluation: ``sentences``, ``words``,
        ``repeats`` (sentences with the words of an earlier one) and ``complete`` a response,
        ``relevance`` a response that says anything: the mean R_I (eq. 3) of its sentences.
    """
    rule = SentenceRule(delimiters)
    rows: list[dict[str, Any]] = []
    for chunk in batched(prompts, _BATCH):
        responses = engine.respond(chunk, max_new_tokens)
        said = [sentences(response.text, rule) for response in responses]
        items = [(prompt, part) for prompt, mine in zip(chunk, said, strict=True) for part in mine]
        scores = iter(scorer.score(items))
        for prompt, response, mine in zip(chunk, responses, said, strict=True):
            relevance = [max(100 * next(scores)[scorer.name], 0.0) for _ in mine]
            row = tallies(mine, relevance, response.finish is Finish.EOS)
            rows.append(
                {
                    "id": prompt.prompt_id,
                    "text": response.sentence,
                    "sentences": list(zip(mine, relevance, strict=True)),
                    "tallies": row,
                }
            )
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
            "interval": "95 % percentile bootstrap over prompts",
        },
        "rows": rows,
    }


def tallies(said: Sequence[str], relevance: Sequence[float], complete: bool) -> dict[str, Tally]:
    """What one response adds to the numerator and the denominator of each metric."""
    repeats = len(said) - len({bag_of_words(part) for part in said})
    return {
        "sentences": (len(said), 1),
        "words": (sum(len(part.split()) for part in said), 1),
        "repeats": (repeats, 1),
        "complete": (int(complete), 1),
        "relevance": (fmean(relevance) if relevance else 0.0, int(bool(relevance))),
    }


def sentences(text: str, rule: SentenceRule) -> list[str]:
    """Cut a text where sentences end, and leave out what has no word.

    Example:
        >>> from csr_vlm.method.sentences import SentenceRule
        >>> sentences("It costs 3.5 euros. Ask Dr. Low. ...", SentenceRule("."))
        ['It costs 3.5 euros.', 'Ask Dr. Low.']
    """
    return [part for part in rule.cut(text) if any(char.isalnum() for char in part)]
