"""Check that the batch in the collator's docstring is the batch that it builds."""

from __future__ import annotations

import ast
import inspect
import re
from types import SimpleNamespace
from typing import Any

import torch

from csr_vlm.core.records import Prompt
from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.training.collator import PairCollator

PROMPT_IDS = {"a": [1, 9, 5], "b": [1, 9, 6, 7]}
PIXELS = {"a": [[1.0]], "b": [[2.0]]}


class FakePolicy:
    """Encode the two prompts of the docstring."""

    pad_id = 0

    def __init__(self, sliding_window: int | None = None) -> None:
        text_config = SimpleNamespace(sliding_window=sliding_window)
        self.base_model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text_config))

    def encode(self, prompt: Prompt) -> EncodedPrompt:
        ids = PROMPT_IDS[prompt.prompt_id]
        pixels = torch.tensor(PIXELS[prompt.prompt_id])
        return EncodedPrompt(torch.tensor(ids), torch.arange(len(ids)), {}, {"pixel_values": pixels})


def documented() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Read the rows and the batch that the docstring shows."""
    text = inspect.cleandoc(PairCollator.__doc__ or "")
    rows, batch = re.findall(r"::\n\n((?:    .*\n)+)", text)
    is_tensor = {key: value.startswith("tensor(") for key, value in re.findall(r'"(\w+)": (\S+)', batch)}
    values = ast.literal_eval(batch.replace("tensor(", "(").strip())
    return ast.literal_eval(rows.strip()), {
        key: torch.tensor(value) if is_tensor[key] else value for key, value in values.items()
    }


def test_the_collator_builds_the_batch_of_its_docstring() -> None:
    rows, expected = documented()
    batch = PairCollator(FakePolicy())(rows)
    assert batch.keys() == expected.keys()
    assert batch.pop("prompt_ids") == expected.pop("prompt_ids")
    for key, value in expected.items():
        assert batch[key].dtype == value.dtype, key
        assert torch.equal(batch[key], value), key


def test_packing_keeps_the_batch_and_moves_the_images() -> None:
    rows, expected = documented()
    batch = PairCollator(FakePolicy(sliding_window=6), packing=True)(rows)
    packed = batch.pop("packed")
    assert batch.keys() == expected.keys() - {"pixel_values"}
    assert packed["pixel_values"].tolist() == [[1.0], [2.0]], "once per pair"
    assert packed["input_ids"].tolist() == [[1, 9, 5, 20, 21, 31, 0], [1, 9, 6, 7, 40, 50, 51]]


def test_a_batch_longer_than_the_attention_window_is_not_packed() -> None:
    rows, expected = documented()
    assert PairCollator(FakePolicy(sliding_window=5), packing=True)(rows).keys() == expected.keys()
