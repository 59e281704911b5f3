"""Use the method from Python: recipes, runs, and single parts on your own images, prompts and scorers.

Every function is a thin layer over what the command line uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm.config.load import load_config, resolve, scorer_config
from csr_vlm.config.schema import DEFAULT_DELIMITERS, DataConfig, RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter, Silent
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.data.images import BadImage, load_image
from csr_vlm.method import pairs as method_pairs
from csr_vlm.method.search import Tree
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.models.prompt_check import ProcessorCheck
    from csr_vlm.scoring.scorer import Scorer

__all__ = ["Recipe", "Run", "ScoredSentence", "make_pairs", "score", "search"]

ImagePath = str | Path


@dataclass(frozen=True)
class Recipe:
    """Hold the validated settings of a run; docs/configuration.md lists them all.

    Example:
        >>> recipe = Recipe.of(
        ...     model={"path": "llava-hf/llava-1.5-7b-hf"},
        ...     scorer={"path": "openai/clip-vit-large-patch14-336"},
        ...     data={"prompts": "photos"},
        ... )
        >>> recipe.config.preset, recipe.changed("method.lambda=0.5").config.method.lambda_
        ('calibrated', 0.5)
    """

    config: RunConfig

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Recipe:
        """Load a YAML file, or a shipped recipe by its name, and apply ``"dotted.key=value"`` overrides.

        Raises:
            CsrError: The file cannot be read, or an option is unknown or out of bounds.
        """
        return cls(load_config(Path(path), overrides))

    @classmethod
    def of(cls, **settings: Any) -> Recipe:
        """Build a recipe from plain data: the content of a recipe file.

        Raises:
            CsrError: An option is missing, unknown or out of bounds.
        """
        return cls(resolve(settings))

    @classmethod
    def demo(cls, out: str | Path, *, seed: int = 0, prompts: int = 256, scenes: int = 1000) -> Recipe:
        """Draw images of the embedded world into ``out`` and return the recipe that ``csr demo`` runs.

        Args:
            out: Directory for the images.
            seed: Random seed of the images and of the run.
            prompts: Number of training images.
            scenes: Number of test scenes.
        """
        from csr_vlm.world.demo import demo_config

        return cls(demo_config(Path(out), seed, prompts, scenes))

    def changed(self, *overrides: str) -> Recipe:
        """Return a copy of this recipe with ``"dotted.key=value"`` overrides applied."""
        return Recipe(load_config(None, overrides, base=self.config.dump()))

    def run(self, out: str | Path, reporter: Reporter | None = None) -> Run:
        """Run the whole method in a directory, or resume the run there; see :func:`csr_vlm.pipeline.loop.align`.

        Args:
            out: Run directory.
            reporter: Receives progress; silent by default.

        Raises:
            CsrError: The directory holds a run with other settings, or a stage cannot be done.
        """
        from csr_vlm.pipeline.loop import align

        run = Run.create(Path(out), self.config)
        align(run, reporter or Silent())
        return run


@dataclass(frozen=True)
class ScoredSentence:
    """Represent a sentence and its relevance to an image."""

    text: str
    cosine: float
    """cos(F_I(image), F_T(sentence)), in -1..1; R_I (eq. 3) is max(100 * cosine, 0)."""


def score(
    captions: Iterable[tuple[ImagePath, str]],
    scorer: str | Scorer,
    *,
    device: str = "auto",
    delimiters: str = DEFAULT_DELIMITERS,
) -> list[list[ScoredSentence]]:
    """Split captions into sentences and score each sentence against the caption's image.

    Args:
        captions: Pairs of (image path, caption).
        scorer: Directory or hub id as in ``scorer.path``, or your own scorer object.
        device: Torch device; auto selects cuda if available.
        delimiters: Characters that end a sentence.

    Returns:
        The scored sentences of each caption.

    Raises:
        CsrError: An image cannot be read or the scorer cannot be loaded.
    """
    from csr_vlm.method.sentences import SentenceRule
    from csr_vlm.models.devices import resolve_device
    from csr_vlm.scoring.registry import load_scorer
    from csr_vlm.scoring.scorer import ScorerGroup

    prompts = _prompts(captions, DataConfig.model_fields["max_image_pixels"].default)
    rule = SentenceRule(delimiters)
    sentences_by_caption = [list(rule.cut(prompt.text)) for prompt in prompts]
    if isinstance(scorer, str):
        group = load_scorer(scorer_config(path=scorer), resolve_device(device))
    else:
        group = ScorerGroup([scorer])
    items = [
        (prompt, sentence)
        for prompt, sentences in zip(prompts, sentences_by_caption, strict=True)
        for sentence in sentences
    ]
    cosines = iter(row[group.name] for row in group.score(items))
    return [[ScoredSentence(sentence, next(cosines)) for sentence in sentences] for sentences in sentences_by_caption]


def search(
    prompts: Iterable[Prompt | tuple[ImagePath, str]],
    recipe: Recipe,
    *,
    adapter: str | Path | None = None,
    scorer: Scorer | None = None,
    reporter: Reporter | None = None,
) -> list[Tree]:
    """Search a policy's responses to your own prompts, sentence by sentence (section 3.2.1).

    Args:
        prompts: Prompts, or pairs of (image path, question).
        recipe: Settings of model, scorer and search; its data is not read.
        adapter: LoRA on the model, such as ``run.trained_adapter()``; ``model.adapter`` by default.
        scorer: Your own scorer in place of the recipe's; its name must be the recipe's ``scorer.name``.
        reporter: Receives log lines; silent by default.

    Returns:
        One tree per prompt, with every node and its measurements.

    Raises:
        CsrError: An image cannot be read, a model cannot be loaded, or its processor refuses a prompt.
    """
    from csr_vlm.models.prompt_check import ProcessorCheck
    from csr_vlm.pipeline import tasks
    from csr_vlm.scoring.scorer import ScorerGroup

    config = recipe.config
    checked_prompts = _prompts(prompts, config.data.max_image_pixels)
    if scorer is not None and scorer.name != config.scorer.used:
        raise CsrError(
            f"the scorer's name is {scorer.name!r}, but the recipe uses {config.scorer.used!r}",
            f'recipe.changed("scorer.name={scorer.name}")',
        )
    adapter = config.model.adapter if adapter is None else adapter
    adapter_path = None if adapter is None else Path(adapter)
    engine, group = tasks.load_engine_and_scorer(config, adapter_path, (reporter or Silent()).log)
    if scorer is not None:
        group = ScorerGroup([scorer])
    _require_accepted(checked_prompts, ProcessorCheck(engine.policy.prompt_encoder))
    return tasks.search_trees(checked_prompts, checked_prompts, engine, group, config, iteration=1)


def _require_accepted(prompts: Iterable[Prompt], check: ProcessorCheck) -> None:
    """Verify that the model's processor accepts all prompts.

    Raises:
        CsrError: It refuses one.
    """
    for prompt in prompts:
        problem = check.problem_of(prompt)
        if problem is not None:
            raise CsrError(f"prompt {prompt.prompt_id} cannot be used: {problem}: {problem.detail}", "leave it out")


def make_pairs(
    source: Run | Sequence[Tree], recipe: Recipe | None = None, *, iteration: int | None = None
) -> list[Pair]:
    """Derive preference pairs (section 3.2.2) from a ledger, without generating again.

    Args:
        source: A run, or trees from :func:`search`.
        recipe: Settings of reward and pairs; by default those of the run. Required for trees.
        iteration: Iteration of the run's ledger; the last one generated by default.

    Raises:
        CsrError: The run has no such ledger, or it lacks a score that the settings use.
    """
    if isinstance(source, Run):
        from csr_vlm.pipeline import stages

        number = iteration or max(source.iterations_done("generate"), default=1)
        return stages.derive_pairs(source, number, (recipe or Recipe(source.config)).config)[0]
    if recipe is None:
        raise CsrError("trees have no settings of their own", "pass the recipe: make_pairs(trees, recipe)")
    config = recipe.config
    pairs_or_reasons = [
        method_pairs.make_pairs(tree.prompt, tree.nodes, config.method, config.scorer.used, config.seed)
        for tree in source
    ]
    return [pair for pairs in pairs_or_reasons if not isinstance(pairs, str) for pair in pairs]


def _prompts(items: Iterable[Prompt | tuple[ImagePath, str]], max_pixels: int) -> list[Prompt]:
    """Convert pairs to prompts with numbers as ids, and decode every image once.

    Raises:
        CsrError: An image cannot be used.
    """
    prompts = [
        item if isinstance(item, Prompt) else Prompt(str(number), str(item[0]), item[1])
        for number, item in enumerate(items)
    ]
    for prompt in prompts:
        try:
            load_image(prompt.image, max_pixels)
        except BadImage as error:
            raise CsrError(f"the image {prompt.image} cannot be used: {error}", "check the path and the file") from None
    return prompts
