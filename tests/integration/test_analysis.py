"""Test the analysis of a real run: attention, external pairs, the section in the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from csr_vlm.cli import console
from csr_vlm.cli.app import app
from csr_vlm.config.schema import ModelConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.evaluation.attention import response_attention, use_eager_attention
from csr_vlm.evaluation.introspection import analyze
from csr_vlm.models.loading import load_policy
from csr_vlm.models.policy import Policy
from csr_vlm.pipeline.loop import align
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from csr_vlm.training.pair_encoding import tokenize_response
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config


@pytest.fixture(scope="module")
def eager() -> Policy:
    policy = load_policy(ModelConfig(path=str(assets() / "llava"), device="cpu"), adapter=None)
    use_eager_attention(policy)
    return policy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("analysis")
    config = small_config(directory, iterations=1, evaluation={"world": {"num_scenes": 10}})
    made = Run.create(directory / "run", config)
    align(made, Silent())
    return made


def test_attention_is_a_distribution_over_earlier_positions(eager: Policy, prompts) -> None:
    ids = tokenize_response(eager, prompts[0], "There is a red boat.")
    found = response_attention(eager, prompts[0], ids)
    layers = eager.base_model.config.text_config.num_hidden_layers
    assert found.weights.shape == (layers, len(ids), found.start + len(ids))
    assert int(found.image.sum()) == 36, "72 x 72 pixels in patches of 12"
    assert torch.allclose(found.weights.sum(dim=-1), torch.ones(layers, len(ids)), atol=1e-5)
    for index in range(len(ids)):
        assert found.weights[:, index, found.start + index :].abs().max() == 0, "later positions get no weight"
        assert found.weights[:, index, found.start + index - 1].min() > 0, "the query is the position before its token"


def test_a_response_is_encoded_as_the_policy_generates_it(eager: Policy, run: Run) -> None:
    for pair in list(tables.read_pairs(run.pairs_path(1)))[:5]:
        ids = tokenize_response(eager, pair.prompt, pair.chosen.text)
        assert (ids if pair.chosen.complete else ids[:-1]) == pair.chosen.token_ids


def test_a_run_is_analyzed_with_external_pairs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = list(tables.read_pairs(run.pairs_path(1)))
    external = Path(pairs[0].prompt.image).parent / "external.jsonl"
    rows = [
        {
            "id": f"{at}",
            "image": pair.prompt.image,
            "text": pair.prompt.text,
            "chosen": pair.chosen.text,
            "rejected": "Boat boat fish.",
        }
        for at, pair in enumerate(pairs[:6])
    ]
    external.write_text("\n".join([*(json.dumps(row) for row in rows), "not json"]))
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)
    options = ["--responses", "4", "--pairs", "8", "--external", str(external), "--json", "--quiet"]
    shown = CliRunner().invoke(app, ["analyze", str(run.root), *options])
    found = json.loads(shown.stdout)
    assert "Changes inside the model" in (run.root / "report.html").read_text()
    assert found == json.loads((run.root / "analysis.json").read_text())
    generated, other = found["separability"]
    assert (generated["pairs"], other["pairs"]) == ("iteration 1", "external")
    assert other["before"]["auc"]["value"] > generated["before"]["auc"]["value"], "nonsense is easy to separate"
    assert other["before"]["margin"]["n"] == 6
    layers = found["attention"]["layers"]
    assert len(layers) == 4
    assert all(0 < layer["mass"]["before"] < 1 for layer in layers)
    assert all(layer["mass"]["value"] != 0 for layer in layers), "the adapter moved something"
    assert sum(found["relevance"]["after"]) == pytest.approx(1.0)


def test_logprobs_before_training_equal_the_ledgers(run: Run) -> None:
    """Under the policy that generated them, the ledger's log-probabilities equal those of a forward pass."""
    pairs = list(tables.read_pairs(run.pairs_path(1)))
    found = analyze(run, Silent(), num_responses=2, num_pairs=len(pairs))["separability"][0]["before"]
    sides = [[r.logprob / len(r.token_ids) for r in (pair.chosen, pair.rejected)] for pair in pairs]
    stored = [chosen - rejected for chosen, rejected in sides]
    assert found["margin"]["value"] == pytest.approx(sum(stored) / len(stored), abs=1e-4)


def test_pairs_without_both_sides_are_refused(run: Run) -> None:
    pairs = list(tables.read_pairs(run.pairs_path(1)))
    path = Path(pairs[0].prompt.image).parent / "half.jsonl"
    path.write_text(json.dumps({"id": "a", "image": pairs[0].prompt.image, "text": "Look.", "chosen": "A boat."}))
    with pytest.raises(CsrError, match="contains no usable pair"):
        analyze(run, Silent(), num_responses=2, num_pairs=2, external=path)
