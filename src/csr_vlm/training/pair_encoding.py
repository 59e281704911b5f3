"""Encode external pairs as the search's own: token ids as the policy would have sampled them.

Text from elsewhere has no token ids and no log-probabilities. The ids are those that the chat
template and the tokenizer give for the whole dialog, after the prompt's own, up to the end of the
response; the log-probabilities are the policy's in a teacher-forced pass, so they serve as the
DPO reference like those of a ledger. External pairs have no rewards, which are set to 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from csr_vlm.core.batching import batched
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.data.external_pairs import TextPair
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.models.policy import Policy

_BATCH = 32
TokenIds = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of the chosen and of the rejected response."""


def encode_pairs(pairs: Iterable[TextPair], policy: Policy, iteration: int, rule: SentenceRule) -> Iterator[Pair | str]:
    """Tokenize pairs and compute the log-probabilities of both responses under the policy.

    Args:
        pairs: Pairs of texts.
        policy: Policy that serves as the DPO reference.
        iteration: Iteration of the pairs.
        rule: Rule that counts the sentences of a response.

    Yields:
        A pair, or the reason why there is none: ``placeholder`` (a response contains the token id
        of an image placeholder) or ``identical`` (both responses have the same token ids). The
        reasons of 32 pairs at a time come before their pairs.
    """
    for batch in batched(tokenize_pairs(pairs, policy), _BATCH):
        kept = [(pair, token_ids) for pair, token_ids in batch if not isinstance(token_ids, str)]
        yield from (reason for _, reason in batch if isinstance(reason, str))
        if not kept:
            continue
        prompts = [pair.prompt for pair, _ in kept for _side in range(2)]
        logprobs = policy.teacher_forced(prompts, [response for _, token_ids in kept for response in token_ids])
        for (pair, token_ids), chosen, rejected in zip(kept, logprobs[::2], logprobs[1::2], strict=True):
            yield Pair(
                prompt=pair.prompt,
                iteration=iteration,
                chosen=_response("chosen", pair.chosen, token_ids[0], float(chosen.sum()), rule, pair.chosen_ends),
                rejected=_response(
                    "rejected", pair.rejected, token_ids[1], float(rejected.sum()), rule, pair.rejected_ends
                ),
            )


def tokenize_pairs(pairs: Iterable[TextPair], policy: Policy) -> Iterator[tuple[TextPair, TokenIds | str]]:
    """Tokenize pairs.

    Yields:
        Each pair with the token ids of its chosen and its rejected response, or the reason why it
        has none; see :func:`encode_pairs`.
    """
    for pair in pairs:
        chosen, rejected = (tokenize_response(policy, pair.prompt, text) for text in (pair.chosen, pair.rejected))
        # The last token ends the response.
        chosen, rejected = chosen[: None if pair.chosen_ends else -1], rejected[: None if pair.rejected_ends else -1]
        yield pair, _reason_to_skip(policy, chosen, rejected) or (chosen, rejected)


def tokenize_response(policy: Policy, prompt: Prompt, text: str) -> tuple[int, ...]:
    """Tokenize a response as it follows the prompt, including the token that ends it."""
    tokenizer = policy.tokenizer
    dialogs = _dialogs(policy, prompt.text, text)
    prompt_ids, dialog_ids = (tokenizer(dialog, add_special_tokens=False)["input_ids"] for dialog in dialogs)
    pairs = enumerate(zip(prompt_ids, dialog_ids, strict=False))
    start = next((index for index, (left, right) in pairs if left != right), len(prompt_ids))
    token_ids = dialog_ids[start:]
    end = next((index for index, token in enumerate(token_ids) if token in policy.eos_ids), None)
    if end is not None:
        return tuple(token_ids[: end + 1])
    eos = tokenizer.eos_token_id
    return (*token_ids, eos if eos in policy.eos_ids else min(policy.eos_ids))


def _dialogs(policy: Policy, question: str, answer: str) -> tuple[str, str]:
    """Format a prompt, and the same prompt with an answer."""
    if not policy.family.chat:
        prompt = f"{policy.processor.image_token}{question}\n"
        return prompt, prompt + answer
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    template = policy.processor.apply_chat_template
    # Some templates put a space or a line break after the answer, which no policy samples.
    return template([user], add_generation_prompt=True), template([user, assistant]).rstrip()


def count_sentences(text: str, rule: SentenceRule) -> int:
    """Count the sentences that the search would have split a text into."""
    return sum(1 for _ in rule.cut(text))


def _reason_to_skip(policy: Policy, chosen: Sequence[int], rejected: Sequence[int]) -> str | None:
    if set(policy.image_token_ids).intersection((*chosen, *rejected)):
        return "placeholder"
    return "identical" if chosen == rejected else None


def _response(
    name: str, text: str, token_ids: tuple[int, ...], logprob: float, rule: SentenceRule, complete: bool
) -> Response:
    return Response(
        node_id=name,
        token_ids=token_ids,
        logprob=logprob,
        text=text,
        num_sentences=count_sentences(text, rule),
        reward=0.0,
        complete=complete,
    )
