"""Present a policy to lmms-eval: base model plus adapter, generating with the engine used in training.

This module is imported only where lmms-eval is installed.
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
"""Used where a task sets no limit."""
_BATCH = 64


class PolicyModel(lmms):
    """Answer lmms-eval's requests with a :class:`TransformersEngine`.

    Exceptions propagate: a request that fails ends the evaluation instead of being scored as an
    empty answer. A request without exactly one image cannot be put to the policy; it gets an
    empty answer and is counted in ``unanswered``, for the caller to decide about.
    """

    is_simple = False

    def __init__(self, engine: TransformersEngine) -> None:
        super().__init__()
        self._engine = engine
        self.unanswered: dict[str, int] = {}
        """Task to the number of requests without exactly one image."""
        self.limits: dict[str, int] = {}
        """Task to the largest max_new_tokens that it requested."""

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
        groups: dict[tuple[int, float], list[tuple[int, Prompt, list[str]]]] = {}  # by decoding settings
        with tempfile.TemporaryDirectory() as directory:
            for index, request in enumerate(requests):
                _, messages_of, settings, doc_id, task, split = request.args
                image, text = _content(messages_of(self.task_dict[task][split][doc_id]))
                if image is None:
                    self.unanswered[task] = self.unanswered.get(task, 0) + 1
                    continue
                # A lossless file, so that the image takes the same path through the code as any other.
                path = Path(directory) / f"{index}.png"
                image.convert("RGB").save(path)
                limit, temperature, stops = _decoding(task, settings)
                self.limits[task] = max(limit, self.limits.get(task, 0))
                prompt = Prompt(f"{task}/{split}/{doc_id}", str(path), text)
                groups.setdefault((limit, temperature), []).append((index, prompt, stops))
            for (limit, temperature), group in groups.items():
                responses = self._engine.respond([prompt for _, prompt, _ in group], limit, temperature)
                for (index, _, stops), response in zip(group, responses, strict=True):
                    answers[index] = _truncate(response.sentence, stops)
            self._engine.forget()
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        raise CsrError(
            "a task requests log-likelihoods, which are not supported", "use a task with output_type: generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        raise CsrError(
            "a task has several rounds, which are not supported", "use a task with output_type: generate_until"
        )


def _content(messages: Sequence[Mapping[str, Any]]) -> tuple[Any | None, str]:
    """Return the image and the text of a question; None for the image unless there is exactly one."""
    parts = [part for message in messages for part in message["content"]]
    images = [part["url"] for part in parts if part["type"] == "image"]
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    single = len(images) == 1 and len(messages) == 1 and all(part["type"] in ("image", "text") for part in parts)
    return (images[0] if single else None), text


def _decoding(task: str, settings: Mapping[str, Any]) -> tuple[int, float, list[str]]:
    """Return max_new_tokens, temperature and stop strings from a task's generation settings."""
    if int(settings.get("num_beams") or 1) > 1:
        raise CsrError(f"{task} requests beam search, which is not supported", "set num_beams: 1 in the task")
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
    stops = settings.get("until") or []
    return (
        int(settings.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        temperature,
        [stops] if isinstance(stops, str) else [stop for stop in stops if stop],
    )


def _truncate(text: str, stops: Sequence[str]) -> str:
    """Truncate a text at the first stop string."""
    positions = [position for stop in stops if (position := text.find(stop)) >= 0]
    return text[: min(positions)].strip() if positions else text
