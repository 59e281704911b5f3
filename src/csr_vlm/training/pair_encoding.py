"""Pairs from outside as this project's own: token ids as the policy would have sampled them.

Text from elsewhere has no token ids and no log-probabilities. The ids are what the chat
template and the tokenizer make of the whole dialogue, after the prompt's own, up to and with
the end of the response; the log-probabilities are the policy's in a teacher-forced pass, so
they serve as DPO's reference like those of a ledger. There are no rewards: they are 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.data.external_pairs import TextPair
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.models.policy import Policy

_BATCH = 8
TokenIds = tuple[tuple[int, ...], tuple[int, ...]]


def scored_pairs(pairs: Iterable[TextPair], policy: Policy, iteration: int, rule: SentenceRule) -> Iterator[Pair | str]:
    """Tokenise pairs and compute the log-probabilities of both responses under the policy.

    Yields:
        A pair, or in a word why there is none: ``placeholder`` (a response holds an id that
        stands for a picture), ``identical`` (both are the same ids).
    """
    for batch in batched(token_pairs(pairs, policy), _BATCH):
        kept = [(pair, both) for pair, both in batch if not isinstance(both, str)]
        yield from (both for _, both in batch if isinstance(both, str))
        if not kept:
            continue
        prompts = [pair.prompt for pair, _ in kept]
        logprobs = [policy.teacher_forced(prompts, [both[side] for _, both in kept]) for side in (0, 1)]
        for (pair, both), chosen, rejected in zip(kept, *logprobs, strict=True):
            yield Pair(
                prompt=pair.prompt,
                iteration=iteration,
                chosen=_response("chosen", pair.chosen, both[0], float(chosen.sum()), rule),
                rejected=_response("rejected", pair.rejected, both[1], float(rejected.sum()), rule),
            )


def token_pairs(pairs: Iterable[TextPair], policy: Policy) -> Iterator[tuple[TextPair, TokenIds | str]]:
    """Tokenise pairs.

    Yields:
        Each pair with the ids of its chosen and its rejected response, or why it has none; see
        :func:`scored_pairs`.
    """
    for pair in pairs:
        chosen, rejected = (response_ids(policy, pair.prompt, text) for text in (pair.chosen, pair.rejected))
        yield pair, _refusal(policy, chosen, rejected) or (chosen, rejected)


def response_ids(policy: Policy, prompt: Prompt, text: str) -> tuple[int, ...]:
    """Tokenise a response as it follows the prompt, ending as the policy ends its own."""
    tokenizer = policy.tokenizer
    asked, whole = _dialogue(policy, prompt.text, text)
    prompt_ids, whole_ids = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (asked, whole))
    pairs = zip(prompt_ids, whole_ids, strict=False)
    shared = next((place for place, (one, other) in enumerate(pairs) if one != other), len(prompt_ids))
    ids = whole_ids[shared:]
    end = next((place for place, token in enumerate(ids) if token in policy.eos_ids), None)
    if end is not None:
        return tuple(ids[: end + 1])
    eos = tokenizer.eos_token_id
    return (*ids, eos if eos in policy.eos_ids else min(policy.eos_ids))


def _dialogue(policy: Policy, question: str, answer: str) -> tuple[str, str]:
    """Write a prompt, and the same with an answer behind it."""
    if not policy.family.chat:
        asked = f"{policy.processor.image_token}{question}\n"
        return asked, asked + answer
    asking = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    answering = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    template = policy.processor.apply_chat_template
    # Some templates put a space or a line break after the answer, which no policy samples.
    return template([asking], add_generation_prompt=True), template([asking, answering]).rstrip()


def count_sentences(text: str, rule: SentenceRule) -> int:
    """Count sentences as the search would have cut them."""
    return sum(1 for _ in rule.cut(text))


def _refusal(policy: Policy, chosen: Sequence[int], rejected: Sequence[int]) -> str | None:
    if set(policy.image_token_ids).intersection((*chosen, *rejected)):
        return "placeholder"
    return "identical" if chosen == rejected else None


def _response(name: str, text: str, ids: tuple[int, ...], logprob: float, rule: SentenceRule) -> Response:
    return Response(
        node_id=name,
        token_ids=ids,
        logprob=logprob,
        text=text,
        num_sentences=count_sentences(text, rule),
        reward=0.0,
        complete=True,
    )
