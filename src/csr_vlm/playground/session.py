"""Answer questions about pictures with the policies of one or two runs, with the evidence for every claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from csr_vlm.core.errors import CsrError, suggestion
from csr_vlm.core.records import Prompt
from csr_vlm.data.images import BadImage, load_image
from csr_vlm.evaluation.claim_marker import NUM_OTHERS, ClaimMarker
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.method.claim_places import Mark
from csr_vlm.models.adapters import AdapterSwitch
from csr_vlm.models.yes_or_no import YesOrNo
from csr_vlm.pipeline.tasks import load_run_scorer
from csr_vlm.playground.answering import Sampling, stream_answer
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class Contestant:
    """Name one policy of a run."""

    run: Run
    iteration: int
    """0 is the base model."""

    @property
    def adapter(self) -> Path | None:
        """Return the directory of its adapter; None for a base model without one."""
        return self.run.adapter_path(self.iteration)


class Playground:
    """Load the policies of runs and their scorer.

    Policies of one base model share its weights. The first run's scorer weighs the claims of all answers.

    Args:
        runs: One or two runs.

    Raises:
        CsrError: A model, an adapter or the scorer cannot be loaded.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.run = runs[0]
        self.contestants = contestants(runs)
        self._switches = _load(self.contestants)
        self._yes_or_no: dict[int, YesOrNo] = {}
        config = self.run.config
        self._marker = ClaimMarker(
            load_run_scorer(config, self.run.adapter_path(0)),
            config.method,
            config.scorer.used,
            self.pictures(NUM_OTHERS),
        )

    @property
    def policies(self) -> list[str]:
        """Return the names of all policies, base models first."""
        return list(self.contestants)

    @property
    def question(self) -> str:
        """Return the question that the run asks about its first picture."""
        prompts = self.pictures(1)
        return prompts[0].text if prompts else "Describe this image in detail."

    def pictures(self, number: int) -> list[Prompt]:
        """Return the first prompts of the run with distinct pictures, held-out ones first."""
        prompts = {prompt.image: prompt for prompt in reversed(_prompts(self.run, 4 * number))}
        return list(islice(reversed(prompts.values()), number))

    def require(self, policies: Sequence[str]) -> None:
        """Check the names of policies.

        Raises:
            CsrError: A name is unknown.
        """
        for policy in policies:
            if policy not in self.contestants:
                raise CsrError(f"{policy!r} is not a policy of this run", suggestion(policy, self.policies))

    def check_picture(self, path: Path) -> tuple[int, int]:
        """Decode a picture once; return its width and height.

        Raises:
            CsrError: It is missing, too large, or not a picture.
        """
        try:
            return load_image(path, self.run.config.data.max_image_pixels).size
        except BadImage as error:
            raise CsrError(f"the picture {path} cannot be used: {error}", "give a JPEG, PNG or WebP file") from None

    def answer(self, policy: str, prompt: Prompt, sampling: Sampling) -> Iterator[str]:
        """Yield the answer of a policy so far, whenever it grows."""
        with self._switches[policy].using(policy) as loaded:
            yield from stream_answer(loaded, prompt, sampling)

    def marks(self, prompt: Prompt, text: str) -> list[Mark]:
        """Return the claims of an answer, each with its evidence."""
        return self._marker.marks(prompt, text)

    def claim_question(self, thing: str) -> str:
        """Return the yes-or-no question about a thing, in the words of the run."""
        return self.run.config.method.pairs.questions.ask(thing, 0)

    def probability_of_yes(self, policy: str, picture: str, question: str) -> float:
        """Return P(yes) / (P(yes) + P(no)) of a policy's answer to a question about a picture."""
        switch = self._switches[policy]
        with switch.using(policy) as loaded:
            asked = self._yes_or_no.setdefault(id(switch), YesOrNo(loaded))
            return asked.probabilities([(picture, question)])[0]


def contestants(runs: Sequence[Run]) -> dict[str, Contestant]:
    """Name the base model and every trained iteration of some runs; one that they share is listed once.

    Raises:
        CsrError: Two runs have the same name.
    """
    names = [run.root.resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise CsrError(f"two runs have the name {names[0]}", "rename one of the folders")
    one_base = all(run.config.model == runs[0].config.model for run in runs)
    found: dict[str, Contestant] = {}
    for name, run in zip(names, runs, strict=True):
        for iteration in [0, *run.iterations_done("train")]:
            is_shared = len(runs) == 1 or (one_base and not iteration)
            label = policy_name(iteration)
            found.setdefault(label if is_shared else f"{name}: {label}", Contestant(run, iteration))
    return found


def _load(found: Mapping[str, Contestant]) -> dict[str, AdapterSwitch]:
    """Load one model for all policies that have the same base model; return it by policy."""
    switches: dict[str, AdapterSwitch] = {}
    remaining = dict(found)
    while remaining:
        first = next(iter(remaining.values())).run.config
        base = first.model.model_copy(update={"adapter": None})
        group = {
            name: contestant
            for name, contestant in remaining.items()
            if contestant.run.config.model.model_copy(update={"adapter": None}) == base
        }
        adapters = {name: contestant.adapter for name, contestant in group.items()}
        switch = AdapterSwitch(base, adapters, first.data.max_image_pixels)
        switches |= dict.fromkeys(group, switch)
        remaining = {name: contestant for name, contestant in remaining.items() if name not in group}
    return switches


def _prompts(run: Run, number: int) -> list[Prompt]:
    heldout = run.heldout() if run.heldout_path.exists() else []
    training = run.prompts() if run.prompts_path.exists() else iter(())
    return list(islice(chain(heldout, training), number))
