"""Export the pairs of an iteration: what it trained on, or whole responses in place of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import plural
from csr_vlm.core.records import Pair
from csr_vlm.data.images import require_same_image
from csr_vlm.data.pair_export import both_end, needs_template, write_pairs
from csr_vlm.data.preference import FormattedPair
from csr_vlm.data.sources import PAIR_FORMATS
from csr_vlm.method.sentences import SentenceRule
from csr_vlm.pipeline.offline_pairs import has_offline_pairs
from csr_vlm.pipeline.stages import whole_response_pairs
from csr_vlm.report.card import public_name
from csr_vlm.report.dataset_card import ExportedData, write_dataset_card
from csr_vlm.store import tables
from csr_vlm.store.run import Run


@dataclass(frozen=True)
class Selection:
    """Hold the pairs of an iteration that an export writes, and the numbers of those that it leaves out."""

    iteration: int
    format: str
    kind: str
    """What the pairs are: sibling, whole-response, random or external."""
    pairs: Callable[[], Iterator[Pair]]
    """Return all pairs to write, question pairs last."""
    num_pairs: int
    num_questions: int
    num_asking: int
    """Pairs whose prompt asks for the next sentence, because the trainer ends every response."""
    replaced: str
    """The pairs of the iteration in whose place others are written, such as ``574 sibling pairs``; else empty."""
    questions_left_out: int
    described: bool
    """Whether some responses do not end."""

    def summary(self) -> list[str]:
        """Return what is written and what is not, for people."""
        written = plural(self.num_pairs, f"{self.kind} pair")
        if self.num_questions:
            written += f" and {plural(self.num_questions, 'question pair')}"
        if self.replaced:
            written += f" in place of {self.replaced}"
        if self.questions_left_out:
            written += f"; {plural(self.questions_left_out, 'question pair')} left out"
        lines = [f"exported {written} of iteration {self.iteration}"]
        others = ", ".join(name for name, module in PAIR_FORMATS.items() if not module.ENDS_EVERY_RESPONSE)
        if self.num_asking:
            lines.append(
                f"{self.format} ends every response, and those of {plural(self.num_asking, 'pair')} go on: their "
                f"prompts hold the context and ask for the next sentence; {others} keep the prompt"
            )
        return lines


def export_pairs(
    run: Run,
    iteration: int | None,
    format_name: str,
    out: Path,
    *,
    whole_responses: bool = False,
    copy_images: bool = False,
    base_model: str | None = None,
) -> tuple[Path, Selection]:
    """Write the pairs of an iteration and a dataset card; see :func:`csr_vlm.data.pair_export.write_pairs`.

    Args:
        run: A run.
        iteration: Iteration of the pairs; None for the last one that has pairs.
        format_name: Key of :data:`csr_vlm.data.sources.PAIR_FORMATS`.
        out: Folder for the files.
        whole_responses: Write pairs of whole responses from the same ledger, and no question pairs.
        copy_images: Put the images into the file or beside it.
        base_model: Id of the policy on the hub, if the run has it as a folder.

    Returns:
        The main file, and what was written.

    Raises:
        CsrError: The iteration has no pairs, an image was changed, or ``out`` cannot be written to.
    """
    number = iteration or max(run.iterations_done("pairs"), default=0)
    if not run.is_done(number, "pairs"):
        raise CsrError(f"iteration {number or 1} of {run.root} has no pairs", f"csr pairs {run.root}")
    config, selection = run.config, _select(run, number, format_name, whole_responses)
    for prompt in {pair.prompt.image: pair.prompt for pair in selection.pairs()}.values():
        require_same_image(prompt)
    formats = needs_template(format_name, selection.described)
    written = write_pairs(
        selection.pairs(),
        format_name,
        out,
        copy_images=copy_images,
        origin=public_name(config.model.path, base_model),
        rule=SentenceRule(config.method.search.delimiters),
        max_image_pixels=config.data.max_image_pixels,
        described=selection.described,
        to_template=_TemplateFormatter(config) if formats else None,
    )
    exported = ExportedData(
        iteration=number,
        format=format_name,
        file=written,
        kind=selection.kind,
        num_pairs=selection.num_pairs,
        num_questions=selection.num_questions,
        described=selection.described,
    )
    write_dataset_card(run, exported, out, base_model)
    return written, selection


def _select(run: Run, iteration: int, format_name: str, whole_responses: bool) -> Selection:
    """Choose the pairs to write and count them.

    Raises:
        CsrError: There are none, or a file of them is missing or was changed.
    """
    paths = run.training_paths(iteration)
    num_questions = sum(map(tables.count_rows, paths[1:]))
    kind, replaced = _kind(run.config, iteration), ""
    own: Callable[[], Iterator[Pair]] = lambda: tables.read_pairs(paths[0])  # noqa: E731
    if whole_responses:
        whole = whole_response_pairs(run, iteration)
        if not all(map(both_end, own())):
            replaced = plural(tables.count_rows(paths[0]), f"{kind} pair")
            kind = "whole-response"
        own = lambda: iter(whole)  # noqa: E731
    questions = [] if whole_responses else paths[1:]

    def every() -> Iterator[Pair]:
        return chain(own(), *map(tables.read_pairs, questions))

    asks = PAIR_FORMATS[format_name].ENDS_EVERY_RESPONSE
    return Selection(
        iteration=iteration,
        format=format_name,
        kind=kind,
        pairs=every,
        num_pairs=sum(1 for _ in own()),
        num_questions=0 if whole_responses else num_questions,
        num_asking=sum(asks and not both_end(pair) for pair in own()),
        replaced=replaced,
        questions_left_out=num_questions if whole_responses else 0,
        described=not all(map(both_end, every())),
    )


def _kind(config: RunConfig, iteration: int) -> str:
    if has_offline_pairs(config, iteration):
        return "external"
    if config.method.pairs.selection == "random":
        return "random"
    return "sibling" if config.method.pairs.between == "siblings" else "whole-response"


class _TemplateFormatter:
    """Format pairs in the policy's chat template, so that their tokens are those that the policy sampled.

    Raises:
        CsrError: The policy's processor cannot be loaded, or the model has no chat template.
    """

    def __init__(self, config: RunConfig) -> None:
        from csr_vlm.models.loading import load_prompt_encoder

        self._encoder = load_prompt_encoder(config.model, config.data.max_image_pixels)
        if not self._encoder.family.chat:
            raise CsrError(
                f"{config.model.path} has no chat template, which TRL needs", "use --format sentinel or --format swift"
            )

    def __call__(self, pair: Pair, context: str) -> FormattedPair:
        prompt, wants_start = self._encoder.format_prompt(pair.prompt.text)
        tokenizer = self._encoder.tokenizer
        if wants_start and self._ids("", special=True)[:1] == [tokenizer.bos_token_id]:
            prompt = tokenizer.bos_token + prompt  # TRL's tokenizer adds none
        sides = [self._body(side.token_ids) for side in (pair.chosen, pair.rejected)]
        # Templates differ in whether the first word of a response brings its space along.
        fits = [lead for lead in ("", " ") if self._ends_with(prompt + lead + pair.chosen.text, sides[0])]
        lead = fits[0] if fits else ""
        if context:
            prompt, lead = prompt + lead + context, ""
        texts = [
            self._continuation(lead + response.text[len(context) :], body) + self._end(response.token_ids)
            for response, body in zip((pair.chosen, pair.rejected), sides, strict=True)
        ]
        return FormattedPair(prompt, *texts)

    def _continuation(self, text: str, ids: list[int]) -> str:
        """Return the form of a text that has the sampled tokens when it is tokenized alone."""
        forms = (text, text.lstrip(), f" {text.lstrip()}")
        return next((form for form in forms if form and self._ends(ids, self._ids(form))), text)

    def _ends_with(self, text: str, ids: list[int]) -> bool:
        return self._ends(self._ids(text), ids)

    @staticmethod
    def _ends(ids: list[int], tail: list[int]) -> bool:
        return bool(tail) and ids[-len(tail) :] == tail

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self._encoder.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def _body(self, ids: tuple[int, ...]) -> list[int]:
        return [token for token in ids if token not in self._encoder.eos_ids]

    def _end(self, ids: tuple[int, ...]) -> str:
        """Return the text of the token that ends a response; empty if it does not end."""
        if not ids or ids[-1] not in self._encoder.eos_ids:
            return ""
        text: Any = self._encoder.tokenizer.decode(ids[-1:])
        return str(text)
