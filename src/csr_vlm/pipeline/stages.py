"""Run the stages of a run. Each reads what earlier stages wrote and writes its marker last.

A stage that is done returns at once, so a killed run is resumed by running it again. A killed stage
starts over, except that search and claim questions keep the parts they have written, and training resumes from its last
checkpoint.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from csr_vlm.config.load import merged, resolve
from csr_vlm.config.schema import RunConfig, ScorerConfig, preset_date
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import counts
from csr_vlm.core.memory import CostMeter, free_memory
from csr_vlm.core.progress import Reporter, Silent
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.data.checking import ModelCheck
from csr_vlm.data.images import with_hash
from csr_vlm.data.prompts import InputReport, count_rows, hold_out, no_usable_prompt, read_prompts
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.generation.engine_choice import choose_engine
from csr_vlm.method.pairs import make_pairs as make_prompt_pairs
from csr_vlm.models.devices import count_gpus
from csr_vlm.pipeline import offline_pairs
from csr_vlm.pipeline.claim_questions import ClaimQuestioner, worth_training
from csr_vlm.pipeline.failed_prompts import require_few_failures
from csr_vlm.pipeline.offline_pairs import has_offline_pairs
from csr_vlm.pipeline.policy_evaluation import evaluate_policy
from csr_vlm.pipeline.start import require_start, require_trackers
from csr_vlm.pipeline.tasks import (
    QuestionWorker,
    RescoreWorker,
    SearchWorker,
    load_engine_and_scorer,
    train_policy,
    usable_prompts,
)
from csr_vlm.scale.executor import LOCAL, Executor, LocalExecutor, Task
from csr_vlm.scale.torchrun import num_launched
from csr_vlm.store import files, ledger, parts, tables
from csr_vlm.store.run import Run

_WHOLE_PAIRS_PER_PROMPT = 4
"""Pairs of whole responses derived per prompt in place of its pairs of siblings."""


def check_inputs(run: Run, reporter: Reporter) -> None:
    """Open everything that the run needs, then read and store its inputs; see :func:`store_inputs`.

    Raises:
        CsrError: Something is missing, no prompt can be used, or the stored prompts were changed after they were
            checked.
    """
    if run.is_done(0, "prompts"):
        require_trackers(run.config)
        run.require_prompts_unchanged()
        return
    with reporter.stage("opening model and scorer", 1) as progress:
        model = require_start(run.config, reporter.log)
        progress.advance(1)
    store_inputs(run, reporter, model)


def store_inputs(run: Run, reporter: Reporter, model: ModelCheck | None) -> None:
    """Read all prompts and external pairs, decode every image once, and store the prompts that pass.

    Args:
        run: Run whose inputs are stored.
        reporter: Receives progress, and what was dropped.
        model: Puts every prompt through the model's processor; None for inputs that are known to pass.

    Raises:
        CsrError: No prompt can be used.
    """
    config, report = run.config, InputReport()
    heldout: list[Prompt] = []
    with reporter.stage("checking prompts and images", count_rows(config.data)) as progress:
        prompts = read_prompts(
            config.data,
            report,
            seed=config.seed,
            images=run.images_path,
            tick=lambda: progress.advance(1),
            model=model,
        )
        training = hold_out(map(with_hash, prompts), config.evaluation.heldout, heldout)
        tables.write_prompts(run.prompts_path, training, config.generation.prompts_per_part, run.root)
        tables.write_prompts(run.heldout_path, heldout, config.generation.prompts_per_part, run.root)
    if not report.accepted:
        raise no_usable_prompt(config.data, report)
    for message in report.messages("prompts"):
        reporter.log(message)
    images = (prompt.image for prompt in run.prompts())
    first = next(images, None)
    if config.scorer.others and all(image == first for image in images):
        reporter.log("all prompts are about one image, so its sentences are contrasted with a gray image alone")
    result = {
        "preset": {"name": config.preset, "date": preset_date(config.preset)},
        "sha256": files.sha256_of(run.prompts_path),
        "heldout": len(heldout),
        **report.dump(),
    }
    if config.data.pairs is not None:
        content = offline_pairs.PairsDigest()
        checked = offline_pairs.check_pairs(config.data, reporter, run.images_path, content, model)
        result["pairs"] = {**checked.dump(), "digest": content.value}
    run.mark_done(0, "prompts", [run.heldout_path], **result)


def generate(run: Run, iteration: int, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Search with the previous iteration's policy and score every sentence; each work item becomes a ledger part."""
    if run.is_done(iteration, "generate") or has_offline_pairs(run.config, iteration):
        return
    costs = CostMeter()
    settle_engine(run, reporter)
    task = Task(SearchWorker, run.root, {"iteration": iteration}, tables.count_groups(run.prompts_path))
    with reporter.stage(f"iteration {iteration}: searching", run.num_prompts) as progress:
        tally = executor.map(task, progress, reporter.log)
    parts.wait_for_parts(run.iteration(iteration) / "ledger", task.num_items)
    failed = run.failed_prompts(iteration)
    require_few_failures(run, failed, iteration)
    run.mark_done(
        iteration,
        "generate",
        run.ledger_files(iteration),
        failed=failed,
        nodes=tally["statuses"].total(),
        statuses=dict(tally["statuses"]),
        sentences_over_length=dict(tally["sentences_over_length"]),
        devices=dict(tally["devices"]),
        processes=len(tally["workers"]),
        tokens=tally["tokens"].total(),
        **costs.dump(),
    )


def settle_engine(run: Run, reporter: Reporter) -> None:
    """Choose the engine of ``generation.engine: auto`` once, and record it: a run never changes its engine."""
    if run.config.generation.engine != "auto" or run.is_done(0, "engine"):
        return
    prompts = tables.PromptGroups(run.prompts_path)[0]
    example = next(usable_prompts(prompts, run.config), prompts[0])
    choice = choose_engine(run.config, run.adapter_path(0), example, reporter.log, num_launched())
    free_memory()
    if count_gpus():
        reporter.log(f"the search uses {choice.name}: {choice.reason}")
    run.mark_done(0, "engine", name=choice.name, reason=choice.reason)


def score(
    run: Run, iteration: int, scorer_config: ScorerConfig, reporter: Reporter, executor: Executor = LOCAL
) -> None:
    """Add a scorer's cosines to every sentence of a ledger, part by part.

    Raises:
        CsrError: The iteration has no finished ledger.
    """
    require_done(run, iteration, "generate")
    settings = {"iteration": iteration, "scorer": scorer_config.model_dump(mode="json")}
    task = Task(RescoreWorker, run.root, settings, len(run.ledger_parts(iteration)))
    with (
        reporter.stage(f"iteration {iteration}: scoring", task.num_items) as progress,
        ledger.rewriting(run, iteration),
    ):
        executor.map(task, progress, reporter.log)


def require_done(run: Run, iteration: int, stage: str) -> None:
    """Verify that the stage whose output another one needs is done; iteration 0 needs none.

    Raises:
        CsrError: It is not done.
    """
    if iteration > 0 and not run.is_done(iteration, stage):
        raise CsrError(f"iteration {iteration} of {run.root} has no finished {stage} stage", f"csr {stage} {run.root}")


def make_pairs(run: Run, iteration: int, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Derive the iteration's pairs and question pairs from its ledger, or encode the offline pairs.

    Raises:
        CsrError: The first iteration has no pairs.
    """
    if run.is_done(iteration, "pairs"):
        return
    costs = CostMeter()
    offline = has_offline_pairs(run.config, iteration)
    pairs: Iterable[Pair]
    if offline:
        pairs, reasons = offline_pairs.encode_pairs(run, reporter)
    else:
        reasons = Counter()
        pairs = _iterate_pairs(run, iteration, run.config, reasons, reporter)
    num_pairs = tables.write_pairs(run.pairs_path(iteration), pairs, run.root)
    if not num_pairs and iteration == 1:
        raise CsrError(
            f"iteration {iteration} has no pairs: {counts(reasons)}",
            "loosen method.pairs or add prompts",
        )
    num_questions = 0 if offline else _write_question_pairs(run, iteration, reporter, executor)
    run.mark_done(
        iteration,
        "pairs",
        [path for path in (run.pairs_path(iteration), run.questions_path(iteration)) if path.exists()],
        pairs=num_pairs,
        questions=num_questions,
        prompts_without=dict(reasons),
        **summarize_pairs(tables.read_pairs(run.pairs_path(iteration))),
        **costs.dump(),
    )


def _write_question_pairs(run: Run, iteration: int, reporter: Reporter, executor: Executor) -> int:
    """Write the question pairs of a ledger, work item by work item; return their number."""
    path, folder = run.questions_path(iteration), run.question_parts(iteration)
    if not run.config.method.pairs.questions.per_prompt:
        return tables.write_pairs(path, [])
    task = Task(QuestionWorker, run.root, {"iteration": iteration}, tables.count_groups(run.prompts_path))
    with reporter.stage(f"iteration {iteration}: answering claim questions", run.num_prompts) as progress:
        executor.map(task, progress, reporter.log)
    written = parts.wait_for_parts(folder, task.num_items)

    def answered() -> Iterator[Pair]:
        return (pair for part in written for pair in tables.read_pairs(part))

    num_pairs = tables.write_pairs(path, worth_training(answered, run.config, iteration, reporter.log), run.root)
    shutil.rmtree(folder)
    return num_pairs


def question_pairs(run: Run, iteration: int, config: RunConfig, reporter: Reporter) -> list[Pair]:
    """Make the question pairs of a ledger under any settings; none if ``method.pairs.questions`` is off."""
    if not config.method.pairs.questions.per_prompt:
        return []
    engine, scorer = load_engine_and_scorer(config, run.adapter_path(iteration - 1), reporter.log)
    groups, trees = tables.PromptGroups(run.prompts_path), ledger.trees(run, iteration)
    questioner = ClaimQuestioner(config, engine.policy, scorer, iteration, groups[0])
    pairs: list[Pair] = []
    with reporter.stage(f"iteration {iteration}: answering claim questions", run.num_prompts) as progress:
        for prompts in tables.prompt_groups(run.prompts_path):
            pairs += questioner.pairs(prompts, list(islice(trees, len(prompts))))
            progress.advance(len(prompts))
    return list(worth_training(lambda: pairs, config, iteration, reporter.log))


def derive_pairs(
    run: Run, iteration: int, config: RunConfig, reporter: Reporter | None = None
) -> tuple[list[Pair], Counter[str]]:
    """Derive the pairs of a ledger under any settings, without generating again.

    Returns:
        The pairs, and the number of prompts without a pair by reason.
    """
    reasons: Counter[str] = Counter()
    return list(_iterate_pairs(run, iteration, config, reasons, reporter or Silent())), reasons


def _iterate_pairs(
    run: Run, iteration: int, config: RunConfig, reasons: Counter[str], reporter: Reporter
) -> Iterator[Pair]:
    """Yield pairs prompt by prompt; count in ``reasons`` why prompts have none."""
    trees = ledger.trees(run, iteration)
    with reporter.stage(f"iteration {iteration}: pairs", run.num_prompts) as progress:
        for prompt, nodes in zip(run.prompts(), trees, strict=True):
            pairs_or_reason = make_prompt_pairs(prompt, nodes, config.method, config.scorer.used, config.seed)
            if isinstance(pairs_or_reason, str):
                reasons[pairs_or_reason] += 1
            else:
                yield from pairs_or_reason
            progress.advance(1)


def whole_response_pairs(run: Run, iteration: int) -> list[Pair]:
    """Return pairs of whole responses: the iteration's own, or new ones derived from its ledger.

    Raises:
        CsrError: The ledger yields none.
    """
    pairs = list(run.pairs(iteration))
    if all(pair.chosen.complete and pair.rejected.complete for pair in pairs):
        return pairs
    changes = {"method": {"pairs": {"between": "responses", "per_prompt": _WHOLE_PAIRS_PER_PROMPT}}}
    pairs, reasons = derive_pairs(run, iteration, resolve(merged(run.config.dump(), changes)))
    if not pairs:
        raise CsrError(f"iteration {iteration} has no pairs of whole responses: {counts(reasons)}", "add prompts")
    return pairs


def summarize_pairs(pairs: Iterable[Pair]) -> dict[str, float]:
    """Compute the means of rewards, margin and lengths over pairs, holding one pair at a time."""
    num_pairs, totals = 0, [0.0] * len(_PAIR_VALUES)
    for pair in pairs:
        num_pairs += 1
        totals = [total + value(pair) for total, value in zip(totals, _PAIR_VALUES.values(), strict=True)]
    return {name: round(total / max(num_pairs, 1), 4) for name, total in zip(_PAIR_VALUES, totals, strict=True)}


_PAIR_VALUES: dict[str, Callable[[Pair], float]] = {
    "margin": lambda pair: pair.margin,
    "chosen_reward": lambda pair: pair.chosen.reward,
    "rejected_reward": lambda pair: pair.rejected.reward,
    "chosen_sentences": lambda pair: pair.chosen.num_sentences,
    "rejected_sentences": lambda pair: pair.rejected.num_sentences,
    "chosen_longer": lambda pair: pair.chosen.num_sentences > pair.rejected.num_sentences,
}


def try_training(run: Run, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Train one step before the first search, unless that has begun or another process will train.

    Raises:
        CsrError: Training fails.
    """
    has_begun = run.is_done(1, "generate") or bool(run.ledger_parts(1)) or has_offline_pairs(run.config, 1)
    if has_begun or not isinstance(executor, LocalExecutor):
        return
    settle_engine(run, reporter)
    if run.settled().config.generation.engine != "transformers":
        return
    from csr_vlm.training.trial import try_training as try_step

    with reporter.stage("trying a training step", 1) as progress:
        prompts = list(usable_prompts(tables.PromptGroups(run.prompts_path)[0], run.config))
        if prompts:
            try_step(prompts, run.config, run.adapter_path(0))
        progress.advance(1)


def train(run: Run, iteration: int, reporter: Reporter, executor: Executor = LOCAL) -> None:
    """Run DPO with the previous iteration's policy as reference and store the adapter."""
    if run.is_done(iteration, "train"):
        shutil.rmtree(run.trainer_path(iteration), ignore_errors=True)
        return
    costs = CostMeter()
    if isinstance(executor, LocalExecutor) and (num_gpus := count_gpus()) > 1:
        reporter.log(f"training uses one of {num_gpus} GPUs; to use all: csr run {run.root} --gpus {num_gpus}")
    with reporter.stage(f"iteration {iteration}: training", 0) as progress:
        result = executor.run_all(Task(train_policy, run.root, {"iteration": iteration}), progress)
    if result["reference"] == "model" and run.config.training.reference == "ledger":
        reporter.log(
            f"iteration {iteration}: the ledger's log-probabilities differ by {result['reference_difference']:.3g} "
            "nats from a teacher-forced pass; the reference log-probabilities were recomputed"
        )
    if result["packing_obstacle"] is not None:
        reporter.log(f"iteration {iteration}: responses do not share rows in training: {result['packing_obstacle']}")
    adapter = [path for path in sorted((run.iteration(iteration) / "adapter").rglob("*")) if path.is_file()]
    run.mark_done(iteration, "train", adapter, **costs.dump(), **result)
    shutil.rmtree(run.trainer_path(iteration), ignore_errors=True)


def evaluate(run: Run, iteration: int, reporter: Reporter, again: bool = False) -> None:
    """Evaluate the policy of an iteration on held-out prompts and on whatever else the configuration names."""
    if run.is_done(iteration, "evaluate") and not again:
        return
    costs = CostMeter()
    adapter, title = run.adapter_path(iteration), policy_name(iteration)
    documents = evaluate_policy(run.config, adapter, run.heldout(), title, reporter)
    for name, document in documents.items():
        files.write_checksummed(run.evaluation_path(iteration, name), document)
    metrics: dict[str, Any] = {name: document["metrics"] for name, document in documents.items()}
    run.mark_done(iteration, "evaluate", [], **metrics, **costs.dump())


def report(run: Run, out: Path | None = None) -> Path:
    """Write the report to ``out`` (default: ``RUN/report.html``).

    Scenes of the embedded worlds are annotated with their ground truth.
    """
    from csr_vlm.report.html import write_report
    from csr_vlm.world.truth import known_scene

    return write_report(run, known_scene, out)


def export(run: Run, reporter: Reporter) -> None:
    """Copy the final adapter to ``RUN/adapter``, and write the merged model if training.merge is set."""
    final = run.root / "adapter"
    if run.final == 0 and run.stopped_at is not None:
        reporter.log(f"no iteration of {run.root} passed its gate; the base model is the result")
        shutil.rmtree(final, ignore_errors=True)
        return
    trained = run.trained_adapter()

    def copy(temporary: Path) -> None:
        shutil.copytree(trained, temporary)
        for path in trained.iterdir():
            if path.is_file() and files.sha256_of(path) != files.sha256_of(temporary / path.name):
                raise CsrError(f"{path} was copied wrongly", "check the disk, and run the same command again")

    files.replace_directory(final, copy)
    if run.config.training.merge and not (run.root / "model").exists():
        from csr_vlm.training.dpo import merge

        reporter.log("merging the adapter into the base model")
        merge(run.config.model, final, run.root / "model")
