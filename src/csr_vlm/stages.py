"""The stages of a run. Each reads what the one before wrote and writes its marker last.

Calling a stage that is done does nothing, so going on with a killed run is running it
again. A stage that was killed inside starts over, except that generation keeps the
ledger parts it has.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from csr_vlm.config import RunConfig, ScorerConfig
from csr_vlm.data.prompts import InputReport, count_rows, read_prompts
from csr_vlm.errors import CsrError
from csr_vlm.method.pairs import make_pairs as pairs_of
from csr_vlm.method.search import search
from csr_vlm.progress import Reporter
from csr_vlm.records import Node, Pair, Prompt
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run


def check_inputs(run: Run, tell: Reporter) -> None:
    """Read all prompts, decode every image once, and keep those that passed."""
    if run.is_done(0, "prompts"):
        return
    report = InputReport()
    with tell.stage("checking prompts and images", count_rows(run.config.data)) as advance:
        prompts = list(read_prompts(run.config.data, report, tick=lambda: advance(1)))
    if not prompts:
        raise CsrError(f"no usable prompt in {run.config.data.prompts}", "; ".join(report.examples[:3]))
    tables.write_prompts(run.prompts_path, prompts, run.config.generation.prompts_per_part)
    if report.dropped:
        dropped = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        tell.say(f"dropped {report.dropped.total()} prompts: {dropped}; the manifest names them")
    run.mark_done(0, "prompts", sha256=files.sha256_of(run.prompts_path), **report.dump())


def generate(run: Run, iteration: int, tell: Reporter) -> None:
    """Search with the last iteration's policy and score every sentence, work item by work item."""
    if run.is_done(iteration, "generate"):
        return
    from csr_vlm.generation.policy import load_policy
    from csr_vlm.generation.selfcheck import self_check
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.scoring.clip import ClipScorer

    config = run.config
    started = time.perf_counter()
    policy = load_policy(config.model, run.adapter_path(iteration - 1), config.data.max_image_pixels)
    self_check(policy, next(run.prompts()))
    engine = TransformersEngine(policy, config.generation.max_rows)
    scorer = ClipScorer(config.scorer, str(policy.device), config.data.max_image_pixels)
    total = run.result(0, "prompts")["accepted"]
    with tell.stage(f"iteration {iteration}: searching", total) as advance:
        for index, prompts in enumerate(tables.prompt_groups(run.prompts_path)):
            part = run.iteration(iteration) / "ledger" / _part_name(index, prompts, config, iteration)
            if not part.exists():
                trees = search(
                    prompts,
                    lambda requests: engine.propose(requests, config.method.search),
                    scorer.score,
                    config.method,
                    iteration=iteration,
                    seed=config.seed,
                    scorer=scorer.name,
                )
                tables.write_nodes(part, [node for tree in trees for node in tree.nodes])
                engine.forget()
                scorer.forget()
            advance(len(prompts))
    fates = Counter(node.fate.value for part in run.ledger_parts(iteration) for node in tables.read_nodes(part))
    run.mark_done(
        iteration,
        "generate",
        nodes=fates.total(),
        fates=dict(fates),
        sentences_cut_for_scorer=scorer.num_cut,
        seconds=_since(started),
    )


def score(run: Run, iteration: int, scorer_config: ScorerConfig, tell: Reporter) -> None:
    """Add a scorer's cosines to every sentence of a ledger, part by part."""
    from csr_vlm.loading import resolve_device
    from csr_vlm.scoring.clip import ClipScorer

    if not run.is_done(iteration, "generate"):
        raise CsrError(f"iteration {iteration} of {run.root} is not generated", f"csr generate {run.root}")
    scorer = ClipScorer(scorer_config, resolve_device(run.config.model.device), run.config.data.max_image_pixels)
    prompts = {prompt.prompt_id: prompt for prompt in run.prompts()}
    parts = run.ledger_parts(iteration)
    with tell.stage(f"iteration {iteration}: scoring", len(parts)) as advance:
        for part in parts:
            nodes = list(tables.read_nodes(part))
            items = [(prompts[node.prompt_id], node.sentence) for node in nodes if node.sentence]
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
    """Derive the iteration's pairs from its ledger."""
    if run.is_done(iteration, "pairs"):
        return
    started = time.perf_counter()
    pairs, reasons = derive_pairs(run, iteration, run.config)
    tables.write_pairs(run.pairs_path(iteration), pairs)
    if not pairs:
        raise CsrError(f"iteration {iteration} has no pairs: {dict(reasons)}", "loosen method.pairs or add prompts")
    run.mark_done(
        iteration,
        "pairs",
        pairs=len(pairs),
        prompts_without=dict(reasons),
        **summarise_pairs(pairs),
        seconds=_since(started),
    )


def derive_pairs(run: Run, iteration: int, config: RunConfig) -> tuple[list[Pair], Counter[str]]:
    """Compute pairs under any settings; generation is not repeated.

    Returns:
        The pairs, and why the other prompts have none.
    """
    prompts = run.prompts()
    pairs: list[Pair] = []
    reasons: Counter[str] = Counter()
    for prompt, nodes in zip(prompts, ledger(run, iteration), strict=True):
        found = pairs_of(prompt, nodes, config.method, config.scorer.name, config.seed)
        if isinstance(found, str):
            reasons[found] += 1
        else:
            pairs += found
    return pairs, reasons


def summarise_pairs(pairs: list[Pair]) -> dict[str, float]:
    """Means over pairs that tell whether they are worth training on."""

    def mean(values: list[float]) -> float:
        return round(sum(values) / max(len(values), 1), 4)

    return {
        "margin": mean([pair.margin for pair in pairs]),
        "chosen_reward": mean([pair.chosen.reward for pair in pairs]),
        "rejected_reward": mean([pair.rejected.reward for pair in pairs]),
        "chosen_sentences": mean([pair.chosen.num_sentences for pair in pairs]),
        "rejected_sentences": mean([pair.rejected.num_sentences for pair in pairs]),
        "chosen_longer": mean([float(pair.chosen.num_sentences > pair.rejected.num_sentences) for pair in pairs]),
    }


def ledger(run: Run, iteration: int) -> Iterator[list[Node]]:
    """Yield each prompt's nodes, in the order of the prompts.

    Raises:
        CsrError: The iteration was not generated completely.
    """
    if not run.is_done(iteration, "generate"):
        raise CsrError(f"iteration {iteration} of {run.root} is not generated", f"csr generate {run.root}")
    return (nodes for part in run.ledger_parts(iteration) for _, nodes in tables.read_trees(part))


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
            list(tables.read_pairs(run.pairs_path(iteration))),
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


def evaluate(run: Run, iteration: int, tell: Reporter) -> None:
    """Measure the policy after an iteration, where the configuration asks for it."""
    world = run.config.evaluation.world
    if world is None or run.is_done(iteration, "evaluate"):
        return
    started = time.perf_counter()
    result = evaluate_world(run, iteration, world.num_scenes, world.seed, tell)
    files.write_json(run.evaluation_path(iteration, "world"), result)
    run.mark_done(iteration, "evaluate", world=result["metrics"], seconds=_since(started))


def evaluate_world(
    run: Run, iteration: int, num_scenes: int, seed: int, tell: Reporter, temperature: float = 0.0
) -> dict[str, object]:
    """Evaluate the policy after an iteration (0: the base) on the world's test scenes."""
    from csr_vlm.generation.policy import load_policy
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.scoring.clip import ClipScorer
    from csr_vlm.world.evaluate import evaluate as evaluate_scenes
    from csr_vlm.world.scenes import HARBOUR, Split

    policy = load_policy(run.config.model, run.adapter_path(iteration))
    engine = TransformersEngine(policy, run.config.generation.max_rows)
    scorer = ClipScorer(run.config.scorer, str(policy.device))
    name = f"iteration {iteration}" if iteration else "base model"
    with tell.stage(f"{name}: evaluating", num_scenes) as advance:
        return evaluate_scenes(
            HARBOUR,
            engine,
            scorer,
            split=Split.TEST,
            seed=seed,
            num_scenes=num_scenes,
            temperature=temperature,
            tick=advance,
        )


def export(run: Run, tell: Reporter) -> None:
    """Put the final adapter, and the merged model if asked for, where users look for them."""
    last = run.trained_adapter()
    final = run.root / "adapter"
    files.replace_directory(final, partial(shutil.copytree, last))
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
    prompt = next(read_prompts(config.data, InputReport()), None)
    if prompt is None:
        return None
    from csr_vlm.generation.policy import load_policy
    from csr_vlm.generation.selfcheck import self_check

    adapter = None if config.model.adapter is None else Path(config.model.adapter)
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
