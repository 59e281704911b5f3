"""Define the work that a run's processes share: search, scoring, claim questions and training.

Any process can build these workers by name (see :mod:`csr_vlm.scale.executor`); they read and write
the run directory alone.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm.config.load import scorer_config
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.memory import free_memory
from csr_vlm.core.progress import Progress
from csr_vlm.core.records import Node, Prompt
from csr_vlm.method.search import Proposer, Score, ScoreClaims, Search, Tree, search
from csr_vlm.pipeline.claim_questions import ClaimQuestioner
from csr_vlm.pipeline.earlier_claims import EarlierClaims
from csr_vlm.pipeline.failed_prompts import (
    is_of_one_prompt,
    is_out_of_memory,
    require_few_failures,
    search_or_drop,
)
from csr_vlm.pipeline.item_stream import ItemStream, OpenItem
from csr_vlm.scale.executor import ItemResult
from csr_vlm.scoring.scorer import ScorerGroup, with_gray_image
from csr_vlm.store import files, ledger, parts, tables
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.generation.engines import Engine
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.scoring.claim_scorer import ClaimScorer


_ITEMS_BETWEEN_CLEARING = 64
"""Items of a stream after which the scorers' cached images are dropped, so that memory does not grow."""


class SearchWorker:
    """Search with the previous iteration's policy. An item is a group of prompts and becomes a ledger part."""

    def __init__(self, root: Path, iteration: int, log: Callable[[str], None]) -> None:
        from csr_vlm.generation.engines import open_engine
        from csr_vlm.models.devices import device_name

        self._run = Run.open(root).settled()
        self._iteration = iteration
        self._groups = tables.PromptGroups(self._run.prompts_path)
        self._filler_prompts = self._groups[0]
        self._log, self._failed, self._num_opened = log, dict[str, str](), 0
        config, adapter = self._run.config, self._run.adapter_path(iteration - 1)
        self._device = device_name(config.model.device)
        self._scorer = load_run_scorer(config, adapter)
        self._earlier = EarlierClaims(self._run, iteration)
        self._resources = ExitStack()
        # Runs of version 0.1 may begin with a prompt that the processor refuses.
        example = next(usable_prompts(self._filler_prompts, config), self._filler_prompts[0])
        self._engine = self._resources.enter_context(open_engine(config, adapter, example, log))

    def run_items(self, items: Iterator[int]) -> Iterator[ItemResult]:
        """Write the ledger parts of groups, several at once where the engine gains from it.

        Raises:
            CsrError: More prompts failed than ``data.max_failed_share`` allows.
        """
        across = self._run.config.generation.across_items
        if across == "off" or (across == "auto" and not self._engine.gains_from_more_prompts):
            yield from map(self.run_item, items)
            return
        stream = ItemStream(self._begin)
        while True:
            while stream.wants_item() and (item := next(items, None)) is not None:
                if self._part(item).exists():
                    yield self.run_item(item)
                else:
                    stream.add(self._open(item))
            if stream.is_idle:
                break
            yield from self._advance(stream)
        self._engine.forget()
        self._scorer.forget()

    def run_item(self, item: int) -> ItemResult:
        """Write the ledger part of a group unless it exists; count its prompts and node statuses.

        Raises:
            CsrError: More prompts failed than ``data.max_failed_share`` allows.
        """
        prompts, part = self._groups[item], self._part(item)
        if not part.exists():
            earlier = self._earlier.of(item, prompts)
            trees, failed = search_or_drop(prompts, lambda some: self._search(some, prompts, earlier))
            return self._finish(item, trees, failed)
        failures = self._run.failures_path(self._iteration, item)
        self._failed |= files.read_document(failures) if failures.exists() else {}
        return self._result(item, list(tables.read_nodes(part)))

    def _part(self, item: int) -> Path:
        folder = self._run.iteration(self._iteration) / "ledger"
        return folder / part_name(item, self._groups[item], self._run.config, self._iteration)

    def _finish(self, item: int, trees: Sequence[Tree], failed: dict[str, str]) -> ItemResult:
        """Write the part of an item that was searched."""
        self._note(failed, self._run.failures_path(self._iteration, item))
        nodes = [node for tree in trees for node in tree.nodes]
        tables.write_nodes(self._part(item), nodes)
        return self._result(item, nodes)

    def _result(self, item: int, nodes: Sequence[Node]) -> ItemResult:
        num_prompts = len(self._groups[item])
        sentences = [node.sentence for node in nodes if node.sentence]
        tally = {
            "statuses": Counter(node.status.value for node in nodes),
            "tokens": Counter(generated=sum(len(node.token_ids) for node in nodes)),
            "sentences_over_length": Counter(self._scorer.num_over_length(sentences)),
            "devices": Counter({self._device: num_prompts}),
            "workers": Counter({f"{socket.gethostname()}:{os.getpid()}": num_prompts}),
        }
        return ItemResult(num_prompts, tally)

    def _search(
        self, prompts: Sequence[Prompt], group: Sequence[Prompt], earlier: Mapping[tuple[str, str], int] | None
    ) -> list[Tree]:
        fillers, engine, config = self._filler_prompts, self._engine, self._run.config
        while True:
            try:
                return search_trees(
                    prompts, fillers, engine, self._scorer, config, self._iteration, group=group, earlier=earlier
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error.with_traceback(None)  # a traceback holds the tensors of the search
            self._shrink(failure)

    def _begin(self, example: Prompt, score: Score, score_claims: ScoreClaims | None) -> tuple[Search, Proposer]:
        config = self._run.config
        proposer = self._engine.proposer(config.method.search, example)
        search = Search(
            proposer,
            score,
            config.method,
            iteration=self._iteration,
            seed=config.seed,
            scorer=config.scorer.used,
            score_claims=score_claims,
        )
        return search, proposer

    def _open(self, item: int) -> OpenItem:
        """Prepare an item for the stream, with negative images of its own."""
        prompts, config = self._groups[item], self._run.config
        if self._num_opened % _ITEMS_BETWEEN_CLEARING == 0:
            self._scorer.forget()
        self._num_opened += 1
        scorer = ScorerGroup(self._scorer.scorers)
        scorer.set_negative_images(with_gray_image([*prompts, *self._filler_prompts]), config.scorer.others)
        claims = claim_scorer(scorer, config, self._earlier.of(item, prompts))
        return OpenItem(item, prompts, scorer.score, claims)

    def _advance(self, stream: ItemStream) -> Iterator[ItemResult]:
        """Grow the trees of the stream; write the parts that ended."""
        try:
            ended = list(stream.step())
        except Exception as error:
            if not is_out_of_memory(error) and not is_of_one_prompt(error):
                raise
            failure = error.with_traceback(None)
        else:
            for opened in ended:
                yield self._finish(opened.item, opened.trees(), {})
            return
        unfinished = stream.abandon()
        self._engine.forget()
        if is_out_of_memory(failure):
            self._shrink(failure)
            for opened in unfinished:
                stream.add(self._open(opened.item))
        else:  # Item by item, the prompt at fault is found.
            for opened in unfinished:
                yield self.run_item(opened.item)

    def _shrink(self, failure: Exception) -> None:
        """Decode fewer rows from now on.

        Raises:
            Exception: The failure, if the engine cannot.
        """
        num_rows = self._engine.shrink()
        if num_rows is None:
            raise failure
        free_memory()
        self._log(f"out of memory in the search: at most {num_rows} rows are decoded at once from now on")

    def _note(self, failed: dict[str, str], path: Path) -> None:
        """Store the prompts of an item that failed, before its part; nothing remains of an earlier attempt.

        Raises:
            CsrError: Too many failed.
        """
        self._failed |= failed
        for prompt_id, reason in failed.items():
            self._log(f"prompt {prompt_id} failed in the search and is dropped: {reason}")
        require_few_failures(self._run, self._failed, self._iteration)
        path.unlink(missing_ok=True)
        if failed:
            files.write_json(path, failed)

    def close(self) -> None:
        """Free the engine."""
        self._resources.close()


class RescoreWorker:
    """Add a scorer's cosines to every sentence of a ledger. An item is a ledger part."""

    def __init__(self, root: Path, iteration: int, scorer: Mapping[str, Any], log: Callable[[str], None]) -> None:
        run = Run.open(root)
        self._config = run.config.model_copy(update={"scorer": scorer_config(**scorer)})
        self._scorer = load_run_scorer(self._config, run.adapter_path(iteration - 1))
        groups = list(tables.prompt_groups(run.prompts_path))
        self._prompts = {prompt.prompt_id: (number, prompt) for number, group in enumerate(groups) for prompt in group}
        self._filler_prompts = groups[0]
        self._parts = run.ledger_parts(iteration)

    def run_item(self, item: int) -> ItemResult:
        """Rewrite a part with the new cosines."""
        part = self._parts[item]
        groups = groupby(tables.read_nodes(part), key=lambda node: self._prompts[node.prompt_id][0])
        tables.write_nodes(part, (node for _, nodes in groups for node in self._scored(list(nodes))))
        return ItemResult(1, {})

    def _scored(self, nodes: Sequence[Node]) -> Iterator[Node]:
        """Score the nodes of one group of prompts, whose images are each other's negatives."""
        items = [(self._prompts[node.prompt_id][1], node.sentence) for node in nodes if node.sentence]
        prompts = [self._prompts[prompt_id][1] for prompt_id in dict.fromkeys(node.prompt_id for node in nodes)]
        negatives = with_gray_image([*prompts, *self._filler_prompts])
        self._scorer.set_negative_images(negatives, self._config.scorer.others)
        scores = iter(self._scorer.score(items))
        score_claims = claim_scorer(self._scorer, self._config)
        claims = iter(score_claims(items) if score_claims else [{}] * len(items))
        for node in nodes:
            if node.sentence:
                found = {claim: {**node.claims.get(claim, {}), **new} for claim, new in next(claims).items()}
                yield replace(node, cosines={**node.cosines, **next(scores)}, claims={**node.claims, **found})
            else:
                yield node
        self._scorer.forget()

    def close(self) -> None:
        """Free the scorer's embeddings."""
        self._scorer.forget()


class QuestionWorker:
    """Ask the previous policy about its claims. An item is a group of prompts and becomes a file of pairs."""

    def __init__(self, root: Path, iteration: int, log: Callable[[str], None]) -> None:
        run = Run.open(root)
        engine, scorer = load_engine_and_scorer(run.config, run.adapter_path(iteration - 1), log)
        self._groups = tables.PromptGroups(run.prompts_path)
        self._questioner = ClaimQuestioner(run.config, engine.policy, scorer, iteration, self._groups[0])
        self._ledger_part = {
            item: part for part in ledger.complete_parts(run, iteration) for item in parts.items_of(part)
        }
        self._folder, self._root = run.question_parts(iteration), run.root
        self._failed = run.failed_prompts(iteration)

    def run_item(self, item: int) -> ItemResult:
        """Write the question pairs of a group unless they exist."""
        prompts, path = self._groups[item], self._folder / f"part-{item:06d}.parquet"
        if not path.exists():
            trees = ledger.trees_of(self._ledger_part[item], prompts, self._failed)
            tables.write_pairs(path, self._questioner.pairs(prompts, trees), self._root)
        return ItemResult(len(prompts), {})

    def close(self) -> None:
        """Do nothing: the worker holds no resources beyond its models."""


def usable_prompts(prompts: Iterable[Prompt], config: RunConfig) -> Iterator[Prompt]:
    """Yield the prompts that the model's processor accepts; version 0.1 checked inputs without it.

    Raises:
        CsrError: The processor cannot be loaded, or an image was deleted or changed since it was checked.
    """
    from csr_vlm.models.prompt_check import ProcessorCheck

    check = ProcessorCheck.of_run(config)
    return (prompt for prompt in prompts if check.problem_of(prompt) is None)


def search_trees(
    prompts: Sequence[Prompt],
    filler_prompts: Sequence[Prompt],
    engine: Engine,
    scorer: ScorerGroup,
    config: RunConfig,
    iteration: int,
    *,
    group: Sequence[Prompt] | None = None,
    earlier: Mapping[tuple[str, str], int] | None = None,
) -> list[Tree]:
    """Search the responses to a group of prompts (section 3.2.1) and score every sentence.

    Args:
        prompts: The prompts to respond to.
        filler_prompts: Prompts whose images serve as negatives if the group is too small to supply them.
        engine: Proposes sentences with the policy.
        scorer: Scores sentences against images.
        config: Settings of search and method, and the seed.
        iteration: Iteration of the ledger.
        group: Prompts whose images are each other's negatives; by default those to respond to.
        earlier: Number of sampled sentences of the iterations before, by prompt and claimed thing; None in the first.

    Returns:
        One tree per prompt.
    """
    negatives = with_gray_image([*(group or prompts), *filler_prompts])
    scorer.set_negative_images(negatives, config.scorer.others)
    try:
        return search(
            prompts,
            engine.proposer(config.method.search, prompts[0]),
            scorer.score,
            config.method,
            iteration=iteration,
            seed=config.seed,
            scorer=config.scorer.used,
            score_claims=claim_scorer(scorer, config, earlier),
        )
    finally:
        engine.forget()
        scorer.forget()


def claim_scorer(
    scorer: ScorerGroup, config: RunConfig, earlier: Mapping[tuple[str, str], int] | None = None
) -> ClaimScorer | None:
    """Return what finds and scores the claims of sentences; None if the settings do not use claims."""
    from csr_vlm.scoring.claim_scorer import ClaimScorer

    return ClaimScorer(scorer, config.method.claims, earlier) if config.method.uses_claims else None


def train_policy(root: Path, iteration: int, processes: int, progress: Progress) -> dict[str, Any]:
    """Run DPO with the previous iteration's policy as reference; all processes of a run call this together.

    Returns:
        Training log and counts, as :func:`csr_vlm.training.dpo.train` reports them.
    """
    from csr_vlm.training.callback import count_steps
    from csr_vlm.training.dpo import train

    run = Run.open(root)
    adapter = run.adapter_path(iteration)
    assert adapter is not None
    return train(
        run.training_paths(iteration),
        run.config.model,
        run.config.training,
        previous=run.adapter_path(iteration - 1),
        adapter=adapter,
        work=run.trainer_path(iteration),
        seed=run.config.seed * 1000 + iteration,
        callbacks=[count_steps(progress)],
        processes=processes,
        max_image_pixels=run.config.data.max_image_pixels,
    )


WORKERS = (SearchWorker, RescoreWorker, QuestionWorker, train_policy)
"""Everything that a task may name."""


def load_engine_and_scorer(
    config: RunConfig, adapter: Path | None, log: Callable[[str], None]
) -> tuple[TransformersEngine, ScorerGroup]:
    """Load the transformers engine of a policy, and the scorer."""
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.models.loading import load_policy

    policy = load_policy(config.model, adapter, config.data.max_image_pixels)
    engine = TransformersEngine(policy, config.generation.max_rows, config.generation.attention, log)
    return engine, load_run_scorer(config, adapter)


def load_run_scorer(config: RunConfig, adapter: Path | None) -> ScorerGroup:
    """Load the scorer that a configuration names; a self-judging scorer uses the policy with this adapter."""
    from csr_vlm.models.devices import resolve_device
    from csr_vlm.scoring.registry import load_scorer

    device = resolve_device(config.model.device)
    return load_scorer(config.scorer, device, config.data.max_image_pixels, config.model, adapter)


def part_name(index: int, prompts: Sequence[Prompt], config: RunConfig, iteration: int) -> str:
    """Name a ledger part by its index and by a digest of everything that its content depends on."""
    resolved = config.dump()
    content = {
        "prompts": [prompt.prompt_id for prompt in prompts],
        "iteration": iteration,
        **{key: resolved[key] for key in ("seed", "model", "scorer", "method")},
        # vLLM samples differently from transformers, in this process and behind a server alike.
        **({"engine": "vllm"} if config.generation.engine in ("vllm", "server") else {}),
    }
    return parts.part_name(index, files.digest(content))
