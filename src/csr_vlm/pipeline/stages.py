"""The stages of a run. Each reads what the one before wrote and writes its marker last.

Calling a stage that is done does nothing, so going on with a killed run is running it
again. A stage that was killed inside starts over, except that generation keeps the
ledger parts it has.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm.config.load import merged, resolve
from csr_vlm.config.schema import RunConfig, ScorerConfig, WorldEvaluationConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter, Silent
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.data.prompts import InputReport, count_rows, hold_out, no_usable_prompt, read_prompts
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.method.pairs import make_pairs as pairs_of
from csr_vlm.pipeline import offline_pairs
from csr_vlm.pipeline.claim_questions import ClaimQuestioner
from csr_vlm.pipeline.tasks import QuestionWorker, RescoreWorker, SearchWorker, engine_and_scorer, train_policy
from csr_vlm.scale.executor import LOCAL, Executor, Task
from csr_vlm.store import files, ledger, tables
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.scoring.scorer import ScorerGroup

_WHOLE_PER_PROMPT = 4
"""Pairs of whole responses that stand for a prompt's pairs of siblings."""


def check_inputs(run: Run, reporter: Reporter) -> None:
    """Read all prompts, decode every image once, and keep those that passed; the same for pairs from outside."""
    if "report_to" in run.config.training.trl:
        from csr_vlm.training.reporting import require_services

        require_services(run.config.training.trl["report_to"])
    if run.is_done(0, "prompts"):
        _refuse_other_prompts(run)
        return
    from csr_vlm.training.dpo import check_arguments

    config, report = run.config, InputReport()
    check_arguments(config.training)
    heldout: list[Prompt] = []
    with reporter.stage("checking prompts and images", count_rows(config.data)) as progress:
        prompts = read_prompts(
            config.data, report, seed=config.seed, images=run.images_path, tick=lambda: progress.advance(1)
        )
        kept = hold_out(prompts, config.evaluation.heldout, heldout)
        tables.write_prompts(run.prompts_path, kept, config.generation.prompts_per_part)
        tables.write_prompts(run.heldout_path, heldout, config.generation.prompts_per_part)
    if not report.accepted:
        raise no_usable_prompt(config.data, report)
    if report.dropped:
        reporter.log(f"dropped {report.dropped.total()} prompts: {report.reasons}; the manifest names them")
    found = {"sha256": files.sha256_of(run.prompts_path), "heldout": len(heldout), **report.dump()}
    if config.data.pairs is not None:
        found["pairs"] = offline_pairs.check_pairs(config.data, reporter, run.images_path).dump()
    run.mark_done(0, "prompts", **found)


def _refuse_other_prompts(run: Run) -> None:
    """What was checked is what is gone on with.

    Raises:
        CsrError: The file of prompts is another one now.
    """
    if files.sha256_of(run.prompts_path) != run.result(0, "prompts")["sha256"]:
        raise CsrError(
            f"{run.prompts_path} was changed after the inputs were checked",
            f"restore it; or delete {run.iteration(0) / 'done'} and all iterations, and run again",
        )


def generate(run: Run, iteration: int, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Search with the last iteration's policy and score every sentence, work item by work item."""
    if run.is_done(iteration, "generate") or offline_pairs.supplies(run.config, iteration):
        return
    started = time.perf_counter()
    task = Task(SearchWorker, run.root, {"iteration": iteration}, tables.count_groups(run.prompts_path))
    with reporter.stage(f"iteration {iteration}: searching", run.num_prompts) as progress:
        tally = executor.map(task, progress, reporter.log)
    run.mark_done(
        iteration,
        "generate",
        nodes=tally["statuses"].total(),
        statuses=dict(tally["statuses"]),
        sentences_over_length=dict(tally["sentences_over_length"]),
        seconds=_since(started),
    )


def score(
    run: Run, iteration: int, scorer_config: ScorerConfig, reporter: Reporter, executor: Executor = LOCAL
) -> None:
    """Add a scorer's cosines to every sentence of a ledger, part by part."""
    if not run.is_done(iteration, "generate"):
        raise CsrError(f"iteration {iteration} of {run.root} is not generated", f"csr generate {run.root}")
    settings = {"iteration": iteration, "scorer": scorer_config.model_dump(mode="json")}
    task = Task(RescoreWorker, run.root, settings, len(run.ledger_parts(iteration)))
    with reporter.stage(f"iteration {iteration}: scoring", task.num_items) as progress:
        executor.map(task, progress, reporter.log)


def require_before(run: Run, iteration: int, stage: str) -> None:
    """Refuse a stage whose inputs are not there yet.

    Raises:
        CsrError: An earlier stage is missing.
    """
    needed = {"generate": (iteration - 1, "train"), "train": (iteration, "pairs")}[stage]
    if needed[0] > 0 and not run.is_done(*needed):
        raise CsrError(
            f"iteration {needed[0]} of {run.root} has no finished {needed[1]} stage", f"csr {needed[1]} {run.root}"
        )


def make_pairs(run: Run, iteration: int, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Derive the iteration's pairs from its ledger, or take those from outside; ask about its claims."""
    if run.is_done(iteration, "pairs"):
        return
    started = time.perf_counter()
    outside = offline_pairs.supplies(run.config, iteration)
    reasons: Counter[str] = Counter()
    pairs = (
        _pairs_from_outside(run, reasons, reporter)
        if outside
        else _pairs(run, iteration, run.config, reasons, reporter)
    )
    number = tables.write_pairs(run.pairs_path(iteration), pairs)
    if not number and iteration == 1:
        raise CsrError(f"iteration {iteration} has no pairs: {dict(reasons)}", "loosen method.pairs or add prompts")
    asked = 0 if outside else _ask_questions(run, iteration, reporter, executor)
    run.mark_done(
        iteration,
        "pairs",
        pairs=number,
        questions=asked,
        prompts_without=dict(reasons),
        **summarise_pairs(tables.read_pairs(run.pairs_path(iteration))),
        seconds=_since(started),
    )


def _ask_questions(run: Run, iteration: int, reporter: Reporter, executor: Executor) -> int:
    """Write the pairs of yes and no about the claims of a ledger, work item by work item; return how many."""
    path, folder = run.questions_path(iteration), run.question_parts(iteration)
    if not run.config.method.pairs.questions.pattern:
        return tables.write_pairs(path, [])
    task = Task(QuestionWorker, run.root, {"iteration": iteration}, tables.count_groups(run.prompts_path))
    with reporter.stage(f"iteration {iteration}: asking about claims", run.num_prompts) as progress:
        executor.map(task, progress, reporter.log)
    found = sorted(folder.glob("part-*.parquet"))
    number = tables.write_pairs(path, (pair for part in found for pair in tables.read_pairs(part)))
    shutil.rmtree(folder)
    return number


def ask(run: Run, iteration: int, config: RunConfig, reporter: Reporter) -> list[Pair]:
    """Make pairs of yes and no about the claims of a ledger, under any settings; none, if they ask nothing."""
    if not config.method.pairs.questions.pattern:
        return []
    engine, scorer = engine_and_scorer(config, run.adapter_path(iteration - 1), reporter.log)
    groups, trees = tables.PromptGroups(run.prompts_path), ledger.trees(run, iteration)
    questioner = ClaimQuestioner(config, engine.policy, scorer, iteration, groups[0])
    pairs: list[Pair] = []
    with reporter.stage(f"iteration {iteration}: asking about claims", run.num_prompts) as progress:
        for prompts in tables.prompt_groups(run.prompts_path):
            pairs += questioner.pairs(prompts, list(islice(trees, len(prompts))))
            progress.advance(len(prompts))
    return pairs


def derive_pairs(
    run: Run, iteration: int, config: RunConfig, reporter: Reporter | None = None
) -> tuple[list[Pair], Counter[str]]:
    """Compute pairs under any settings; generation is not repeated.

    Returns:
        The pairs, and why the other prompts have none.
    """
    reasons: Counter[str] = Counter()
    return list(_pairs(run, iteration, config, reasons, reporter or Silent())), reasons


def _pairs(run: Run, iteration: int, config: RunConfig, reasons: Counter[str], reporter: Reporter) -> Iterator[Pair]:
    """Yield pairs prompt by prompt, and count in passing why others have none."""
    trees = ledger.trees(run, iteration)
    with reporter.stage(f"iteration {iteration}: pairs", run.num_prompts) as progress:
        for prompt, nodes in zip(run.prompts(), trees, strict=True):
            found = pairs_of(prompt, nodes, config.method, config.scorer.used, config.seed)
            if isinstance(found, str):
                reasons[found] += 1
            else:
                yield from found
            progress.advance(1)


def _pairs_from_outside(run: Run, reasons: Counter[str], reporter: Reporter) -> Iterable[Pair]:
    pairs, refused = offline_pairs.take_pairs(run, reporter)
    reasons.update(refused)
    return pairs


def whole_response_pairs(run: Run, iteration: int) -> list[Pair]:
    """Return an iteration's pairs if they are of whole responses, or else such pairs of the same ledger."""
    pairs = list(tables.read_pairs(run.pairs_path(iteration)))
    if all(pair.chosen.complete and pair.rejected.complete for pair in pairs):
        return pairs
    changed = {"method": {"pairs": {"between": "responses", "per_prompt": _WHOLE_PER_PROMPT}}}
    found, reasons = derive_pairs(run, iteration, resolve(merged(run.config.dump(), changed)))
    if not found:
        raise CsrError(f"iteration {iteration} has no pairs of whole responses: {dict(reasons)}", "add prompts")
    return found


def summarise_pairs(pairs: Iterable[Pair]) -> dict[str, float]:
    """Means over pairs that tell whether they are worth training on, none of them held."""
    number, totals = 0, [0.0] * len(_PAIR_TRAITS)
    for pair in pairs:
        number += 1
        totals = [total + trait(pair) for total, trait in zip(totals, _PAIR_TRAITS.values(), strict=True)]
    return {name: round(total / max(number, 1), 4) for name, total in zip(_PAIR_TRAITS, totals, strict=True)}


_PAIR_TRAITS: dict[str, Callable[[Pair], float]] = {
    "margin": lambda pair: pair.margin,
    "chosen_reward": lambda pair: pair.chosen.reward,
    "rejected_reward": lambda pair: pair.rejected.reward,
    "chosen_sentences": lambda pair: pair.chosen.num_sentences,
    "rejected_sentences": lambda pair: pair.rejected.num_sentences,
    "chosen_longer": lambda pair: pair.chosen.num_sentences > pair.rejected.num_sentences,
}


def train(run: Run, iteration: int, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Run DPO against the last iteration's policy and keep the adapter."""
    if run.is_done(iteration, "train"):
        return
    started = time.perf_counter()
    with reporter.stage(f"iteration {iteration}: training", 0) as progress:
        result = executor.run_all(Task(train_policy, run.root, {"iteration": iteration}), progress)
    if result["reference"] == "model" and run.config.training.reference == "ledger":
        reporter.log(
            f"iteration {iteration}: the ledger's log-probabilities differ by {result['reference_difference']:.3g} "
            "nats from a teacher-forced pass; the reference was computed again"
        )
    if result["packing_obstacle"] is not None:
        reporter.log(f"iteration {iteration}: pairs are trained on in rows of their own: {result['packing_obstacle']}")
    run.mark_done(iteration, "train", seconds=_since(started), **result)


def evaluate(run: Run, iteration: int, reporter: Reporter, again: bool = False) -> None:
    """Measure the policy after an iteration: on held-out prompts, and whatever the configuration names."""
    if run.is_done(iteration, "evaluate") and not again:
        return
    started = time.perf_counter()
    found = measure(run.config, run.adapter_path(iteration), run.heldout(), policy_name(iteration), reporter)
    for name, document in found.items():
        files.write_json(run.evaluation_path(iteration, name), document)
    metrics = {name: document["metrics"] for name, document in found.items()}
    run.mark_done(iteration, "evaluate", **metrics, seconds=_since(started))


def measure(
    config: RunConfig, adapter: Path | None, heldout: list[Prompt], title: str, reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Evaluate a policy in every way that the configuration asks for.

    Args:
        adapter: None for the base model.
        heldout: Prompts that nothing was trained on; none, no such evaluation.
        title: What the policy is called in the progress shown.

    Returns:
        By the evaluation's name its ``metrics``, ``protocol`` and ``rows``.
    """
    world = config.evaluation.world
    if not heldout and world is None:
        return {}
    loaded = engine_and_scorer(config, adapter, reporter.log)
    found = {}
    if heldout:
        found["heldout"] = _evaluate_heldout(config, *loaded, heldout, title, reporter)
    if world is not None:
        found["world"] = _evaluate_scenes(world, *loaded, title, reporter)
    return found


def evaluate_world(
    config: RunConfig, adapter: Path | None, title: str, reporter: Reporter, temperature: float = 0.0
) -> dict[str, Any]:
    """Evaluate a policy on the scenes that the configuration names."""
    world = config.evaluation.world or WorldEvaluationConfig()
    return _evaluate_scenes(world, *engine_and_scorer(config, adapter, reporter.log), title, reporter, temperature)


def _evaluate_heldout(
    config: RunConfig,
    engine: TransformersEngine,
    scorer: ScorerGroup,
    prompts: list[Prompt],
    title: str,
    reporter: Reporter,
) -> dict[str, Any]:
    from csr_vlm.evaluation.heldout import evaluate as evaluate_responses

    search_config = config.method.search
    limit = search_config.max_sentences * search_config.max_sentence_tokens
    with reporter.stage(f"{title}: answering held-out prompts", len(prompts)) as progress:
        found = evaluate_responses(engine, scorer, prompts, limit, search_config.delimiters)
        progress.advance(len(prompts))
    return found


def _evaluate_scenes(
    world: WorldEvaluationConfig,
    engine: TransformersEngine,
    scorer: ScorerGroup,
    title: str,
    reporter: Reporter,
    temperature: float = 0.0,
) -> dict[str, Any]:
    from csr_vlm.world.scene_evaluation import evaluate as evaluate_scenes
    from csr_vlm.world.scenes import Split, world_named

    with reporter.stage(f"{title}: evaluating", world.num_scenes) as progress:
        return evaluate_scenes(
            world_named(world.name),
            engine,
            scorer,
            split=Split(world.split),
            seed=world.seed,
            num_scenes=world.num_scenes,
            temperature=temperature,
            tick=progress.advance,
        )


def report(run: Run) -> Path:
    """Write ``RUN/report.html``; scenes of the embedded worlds are shown with their truth."""
    from csr_vlm.report.html import write_report
    from csr_vlm.world.truth import known_scene

    return write_report(run, known_scene)


def export(run: Run, reporter: Reporter) -> None:
    """Put the final adapter, and the merged model if asked for, where users look for them."""
    final = run.root / "adapter"
    if run.final == 0 and run.stopped_at is not None:
        reporter.log(f"no iteration of {run.root} passed; the base model stays as it is")
        shutil.rmtree(final, ignore_errors=True)
        return
    files.replace_directory(final, partial(shutil.copytree, run.trained_adapter()))
    if run.config.training.merge and not (run.root / "model").exists():
        from csr_vlm.training.dpo import merge

        reporter.log("merging the adapter into the base model")
        merge(run.config.model, final, run.root / "model")


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
