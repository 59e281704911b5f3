"""The stages of a run. Each reads what the one before wrote and writes its marker last.

Calling a stage that is done does nothing, so going on with a killed run is running it
again. A stage that was killed inside starts over, except that generation keeps the
ledger parts it has.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm import asking, external
from csr_vlm.config import RunConfig, ScorerConfig, WorldEvaluationConfig, merged, resolve
from csr_vlm.data.prompts import InputReport, count_rows, hold_out, read_prompts
from csr_vlm.errors import CsrError
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.method.pairs import make_pairs as pairs_of
from csr_vlm.method.search import search
from csr_vlm.progress import Reporter
from csr_vlm.records import Node, Pair, Prompt
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.scoring.scorer import ScorerGroup

_WHOLE_PER_PROMPT = 4
"""Pairs of whole responses that stand for a prompt's pairs of siblings."""


def check_inputs(run: Run, tell: Reporter) -> None:
    """Read all prompts, decode every image once, and keep those that passed; the same for pairs from outside."""
    if run.is_done(0, "prompts"):
        _refuse_other_prompts(run)
        return
    config, report = run.config, InputReport()
    heldout: list[Prompt] = []
    with tell.stage("checking prompts and images", count_rows(config.data)) as advance:
        prompts = read_prompts(config.data, report, seed=config.seed, images=run.images_path, tick=lambda: advance(1))
        kept = hold_out(prompts, config.evaluation.heldout, heldout)
        tables.write_prompts(run.prompts_path, kept, config.generation.prompts_per_part)
        tables.write_prompts(run.heldout_path, heldout, config.generation.prompts_per_part)
    if not report.accepted:
        raise CsrError(f"no usable prompt in {', '.join(config.data.sources)}", "; ".join(report.examples[:3]))
    if report.dropped:
        tell.say(f"dropped {report.dropped.total()} prompts: {report.reasons}; the manifest names them")
    found = {"sha256": files.sha256_of(run.prompts_path), "heldout": len(heldout), **report.dump()}
    if config.data.pairs is not None:
        found["pairs"] = external.check_pairs(config.data, tell, run.images_path).dump()
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


def generate(run: Run, iteration: int, tell: Reporter) -> None:
    """Search with the last iteration's policy and score every sentence, work item by work item."""
    if run.is_done(iteration, "generate") or external.supplies(run.config, iteration):
        return
    from csr_vlm.generation.selfcheck import self_check

    config = run.config
    started = time.perf_counter()
    engine, scorer = _engine_and_scorer(config, run.adapter_path(iteration - 1), tell)
    self_check(engine.policy, next(run.prompts()))
    total = run.num_prompts
    company = next(tables.prompt_groups(run.prompts_path))
    with tell.stage(f"iteration {iteration}: searching", total) as advance:
        for index, prompts in enumerate(tables.prompt_groups(run.prompts_path)):
            part = run.iteration(iteration) / "ledger" / _part_name(index, prompts, config, iteration)
            if not part.exists():
                # The first prompts stand in where a work item is too small to have others.
                scorer.compare_among([*prompts, *company], config.scorer.others)
                trees = search(
                    prompts,
                    engine.proposer(config.method.search, prompts[0]),
                    scorer.score,
                    config.method,
                    iteration=iteration,
                    seed=config.seed,
                    scorer=config.scorer.used,
                )
                tables.write_nodes(part, [node for tree in trees for node in tree.nodes])
                engine.forget()
                scorer.forget()
            advance(len(prompts))
    fates: Counter[str] = Counter()
    over_length: Counter[str] = Counter()
    for part in run.ledger_parts(iteration):
        nodes = list(tables.read_nodes(part))
        fates.update(node.fate.value for node in nodes)
        over_length.update(scorer.num_over_length([node.sentence for node in nodes if node.sentence]))
    run.mark_done(
        iteration,
        "generate",
        nodes=fates.total(),
        fates=dict(fates),
        sentences_over_length=dict(over_length),
        seconds=_since(started),
    )


def score(run: Run, iteration: int, scorer_config: ScorerConfig, tell: Reporter) -> None:
    """Add a scorer's cosines to every sentence of a ledger, part by part."""
    from csr_vlm.loading import resolve_device
    from csr_vlm.scoring.load import load_scorer

    if not run.is_done(iteration, "generate"):
        raise CsrError(f"iteration {iteration} of {run.root} is not generated", f"csr generate {run.root}")
    device = resolve_device(run.config.model.device)
    scorer = load_scorer(
        scorer_config,
        device,
        run.config.data.max_image_pixels,
        run.config.model,
        run.adapter_path(iteration - 1),
    )
    prompts = {prompt.prompt_id: prompt for prompt in run.prompts()}
    company = next(tables.prompt_groups(run.prompts_path))
    parts = run.ledger_parts(iteration)
    with tell.stage(f"iteration {iteration}: scoring", len(parts)) as advance:
        for part in parts:
            nodes = list(tables.read_nodes(part))
            items = [(prompts[node.prompt_id], node.sentence) for node in nodes if node.sentence]
            own = [prompts[prompt_id] for prompt_id in dict.fromkeys(node.prompt_id for node in nodes)]
            scorer.compare_among([*own, *company], scorer_config.others)
            scores = iter(scorer.score(items))
            tables.write_nodes(
                part, [replace(n, cosines={**n.cosines, **next(scores)}) if n.sentence else n for n in nodes]
            )
            scorer.forget()
            advance(1)


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


def make_pairs(run: Run, iteration: int, tell: Reporter) -> None:
    """Derive the iteration's pairs from its ledger, or take those from outside."""
    if run.is_done(iteration, "pairs"):
        return
    started = time.perf_counter()
    outside = external.supplies(run.config, iteration)
    reasons: Counter[str] = Counter()
    pairs = _pairs_from_outside(run, reasons, tell) if outside else _pairs(run, iteration, run.config, reasons)
    number = tables.write_pairs(run.pairs_path(iteration), pairs)
    if not number and iteration == 1:
        raise CsrError(f"iteration {iteration} has no pairs: {dict(reasons)}", "loosen method.pairs or add prompts")
    asked = asking.ask(run, iteration, tell) if run.config.method.pairs.questions.pattern and not outside else []
    tables.write_pairs(run.questions_path(iteration), asked)
    run.mark_done(
        iteration,
        "pairs",
        pairs=number,
        questions=len(asked),
        prompts_without=dict(reasons),
        **summarise_pairs(tables.read_pairs(run.pairs_path(iteration))),
        seconds=_since(started),
    )


def derive_pairs(run: Run, iteration: int, config: RunConfig) -> tuple[list[Pair], Counter[str]]:
    """Compute pairs under any settings; generation is not repeated.

    Returns:
        The pairs, and why the other prompts have none.
    """
    reasons: Counter[str] = Counter()
    return list(_pairs(run, iteration, config, reasons)), reasons


def _pairs(run: Run, iteration: int, config: RunConfig, reasons: Counter[str]) -> Iterator[Pair]:
    """Yield pairs prompt by prompt, and count in passing why others have none."""
    for prompt, nodes in zip(run.prompts(), ledger(run, iteration), strict=True):
        found = pairs_of(prompt, nodes, config.method, config.scorer.used, config.seed)
        if isinstance(found, str):
            reasons[found] += 1
        else:
            yield from found


def _pairs_from_outside(run: Run, reasons: Counter[str], tell: Reporter) -> list[Pair]:
    pairs, refused = external.take_pairs(run, tell)
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


def ledger(run: Run, iteration: int) -> Iterator[list[Node]]:
    """Yield each prompt's nodes, in the order of the prompts.

    Raises:
        CsrError: The iteration was not generated completely, or what is there is not what was generated.
    """
    if not run.is_done(iteration, "generate"):
        raise CsrError(f"iteration {iteration} of {run.root} is not generated", f"csr generate {run.root}")
    parts, needed = run.ledger_parts(iteration), tables.count_groups(run.prompts_path)
    if len(parts) != needed:
        raise CsrError(
            f"iteration {iteration} of {run.root} has {len(parts)} ledger parts where its prompts make {needed}",
            f"restore them; or delete what is in {run.iteration(iteration) / 'done'} and in ledger/, and run again",
        )
    return _checked_trees(run, parts)


def _checked_trees(run: Run, parts: Sequence[Path]) -> Iterator[list[Node]]:
    for prompts, part in zip(tables.prompt_groups(run.prompts_path), parts, strict=True):
        trees = list(tables.read_trees(part))
        if [prompt.prompt_id for prompt in prompts] != [prompt_id for prompt_id, _ in trees]:
            raise CsrError(f"{part} does not hold the trees of its prompts", "restore it, or generate again")
        yield from (nodes for _, nodes in trees)


def train(run: Run, iteration: int, tell: Reporter) -> None:
    """Run DPO against the last iteration's policy and keep the adapter."""
    if run.is_done(iteration, "train"):
        return
    from csr_vlm.training.callback import count_steps
    from csr_vlm.training.dpo import train as train_dpo

    started = time.perf_counter()
    adapter = run.adapter_path(iteration)
    assert adapter is not None
    with tell.stage(f"iteration {iteration}: training", 0) as advance:
        result = train_dpo(
            [pair for path in run.training_paths(iteration) for pair in tables.read_pairs(path)],
            run.config.model,
            run.config.training,
            previous=run.adapter_path(iteration - 1),
            adapter=adapter,
            work=run.iteration(iteration) / "trainer",
            seed=run.config.seed * 1000 + iteration,
            callbacks=[count_steps(advance)],
        )
    if result["reference"] == "model" and run.config.training.reference == "ledger":
        tell.say(
            f"iteration {iteration}: the ledger's log-probabilities differ by {result['reference_difference']:.3g} "
            "nats from a teacher-forced pass; the reference was computed again"
        )
    if result["packing_obstacle"] is not None:
        tell.say(f"iteration {iteration}: pairs are trained on in rows of their own: {result['packing_obstacle']}")
    run.mark_done(iteration, "train", seconds=_since(started), **result)


def evaluate(run: Run, iteration: int, tell: Reporter, again: bool = False) -> None:
    """Measure the policy after an iteration: on held-out prompts, and whatever the configuration names."""
    if run.is_done(iteration, "evaluate") and not again:
        return
    started = time.perf_counter()
    found = measure(run.config, run.adapter_path(iteration), run.heldout(), policy_name(iteration), tell)
    for name, document in found.items():
        files.write_json(run.evaluation_path(iteration, name), document)
    metrics = {name: document["metrics"] for name, document in found.items()}
    run.mark_done(iteration, "evaluate", **metrics, seconds=_since(started))


def measure(
    config: RunConfig, adapter: Path | None, heldout: list[Prompt], title: str, tell: Reporter
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
    loaded = _engine_and_scorer(config, adapter, tell)
    found = {}
    if heldout:
        found["heldout"] = _evaluate_heldout(config, *loaded, heldout, title, tell)
    if world is not None:
        found["world"] = _evaluate_scenes(world, *loaded, title, tell)
    return found


def evaluate_world(
    config: RunConfig, adapter: Path | None, title: str, tell: Reporter, temperature: float = 0.0
) -> dict[str, Any]:
    """Evaluate a policy on the scenes that the configuration names."""
    world = config.evaluation.world or WorldEvaluationConfig()
    return _evaluate_scenes(world, *_engine_and_scorer(config, adapter, tell), title, tell, temperature)


def _evaluate_heldout(
    config: RunConfig,
    engine: TransformersEngine,
    scorer: ScorerGroup,
    prompts: list[Prompt],
    title: str,
    tell: Reporter,
) -> dict[str, Any]:
    from csr_vlm.evaluation.heldout import evaluate as evaluate_responses

    search_config = config.method.search
    limit = search_config.max_sentences * search_config.max_sentence_tokens
    with tell.stage(f"{title}: answering held-out prompts", len(prompts)) as advance:
        found = evaluate_responses(engine, scorer, prompts, limit, search_config.delimiters)
        advance(len(prompts))
    return found


def _evaluate_scenes(
    world: WorldEvaluationConfig,
    engine: TransformersEngine,
    scorer: ScorerGroup,
    title: str,
    tell: Reporter,
    temperature: float = 0.0,
) -> dict[str, Any]:
    from csr_vlm.world.evaluate import evaluate as evaluate_scenes
    from csr_vlm.world.scenes import Split, world_named

    with tell.stage(f"{title}: evaluating", world.num_scenes) as advance:
        return evaluate_scenes(
            world_named(world.name),
            engine,
            scorer,
            split=Split(world.split),
            seed=world.seed,
            num_scenes=world.num_scenes,
            temperature=temperature,
            tick=advance,
        )


def _engine_and_scorer(
    config: RunConfig, adapter: Path | None, tell: Reporter
) -> tuple[TransformersEngine, ScorerGroup]:
    """Load a policy and the scorer."""
    from csr_vlm.generation.policy import load_policy
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.scoring.load import load_scorer

    policy = load_policy(config.model, adapter, config.data.max_image_pixels)
    scorer = load_scorer(config.scorer, str(policy.device), config.data.max_image_pixels, config.model, adapter)
    return TransformersEngine(policy, config.generation.max_rows, config.generation.attention, tell.say), scorer


def export(run: Run, tell: Reporter) -> None:
    """Put the final adapter, and the merged model if asked for, where users look for them."""
    final = run.root / "adapter"
    if run.final == 0 and run.stopped_at is not None:
        tell.say(f"no iteration of {run.root} passed; the base model stays as it is")
        shutil.rmtree(final, ignore_errors=True)
        return
    files.replace_directory(final, partial(shutil.copytree, run.trained_adapter()))
    if run.config.training.merge and not (run.root / "model").exists():
        from csr_vlm.training.dpo import merge

        tell.say("merging the adapter into the base model")
        merge(run.config.model, final, run.root / "model")


def check_model(config: RunConfig, tell: Reporter) -> float | None:
    """Let a model whose weights are on disk write a few words and score them again.

    Returns:
        The mean difference in nats a token; None where there are no weights or no prompt yet.

    Raises:
        CsrError: The model cannot be loaded, or does not do as it should.
    """
    if not any(Path(config.model.path).glob("*.safetensors")):
        return None
    from csr_vlm.generation.policy import load_policy
    from csr_vlm.generation.selfcheck import self_check

    adapter = None if config.model.adapter is None else Path(config.model.adapter)
    with tempfile.TemporaryDirectory() as images:
        prompt = next(read_prompts(config.data, InputReport(), seed=config.seed, images=Path(images)), None)
        if prompt is None:
            return None
        with tell.stage("checking the model", 1) as advance:
            difference = self_check(load_policy(config.model, adapter, config.data.max_image_pixels), prompt)
            advance(1)
    return difference


def _part_name(index: int, prompts: list[Prompt], config: RunConfig, iteration: int) -> str:
    """Name a work item by its place and by everything that its content depends on."""
    resolved = config.dump()
    content = {
        "prompts": [prompt.prompt_id for prompt in prompts],
        "iteration": iteration,
        **{key: resolved[key] for key in ("seed", "model", "scorer", "method")},
    }
    return f"part-{index:06d}-{files.digest(content)}.parquet"


def _since(started: float) -> float:
    return round(time.perf_counter() - started, 2)
