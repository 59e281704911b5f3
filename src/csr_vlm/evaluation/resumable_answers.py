"""Let a run's policy answer prompts, resumably.

Answers are appended to a journal as they come. A killed evaluation goes on where it was: sampling is
seeded per prompt, so the answers do not depend on where it was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from csr_vlm.core.batching import batched
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Progress
from csr_vlm.core.records import Finish, Prompt
from csr_vlm.evaluation.answers import AnswerSettings, Respond
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.generation.transformers_engine import TransformersEngine
from csr_vlm.models.adapters import AdapterSwitch
from csr_vlm.store import files
from csr_vlm.store.run import Run

_PROMPTS_PER_CHUNK = 256


def require_policy(run: Run, iteration: int) -> None:
    """Check that an iteration has a policy.

    Raises:
        CsrError: It is not trained.
    """
    if iteration and not run.is_done(iteration, "train"):
        raise CsrError(
            f"iteration {iteration} of {run.root} has no adapter", f"the last trained iteration is {run.last_trained}"
        )


def identify_policy(run: Run, iteration: int) -> str:
    """Return what identifies the policy of an iteration: its base model and the content of its adapter."""
    adapter = run.adapter_path(iteration)
    weights = None if adapter is None else adapter / "adapter_model.safetensors"
    content = files.sha256_of(weights) if weights is not None and weights.is_file() else "no adapter"
    return files.digest([run.config.model.path, run.config.model.revision, content])


OpenEngine = Callable[[], AbstractContextManager[TransformersEngine]]
"""Open the engine of a policy; is called only if an answer is missing."""


class SwitchedPolicies:
    """Load a run's base model once, and switch the adapters of its iterations on and off.

    Args:
        iterations: 0 is the base model.
    """

    def __init__(self, run: Run, iterations: Sequence[int]) -> None:
        self._run = run
        self._adapters = {policy_name(number): run.adapter_path(number) for number in iterations}
        self._switch: AdapterSwitch | None = None

    @contextmanager
    def using(self, iteration: int) -> Iterator[TransformersEngine]:
        """Open the engine of an iteration's policy; the first call loads the model."""
        config = self._run.config
        if self._switch is None:
            self._switch = AdapterSwitch(config.model, self._adapters, config.data.max_image_pixels)
        with self._switch.using(policy_name(iteration)) as policy:
            yield TransformersEngine(policy, config.generation.max_rows, config.generation.attention)


def policy_responder(
    open_engine: OpenEngine, decoding: AnswerSettings, progress: Progress, journal: Path, policy: str
) -> Respond:
    """Return a function that answers prompts, and keeps every answer in a journal until the caller is done.

    Args:
        journal: File of the answers so far; the caller deletes it after writing the result.
        policy: Identifies the policy; answers of another one in the journal are not used.
    """

    def respond(prompts: Sequence[Prompt]) -> Iterator[tuple[str, Finish]]:
        state = [policy, decoding.max_new_tokens, decoding.temperature, decoding.seed]
        identity = files.digest([*state, [[prompt.prompt_id, prompt.image, prompt.text] for prompt in prompts]])
        known = _read_journal(journal, identity)[: len(prompts)]
        progress.advance(len(known))
        yield from known
        if len(known) == len(prompts):
            return
        with open_engine() as engine:
            for chunk in batched(islice(prompts, len(known), None), _PROMPTS_PER_CHUNK):
                candidates = engine.respond(chunk, decoding.max_new_tokens, decoding.temperature, decoding.seed)
                answers = [(candidate.text, candidate.finish) for candidate in candidates]
                _append(journal, identity, answers)
                yield from answers
                engine.forget()
                progress.advance(len(chunk))

    return respond


def _append(journal: Path, identity: str, answers: Sequence[tuple[str, Finish]]) -> None:
    lines = [json.dumps([identity, text, finish.value], ensure_ascii=False) + "\n" for text, finish in answers]
    with files.disk_errors(journal):
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())


def _read_journal(journal: Path, identity: str) -> list[tuple[str, Finish]]:
    """Return the answers of this policy to these prompts; a journal with any other content is deleted."""
    if not journal.is_file():
        return []
    answers: list[tuple[str, Finish]] = []
    lines = journal.read_bytes().split(b"\n")
    complete = lines.pop() == b""
    for line in lines:
        entry = _entry(line)
        if entry is None or entry[0] != identity:
            journal.unlink()
            return []
        answers.append((entry[1], Finish(entry[2])))
    if not complete:  # a kill has cut off the last line
        files.write_text(journal, "".join(line.decode() + "\n" for line in lines))
    return answers


def _entry(line: bytes) -> Any | None:
    """Return what a line of a journal says; None if it is damaged."""
    try:
        entry = json.loads(line)
        Finish(entry[2])
    except (ValueError, LookupError, TypeError):
        return None
    return entry if isinstance(entry[0], str) and isinstance(entry[1], str) and len(entry) == 3 else None
