"""Build the suites that a user names, have a run's policies answer them, and score the answers.

RUN/hallucination/SUITE-PART.jsonl                     the prompts as they are put to the policies
RUN/hallucination/judge/transcript.jsonl               everything that judges were asked and replied
RUN/iteration-N/eval/hallucination/SUITE-PART.jsonl    the answers, with their protocol beside them
RUN/iteration-N/eval/SUITE.json                        the evaluation, as every other
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csr_vlm.core.errors import CsrError, suggestion
from csr_vlm.core.progress import Reporter
from csr_vlm.data.checking import ModelCheck
from csr_vlm.evaluation import answers, resumable_answers
from csr_vlm.evaluation.chair import object_reader
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.hallucination.amber import AmberSuite
from csr_vlm.evaluation.hallucination.coco_suites import ChairSuite, PopeSuite
from csr_vlm.evaluation.hallucination.hallusion import HallusionSuite
from csr_vlm.evaluation.hallucination.mmhal import MMHalSuite
from csr_vlm.evaluation.hallucination.objecthal import ObjectHalSuite
from csr_vlm.evaluation.hallucination.suite import AnswerFile, Scoring, Suite, SuitePart
from csr_vlm.evaluation.judge import Judge
from csr_vlm.store import files
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class Sources:
    """Hold where a user keeps the data of the benchmarks."""

    chair: Path | None = None
    """Caption prompts."""
    pope: Sequence[Path] = ()
    amber: Path | None = None
    objecthal: Path | None = None
    mmhal: Path | None = None
    hallusion: Path | None = None
    annotations: Path | None = None
    """COCO's annotations."""
    images: Path | None = None
    """COCO's images."""
    words: str = "pattern"
    synonyms: Path | None = None
    nltk_data: Path | None = None
    amber_images: Path | None = None
    amber_python: Path | None = None
    limit: int | None = None
    """Number of questions of a part, for a quick test."""

    def folder(self, option: str, suite: str) -> Path:
        """Return the value of an option.

        Raises:
            CsrError: It is not given, or does not exist.
        """
        path: Path | None = getattr(self, option)
        if path is None:
            raise CsrError(f"the suite {suite} needs --{option}", "see csr eval hallucination --help")
        if not path.exists():
            raise CsrError(f"--{option} {path} does not exist", "check the path")
        return path


def _chair(sources: Sources) -> Suite:
    prompts, annotations = sources.folder("chair", "chair"), sources.folder("annotations", "chair")
    reader, table = object_reader(sources.words, sources.synonyms, sources.nltk_data)
    return ChairSuite(prompts, sources.images, annotations, reader, table, sources.limit)


def _pope(sources: Sources) -> Suite:
    if not sources.pope:
        raise CsrError("the suite pope needs --pope", "see csr eval hallucination --help")
    return PopeSuite(sources.pope, sources.images, sources.limit)


def _amber(sources: Sources) -> Suite:
    return AmberSuite(sources.folder("amber", "amber"), sources.amber_images, sources.amber_python, sources.limit)


def _objecthal(sources: Sources) -> Suite:
    annotations = sources.folder("annotations", "objecthal")
    return ObjectHalSuite(sources.folder("objecthal", "objecthal"), annotations, sources.images, sources.limit)


def _mmhal(sources: Sources) -> Suite:
    return MMHalSuite(sources.folder("mmhal", "mmhal"), sources.limit)


def _hallusion(sources: Sources) -> Suite:
    return HallusionSuite(sources.folder("hallusion", "hallusion"), sources.limit)


SUITES: Mapping[str, Callable[[Sources], Suite]] = {
    "chair": _chair,
    "pope": _pope,
    "amber": _amber,
    "objecthal": _objecthal,
    "mmhal": _mmhal,
    "hallusion": _hallusion,
}
"""Name of a suite to what builds it."""


def build_suites(names: Sequence[str], sources: Sources) -> list[Suite]:
    """Build the named suites, and read their files.

    Raises:
        CsrError: A name is unknown, or a file is missing or unusable.
    """
    for name in names:
        if name not in SUITES:
            raise CsrError(f"{name!r} is not a suite", suggestion(name, SUITES))
    if not names:
        raise CsrError("no suite is named", f"expected some of: {', '.join(SUITES)}")
    return [SUITES[name](sources) for name in dict.fromkeys(names)]


def run_suites(
    run: Run,
    suites: Sequence[Suite],
    iterations: Sequence[int],
    check: ModelCheck,
    judge: Judge | None,
    reporter: Reporter,
) -> dict[int, dict[str, dict[str, Any]]]:
    """Have every policy answer every suite, score the answers, and store the evaluations.

    The base model is loaded once, and its adapters are switched on and off. All prompts are read before the
    first answer, and all answers are there before the first request to a judge.

    Args:
        iterations: 0 is the base model.
        check: Puts every prompt through the model's processor.

    Returns:
        Evaluation documents by iteration and suite.

    Raises:
        CsrError: A prompt is unusable, an iteration is not trained, or scoring fails.
    """
    for number in iterations:
        resumable_answers.require_policy(run, number)
    prompts = {
        (suite.name, part.name): _write_prompts(run, suite, part, check) for suite in suites for part in suite.parts()
    }
    policies = resumable_answers.SwitchedPolicies(run, iterations)
    answered = {
        (number, suite.name): {
            part.name: _answer(run, number, suite, part, prompts[suite.name, part.name], policies, reporter)
            for part in suite.parts()
        }
        for number in iterations
        for suite in suites
    }
    documents: dict[int, dict[str, dict[str, Any]]] = {number: {} for number in iterations}
    for number in iterations:
        for suite in suites:
            num_requests = len(suite.request_chars())
            with reporter.stage(f"{policy_name(number)}: scoring {suite.name}", num_requests) as progress:
                folder = run.iteration(number) / "eval" / "hallucination"
                document = suite.score(answered[number, suite.name], Scoring(folder, judge, progress.advance))
            files.write_checksummed(run.evaluation_path(number, suite.name), document)
            documents[number][suite.name] = document
    return documents


_Prompts = tuple[Path, Sequence[answers.EvaluationPrompt]]


def _write_prompts(run: Run, suite: Suite, part: SuitePart, check: ModelCheck) -> _Prompts:
    """Write a part's prompts into the run, and read them as every prompt file is read."""
    folder = run.root / "hallucination"
    path = folder / f"{suite.name}-{part.name}.jsonl"
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part.rows))
    return path, answers.read_evaluation_prompts(path, part.images, images=folder / "images", model=check)


def _answer(
    run: Run,
    iteration: int,
    suite: Suite,
    part: SuitePart,
    written: _Prompts,
    policies: resumable_answers.SwitchedPolicies,
    reporter: Reporter,
) -> AnswerFile:
    """Answer a part, unless the same policy has answered the same prompts with the same settings."""
    path, prompts = written
    out = run.iteration(iteration) / "eval" / "hallucination" / path.name
    settings = answers.AnswerSettings(part.max_new_tokens)
    identity = resumable_answers.identify_policy(run, iteration)
    stored = answers.read_protocol(out)
    current = (answers.identity_of(prompts, settings)["id"], identity)
    if stored is None or (stored.get("id"), stored.get("policy", {}).get("identity")) != current:
        journal = out.with_suffix(".partial.jsonl")
        policy = {"model": run.config.model.path, "iteration": iteration, "identity": identity}
        title = f"{policy_name(iteration)}: answering {suite.name} {part.name}"
        with reporter.stage(title, len(prompts)) as progress:
            respond = resumable_answers.policy_responder(
                lambda: policies.using(iteration), settings, progress, journal, identity
            )
            rows, protocol = answers.answer_prompts(prompts, respond, settings, policy)
        answers.write_answers(out, rows, protocol)
        journal.unlink(missing_ok=True)
    return AnswerFile(out, path)
