"""Check that the pass in the collator's docstring is the batch that it builds."""

from __future__ import annotations

import ast
import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.models.encoding import EncodedPrompt
from csr_vlm.models.policy import Policy
from csr_vlm.training.collator import PairCollator

PROMPT_IDS = {"a": [1, 9, 5], "a?": [1, 9, 6, 7]}


def policy(monkeypatch: pytest.MonkeyPatch) -> Policy:
    """Return a policy that encodes the two prompts of the docstring, without a model."""
    made = object.__new__(Policy)
    text_config = SimpleNamespace(_attn_implementation="sdpa")
    config = SimpleNamespace(model_type="llava", get_text_config=lambda: text_config)

    def encode(prompt: Prompt) -> EncodedPrompt:
        ids = PROMPT_IDS[prompt.prompt_id]
        return EncodedPrompt(torch.tensor(ids), torch.arange(len(ids)), {}, {"pixel_values": torch.ones(1, 1)})

    monkeypatch.setattr(Policy, "base_model", SimpleNamespace(config=config))
    monkeypatch.setattr(Policy, "image_token_ids", [9])
    monkeypatch.setattr(Policy, "pad_id", 0)
    monkeypatch.setattr(made, "encode", encode, raising=False)
    return made


def documented() -> tuple[list[Pair], dict[str, Any]]:
    """Read the pairs and the pass that the docstring shows."""
    text = inspect.cleandoc(PairCollator.__doc__ or "")
    rows, batch = re.findall(r"::\n\n((?:    .*\n)+)", text)
    pairs = []
    for row in ast.literal_eval(rows.strip()):
        sides = [
            Response("1", tuple(row[side]), logprob, "", 1, 0.0, complete=True)
            for side, logprob in zip(("chosen", "rejected"), row["logprobs"], strict=True)
        ]
        pairs.append(Pair(Prompt(row["prompt"], "a.png", ""), 1, sides[0], sides[1]))
    expected = eval_tensors(ast.parse(batch.strip(), mode="eval").body)
    return pairs, expected


def eval_tensors(node: ast.expr) -> Any:
    """Evaluate nested dictionaries and lists whose leaves may be tensors."""
    if isinstance(node, ast.Dict):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(eval_tensors, node.values), strict=True))
    return torch.tensor(ast.literal_eval(node.args[0])) if isinstance(node, ast.Call) else ast.literal_eval(node)


def test_the_collator_builds_the_pass_of_its_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, expected = documented()
    (batch,) = PairCollator(policy(monkeypatch), 8192).passes(pairs)
    compare(batch, expected)


def compare(batch: dict[str, Any], expected: dict[str, Any]) -> None:
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            compare(batch[key], value)
        elif isinstance(value, torch.Tensor):
            assert batch[key].dtype == value.dtype, key
            assert torch.equal(batch[key], value), key
        else:
            assert batch[key] == value


def test_a_tree_is_cut_at_the_token_budget_and_pairs_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, _ = documented()
    made = policy(monkeypatch)
    for budget, sizes in ((12, [3]), (11, [2, 1]), (1, [1, 1, 1])):
        passes = PairCollator(made, budget).passes(pairs)
        assert sorted((len(batch["prompt_ids"]) for batch in passes), reverse=True) == sizes
