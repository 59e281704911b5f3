"""The method from Python: recipes, runs, and single parts on pictures, prompts and scorers of one's own.

Everything here is a few lines on top of what the command line uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csr_vlm.config.load import load_config, resolve, scorer_config
from csr_vlm.config.schema import DataConfig, RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Reporter, Silent
from csr_vlm.core.records import Pair, Prompt
from csr_vlm.data.images import BadImage, load_image
from csr_vlm.method import pairs as method_pairs
from csr_vlm.method.search import Tree
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.scoring.scorer import Scorer

__all__ = ["Recipe", "Run", "Scored", "make_pairs", "score", "search"]

Picture = str | Path


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, checked; docs/configuration.md lists them all.

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
        """Read a YAML file, with ``"dotted.key=value"`` on top.

        Raises:
            CsrError: It cannot be read, or an option is unknown or out of bounds.
        """
        return cls(load_config(Path(path), overrides))

    @classmethod
    def of(cls, **settings: Any) -> Recipe:
        """Take the settings as plain data: what a recipe file would hold.

        Raises:
            CsrError: An option is missing, unknown or out of bounds.
        """
        return cls(resolve(settings))

    @classmethod
    def demo(cls, out: str | Path, *, seed: int = 0, prompts: int = 256, scenes: int = 1000) -> Recipe:
        """Draw pictures of the embedded world into ``out`` and return what ``csr demo`` runs on them.

        Args:
            seed: Of the pictures and of the run.
            prompts: Pictures to learn from.
            scenes: Test scenes.
        """
        from csr_vlm.world.demo import demo_config

        return cls(demo_config(Path(out), seed, prompts, scenes))

    def changed(self, *overrides: str) -> Recipe:
        """Return another recipe with ``"dotted.key=value"`` on top of this one."""
        return Recipe(load_config(None, overrides, base=self.config.dump()))

    def run(self, out: str | Path, reporter: Reporter | None = None) -> Run:
        """Run the whole method in a directory, or go on with what is there; see :func:`csr_vlm.pipeline.loop.align`.

        Args:
            tell: What hears of the progress; nobody by default.

        Raises:
            CsrError: The directory holds a run with other settings, or something a user can mend went wrong.
        """
        from csr_vlm.pipeline.loop import align

        run = Run.create(Path(out), self.config)
        align(run, reporter or Silent())
        return run


@dataclass(frozen=True)
class Scored:
    """A sentence and how well it suits a picture."""

    text: str
    cosine: float
    """cos(F_I(picture), F_T(sentence)), in -1..1; R_I (eq. 3) is 100 times that, or 0 where it is negative."""


def score(
    captions: Iterable[tuple[Picture, str]], scorer: str | Scorer, *, device: str = "auto", delimiters: str = "."
) -> list[list[Scored]]:
    """Cut captions into sentences and score each against its picture.

    Args:
        captions: (picture, caption) each.
        scorer: A directory or hub id as in ``scorer.path``, or a scorer object of your own.
        device: Torch device; auto takes cuda where there is one.
        delimiters: Characters that end a sentence.

    Returns:
        For each caption its sentences.

    Raises:
        CsrError: A picture cannot be read or the scorer cannot be loaded.
    """
    from csr_vlm.method.sentences import SentenceRule
    from csr_vlm.models.devices import resolve_device
    from csr_vlm.scoring.registry import load_scorer
    from csr_vlm.scoring.scorer import ScorerGroup

    asked = _prompts(captions, DataConfig.model_fields["max_image_pixels"].default)
    rule = SentenceRule(delimiters)
    sentences = [list(rule.cut(prompt.text)) for prompt in asked]
    if isinstance(scorer, str):
        group = load_scorer(scorer_config(path=scorer), resolve_device(device))
    else:
        group = ScorerGroup([scorer])
    items = [(prompt, sentence) for prompt, own in zip(asked, sentences, strict=True) for sentence in own]
    cosines = iter(row[group.name] for row in group.score(items))
    return [[Scored(sentence, next(cosines)) for sentence in own] for own in sentences]


def search(
    prompts: Iterable[Prompt | tuple[Picture, str]],
    recipe: Recipe,
    *,
    adapter: str | Path | None = None,
    scorer: Scorer | None = None,
    reporter: Reporter | None = None,
) -> list[Tree]:
    """Search the responses of a policy to prompts of your own, sentence by sentence (section 3.2.1).

    Args:
        prompts: (picture, question) each.
        recipe: Names model, scorer and search; its data is not read.
        adapter: LoRA on the model, such as ``run.trained_adapter()``; ``model.adapter`` by default.
        scorer: One of your own in place of the recipe's, called as ``scorer.name`` there.
        tell: What hears of the progress.

    Returns:
        One tree a prompt, with every node and everything measured about it.

    Raises:
        CsrError: A picture cannot be read, or a model cannot be loaded.
    """
    from csr_vlm.pipeline import tasks
    from csr_vlm.scoring.scorer import ScorerGroup

    config = recipe.config
    asked = _prompts(prompts, config.data.max_image_pixels)
    if scorer is not None and scorer.name != config.scorer.used:
        raise CsrError(
            f"the scorer calls itself {scorer.name!r}, and the recipe goes by {config.scorer.used!r}",
            f'recipe.changed("scorer.name={scorer.name}")',
        )
    own = config.model.adapter if adapter is None else adapter
    engine, group = tasks.engine_and_scorer(config, None if own is None else Path(own), (reporter or Silent()).log)
    if scorer is not None:
        group = ScorerGroup([scorer])
    return tasks.search_trees(asked, asked, engine, group, config, iteration=1)


def make_pairs(
    source: Run | Sequence[Tree], recipe: Recipe | None = None, *, iteration: int | None = None
) -> list[Pair]:
    """Derive preference pairs (section 3.2.2) from a ledger; nothing is generated again.

    Args:
        source: A run, or what :func:`search` found.
        recipe: Settings of the reward and of the pairs; a run's own by default.
        iteration: Whose ledger; the last one generated by default.

    Raises:
        CsrError: The run has no such ledger, or it lacks a score that the settings ask for.
    """
    if isinstance(source, Run):
        from csr_vlm.pipeline import stages

        number = iteration or max(source.iterations_done("generate"), default=1)
        return stages.derive_pairs(source, number, (recipe or Recipe(source.config)).config)[0]
    if recipe is None:
        raise CsrError("trees of a search know no settings", "give the recipe: make_pairs(trees, recipe)")
    config = recipe.config
    found = [
        method_pairs.make_pairs(tree.prompt, tree.nodes, config.method, config.scorer.used, config.seed)
        for tree in source
    ]
    return [pair for pairs in found if not isinstance(pairs, str) for pair in pairs]


def _prompts(given: Iterable[Prompt | tuple[Picture, str]], max_pixels: int) -> list[Prompt]:
    """Number what comes without ids, and look at every picture once.

    Raises:
        CsrError: A picture cannot be used.
    """
    prompts = [
        item if isinstance(item, Prompt) else Prompt(str(number), str(item[0]), item[1])
        for number, item in enumerate(given)
    ]
    for prompt in prompts:
        try:
            load_image(prompt.image, max_pixels)
        except BadImage as error:
            raise CsrError(
                f"the picture {prompt.image} cannot be used: {error}", "check the path and the file"
            ) from None
    return prompts
