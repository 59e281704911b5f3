"""Decode and process the pictures of prompts that wait, in a thread, while the model decodes others.

Otherwise a GPU would wait for every picture. One thread is enough: a search decodes many steps for each prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy, deepcopy

from csr_vlm.core.records import Prompt
from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.policy import Policy

PROMPTS_AHEAD = 32
"""Most prompts that are processed and wait; their pixels are in memory."""


class ReadingAhead:
    """Encode prompts in the order in which they are expected.

    Args:
        policy: Policy whose processor encodes; the thread has a copy of it, since processors are not thread-safe.
    """

    def __init__(self, policy: Policy) -> None:
        processor = copy(policy.processor)
        processor.tokenizer = deepcopy(policy.tokenizer)
        self._policy = Policy(policy.model, processor, policy.max_image_pixels)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="reading-ahead")
        self._expected: deque[Prompt] = deque()
        """Prompts that are not begun."""
        self._encoded: dict[str, Future[EncodedPrompt]] = {}
        """Prompts that are begun, by id."""

    def expect(self, prompts: Sequence[Prompt]) -> None:
        """Announce prompts that will be asked for, in this order."""
        self._expected += prompts
        self._fill()

    def encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Return prompts as :meth:`csr_vlm.models.policy.Policy.encode` does; wait for those that are not done.

        Raises:
            CsrError: The image of a prompt was deleted or changed since it was checked.
        """
        wanted = {prompt.prompt_id for prompt in prompts}
        self._expected = deque(prompt for prompt in self._expected if prompt.prompt_id not in wanted)
        for prompt in prompts:
            if prompt.prompt_id not in self._encoded:
                self._encoded[prompt.prompt_id] = self._begin(prompt)
        futures = [self._encoded.pop(prompt.prompt_id) for prompt in prompts]
        self._fill()
        return [future.result() for future in futures]

    def forget(self) -> None:
        """Drop all prompts that were expected."""
        self._expected.clear()
        for future in self._encoded.values():
            future.cancel()
        self._encoded.clear()

    def _fill(self) -> None:
        while self._expected and len(self._encoded) < PROMPTS_AHEAD:
            prompt = self._expected.popleft()
            self._encoded[prompt.prompt_id] = self._begin(prompt)

    def _begin(self, prompt: Prompt) -> Future[EncodedPrompt]:
        return self._thread.submit(self._policy.encode, prompt)
