"""A policy as lmms-eval sees it: base model plus adapter, generating as in training.

Imported only where lmms-eval is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms

from csr_vlm.core.batching import batched
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.generation.transformers_engine import TransformersEngine

DEFAULT_NEW_TOKENS = 256
"""Where a task sets no limit."""
_BATCH = 64


class PolicyModel(lmms):
    """Answers lmms-eval's requests through the project's own engine.

    Nothing is caught: a request that fails ends the evaluation instead of being scored as an
    empty answer. A request without exactly one image cannot be put to the policy; it is
    answered with nothing and counted in ``unanswered``, for the caller to judge.
    """

    is_simple = False

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__()
        self._engine = engine
        self.unanswered: dict[str, int] = {}
        """Task to requests without exactly one image."""
        self.limits: dict[str, int] = {}
        """Task to the largest max_new_tokens it asked for."""

    @property
    def device(self) -> Any:
        return self._engine.policy.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer every request, in order."""
        answers: list[str] = []
        for chunk in batched(requests, _BATCH):
            answers += self._answer(chunk)
        return answers

    def _answer(self, requests: Sequence[Any]) -> list[str]:
        answers = [""] * len(requests)
        asked: dict[tuple[int, float], list[tuple[int, Prompt, list[str]]]] = {}
        with tempfile.TemporaryDirectory() as directory:
            for place, request in enumerate(requests):
                _, messages_of, settings, doc_id, task, split = request.args
                image, text = _content(messages_of(self.task_dict[task][split][doc_id]))
                if image is None:
                    self.unanswered[task] = self.unanswered.get(task, 0) + 1
                    continue
                # A lossless file, so that the picture goes the way that every other picture goes.
                path = Path(directory) / f"{place}.png"
                image.convert("RGB").save(path)
                limit, temperature, ends = _decoding(task, settings)
                self.limits[task] = max(limit, self.limits.get(task, 0))
                prompt = Prompt(f"{task}/{split}/{doc_id}", str(path), text)
                asked.setdefault((limit, temperature), []).append((place, prompt, ends))
            for (limit, temperature), group in asked.items():
                responses = self._engine.respond([prompt for _, prompt, _ in group], limit, temperature)
                for (place, _, ends), response in zip(group, responses, strict=True):
                    answers[place] = _cut(response.sentence, ends)
            self._engine.forget()
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        raise CsrError("a task asks for log-likelihoods, which this bridge does not give", "take a generating task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        raise CsrError("a task talks in rounds, which this bridge does not do", "take a task of one round")


def _content(messages: Sequence[Mapping[str, Any]]) -> tuple[Any | None, str]:
    """The one image and the text of a question; no image where there is none or several."""
    parts = [part for message in messages for part in message["content"]]
    pictures = [part["url"] for part in parts if part["type"] == "image"]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    single = len(pictures) == 1 and len(messages) == 1 and all(part["type"] in ("image", "text") for part in parts)
    return (pictures[0] if single else None), text


def _decoding(task: str, settings: Mapping[str, Any]) -> tuple[int, float, list[str]]:
    """(max_new_tokens, temperature, texts that end an answer) of a task's generation settings."""
    if int(settings.get("num_beams") or 1) > 1:
        raise CsrError(f"{task} asks for beam search, which the engine does not do", "set num_beams: 1 in the task")
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
    ends = settings.get("until") or []
    return (
        int(settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        temperature,
        [ends] if isinstance(ends, str) else [end for end in ends if end],
    )


def _cut(text: str, ends: Sequence[str]) -> str:
    """Keep what stands before the first of some texts."""
    places = [at for end in ends if (at := text.find(end)) >= 0]
    return text[: min(places)].strip() if places else text
