"""``python -m tests.families.table``: run the family tests and write docs/families.md from what passed."""

from __future__ import annotations

import tests.conftest  # noqa: F401 - shows where torchvision lies before transformers looks for it

# isort: split
import inspect
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor

from csr_vlm.models.families import family_of
from csr_vlm.store.files import write_text
from csr_vlm.store.run import versions
from tests.families import test_families, test_shared_families
from tests.families.checkpoints import FAMILIES, checkpoint

FILES = [str(test_families.__file__), str(test_shared_families.__file__)]
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
COLUMNS = {
    "test_search_goes_on_from_its_own_sentences_and_scores_them": "search, scoring",
    "test_shared_attention_writes_what_the_plain_path_writes": "shared attention",
    "test_generated_logprobs_are_teacher_forced_ones": "log-probabilities",
    "test_dpo_moves_the_language_models_adapter_and_nothing_else": "DPO",
    "test_packed_pairs_have_the_loss_and_gradients_of_unpacked_ones": "pairs in one row",
    "test_the_adapter_reloads_to_the_policy_that_was_trained": "save, reload",
    "test_the_second_iteration_goes_on_from_the_first": "second iteration",
    "test_the_merged_model_is_the_policy": "merge",
}
HEAD = """\
# Model families

Written by `python -m tests.families.table` from the outcome of `tests/families`; do not edit.

Each family was taken through the whole method on a tiny checkpoint with random weights, made by
`tests/families/checkpoints.py` and loaded through `AutoModelForImageTextToText` and `AutoProcessor` as a
user's is. So the table says that the parts agree with each other on this family; it does not say that
anyone has aligned its full-sized model.

"""
FOOT = """
- search, scoring: two rounds of sentence search by the transformers engine, each sentence scored by CLIP;
  no response holds a token that stands for a picture.
- shared attention: with keys and values stored once for all candidates it writes the same tokens, with the same
  log-probabilities within 1e-4 nats a sentence, as with a copy for each.
- log-probabilities: those recorded while generating equal a teacher-forced pass, within 1e-4 nats a
  response, in a batch of pictures of different sizes and one by one from the pixels; another picture
  changes them by over 100 times that.
- DPO: the reference is the ledger's, the first loss is log 2, two steps move every LoRA map of the language
  model and not one other parameter.
- pairs in one row: what the two sides of a pair share is run once, with the loss and the gradients of two
  rows; Gemma 3 and PaliGemma, whose pictures' tokens see each other, keep two.
- save, reload: the saved adapter loads to exactly the trained weights and gives the same log-probabilities.
- second iteration: training goes on from the saved adapter, again from a loss of log 2.
- merge: base plus adapter, merged and loaded by name, gives the same log-probabilities.

A model type that is not here is tried generically. `csr check` on weights that are on disk, and every
search, first let the model write two sentences and ask it for their probability as transformers itself
would, from the pixels with the model's own positions; where the two differ by more than rounding the model is
refused. Known not to work: BLIP-2 and InstructBLIP (no chat template), VILA in its own format
(transformers has no class for it).

Processors of families with torchvision or num2words in the last column need
`pip install 'csr-vlm[families]'`.
"""


class Outcomes:
    """Gathers each test's outcome by family."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test, _, family = report.nodeid.rpartition("::")[2].rstrip("]").partition("[")
        worst = self.found[family].get(test, "passed")
        if report.outcome != "passed" and worst != "failed":
            worst = report.outcome
        self.found[family][test] = worst


def row(name: str, outcomes: dict[str, str]) -> list[str]:
    """One family's row: what it is, what was seen, what it needs."""
    directory = checkpoint(name)
    config = AutoConfig.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    family = family_of(config)
    marks = {"passed": "yes", "skipped": "not run", "failed": "NO"}
    seen = [marks[outcomes.get(test, "skipped")] for test in COLUMNS]
    needs = "num2words, torchvision" if "smolvlm" in name else ("torchvision" if needs_torchvision(processor) else "")
    return [name, f"`{config.model_type}`", family.positions, family.features, *seen, needs]


def needs_torchvision(processor: Any) -> bool:
    """A video processor has no other implementation; nor has an image processor that is not PIL's alone."""
    if getattr(processor, "video_processor", None) is not None:
        return True
    module = inspect.getmodule(type(processor.image_processor))
    package = module.__name__.rpartition(".")[0] if module else ""
    return "pixtral" in package


def write_page() -> bool:
    """Run the tests and write the page; tell whether all passed."""
    outcomes = Outcomes()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *FILES], plugins=[outcomes])
    heads = ["family", "model type", "positions", "image features reused", *COLUMNS.values(), "needs"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(row(name, outcomes.found[name])) + " |" for name in FAMILIES]
    found = versions()
    with_versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "trl", "peft"))
    write_text(PAGE, HEAD + "\n".join(lines) + f"\n\nSeen with {with_versions}, on a CPU in float32.\n" + FOOT)
    return code == 0


if __name__ == "__main__":
    raise SystemExit(0 if write_page() else 1)
