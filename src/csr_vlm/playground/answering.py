"""Let a policy answer a prompt, and give its text as it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from csr_vlm.core.records import Prompt
from csr_vlm.models.policy import Policy


@dataclass(frozen=True)
class Sampling:
    """Configure how an answer is decoded."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 means greedy decoding."""
    top_p: float = 1.0
    seed: int = 0


class _StopWhen(StoppingCriteria):
    """Stop generation once an event is set."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


def stream_answer(policy: Policy, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
    """Yield the answer so far whenever it grows; closing the iterator stops the generation.

    Raises:
        CsrError: The image was deleted or changed since it was checked.
    """
    inputs = policy.generation_inputs(prompt)
    streamer = TextIteratorStreamer(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
    closed = Event()
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            with torch.inference_mode(), torch.random.fork_rng():
                torch.manual_seed(sampling.seed)
                policy.model.generate(
                    **inputs,
                    generation_config=_generation_config(policy, sampling),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_StopWhen(closed)]),
                )
        except BaseException as error:
            failures.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    text = ""
    try:
        for piece in streamer:
            text += piece
            if piece:
                yield text.strip()
    finally:
        closed.set()
        thread.join()
    if failures:
        raise failures[0]


def _generation_config(policy: Policy, sampling: Sampling) -> GenerationConfig:
    """Decode from the raw distribution, as the search does, whatever the model's own settings are."""
    sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(sampled),
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(policy.eos_ids),
        pad_token_id=policy.pad_id,
        suppress_tokens=policy.image_token_ids or None,
        **sampled,
    )
