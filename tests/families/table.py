"""Run the family tests and write docs/families.md from their outcomes: ``python -m tests.families.table``."""

from __future__ import annotations

import tests.conftest  # noqa: F401 - prepares torchvision before transformers imports it

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
    test.__name__: title
    for test, title in (
        (test_families.test_search_extends_its_sentences_and_scores_them, "search, scoring"),
        (test_shared_families.test_shared_attention_equals_plain_attention, "shared attention"),
        (test_families.test_generated_logprobs_equal_teacher_forced_ones, "log-probabilities"),
        (test_families.test_dpo_moves_only_the_language_models_adapter, "DPO"),
        (test_families.test_trees_have_the_loss_and_gradients_of_stock_trl, "trees in one row"),
        (test_families.test_the_saved_adapter_restores_the_trained_policy, "save, reload"),
        (test_families.test_the_second_iteration_starts_from_the_first_adapter, "second iteration"),
        (test_families.test_the_merged_model_equals_the_adapted_policy, "merge"),
    )
}
HEAD = """\
# Model families

Written by `python -m tests.families.table` from the outcomes of `tests/families`; do not edit.

The tests run the whole method on a tiny checkpoint of each family with random weights, built by
`tests/families/checkpoints.py` and loaded through `AutoModelForImageTextToText` and `AutoProcessor` like a
user's model. The table shows that all parts work together for a family. It does not show that a full-sized
model was aligned.

"""
FOOT = """
- search, scoring: two rounds of sentence search with the transformers engine, each sentence scored by CLIP;
  no response contains an image token.
- shared attention: storing keys and values once for all candidates gives the same tokens as one copy per
  candidate, and the same log-probabilities within 1e-4 nats per sentence.
- log-probabilities: those recorded during generation equal those of a teacher-forced pass within 1e-4 nats per
  response, in a batch of images of different sizes and one by one from the pixels; another image changes them
  by more than 100 times as much.
- DPO: the reference log-probabilities come from the ledger, the first loss is log 2, and two steps change every
  LoRA matrix of the language model and no other parameter.
- trees in one row: all pairs and questions about an image are one tree, in which every distinct token is computed
  once, and the trees of three images are one row, with the loss and the gradients that stock TRL computes in a row
  per response (within 1e-5); Gemma 3 and PaliGemma, whose image tokens attend to each other, use separate rows.
- save, reload: the saved adapter loads with exactly the trained weights and gives the same log-probabilities.
- second iteration: training continues from the saved adapter, again with a first loss of log 2.
- merge: base plus adapter, merged and loaded by name, gives the same log-probabilities.

Other model types are run with default settings. `csr check` (if the weights are on disk) and every search first
generate two sentences and compare their log-probabilities with those that transformers computes from the pixels
with the model's own positions. If they differ by more than rounding, the model is rejected. Known not to work:
BLIP-2 and InstructBLIP (no chat template), and VILA in its original format (no class in transformers).

Processors of families with torchvision or num2words in the last column need
`pip install torchvision num2words`.
"""


class Outcomes:
    """Collect the outcome of each test by family."""

    def __init__(self) -> None:
        self.by_family: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        test, _, family = report.nodeid.rpartition("::")[2].rstrip("]").partition("[")
        worst = self.by_family[family].get(test, "passed")
        if report.outcome != "passed" and worst != "failed":
            worst = report.outcome
        self.by_family[family][test] = worst


def row(name: str, outcomes: dict[str, str]) -> list[str]:
    """Return one family's row: its type, the outcomes, and the libraries that it needs."""
    directory = checkpoint(name)
    config = AutoConfig.from_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)
    family = family_of(config)
    marks = {"passed": "yes", "skipped": "not run", "failed": "NO"}
    results = [marks[outcomes.get(test, "skipped")] for test in COLUMNS]
    needs = "num2words, torchvision" if "smolvlm" in name else ("torchvision" if needs_torchvision(processor) else "")
    return [name, f"`{config.model_type}`", family.positions, family.features, *results, needs]


def needs_torchvision(processor: Any) -> bool:
    """Return whether the processor needs torchvision: video processors and Pixtral's image processor do."""
    if getattr(processor, "video_processor", None) is not None:
        return True
    module = inspect.getmodule(type(processor.image_processor))
    package = module.__name__.rpartition(".")[0] if module else ""
    return "pixtral" in package


def write_page() -> bool:
    """Run the tests and write the page; return whether all passed."""
    outcomes = Outcomes()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *FILES], plugins=[outcomes])
    heads = ["family", "model type", "positions", "image features reused", *COLUMNS.values(), "needs"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(row(name, outcomes.by_family[name])) + " |" for name in FAMILIES]
    installed = versions()
    with_versions = ", ".join(f"{name} {installed[name]}" for name in ("torch", "transformers", "trl", "peft"))
    write_text(PAGE, HEAD + "\n".join(lines) + f"\n\nTested with {with_versions}, on a CPU in float32.\n" + FOOT)
    return code == 0


if __name__ == "__main__":
    raise SystemExit(0 if write_page() else 1)
