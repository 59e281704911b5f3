"""Analysis of a real run: attention that adds up, pairs from elsewhere, the report's part."""

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
from csr_vlm.evaluation.attention import attention_rows, use_readable_attention
from csr_vlm.evaluation.introspection import analyze
from csr_vlm.models.policy import Policy, load_policy
from csr_vlm.pipeline.loop import align
from csr_vlm.store import tables
from csr_vlm.store.run import Run
from csr_vlm.training.pair_encoding import response_ids
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config


@pytest.fixture(scope="module")
def eager() -> Policy:
    policy = load_policy(ModelConfig(path=str(assets() / "llava"), device="cpu"), adapter=None)
    use_readable_attention(policy)
    return policy


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("analysis")
    config = small_config(directory, iterations=1, evaluation={"world": {"num_scenes": 10}})
    made = Run.create(directory / "run", config)
    align(made, Silent())
    return made


def test_rows_are_distributions_over_what_they_may_see(eager: Policy, prompts) -> None:
    ids = response_ids(eager, prompts[0], "There is a red boat.")
    found = attention_rows(eager, prompts[0], ids)
    layers = eager.base_model.config.text_config.num_hidden_layers
    assert found.weights.shape == (layers, len(ids), found.start + len(ids))
    assert int(found.image.sum()) == 36, "72 x 72 pixels in patches of 12"
    assert torch.allclose(found.weights.sum(dim=-1), torch.ones(layers, len(ids)), atol=1e-5)
    for at in range(len(ids)):
        assert found.weights[:, at, found.start + at :].abs().max() == 0, "nothing later is seen"
        assert found.weights[:, at, found.start + at - 1].min() > 0, "the row stands just before its token"


def test_an_answer_is_encoded_as_the_policy_generates_it(eager: Policy, run: Run) -> None:
    for pair in list(tables.read_pairs(run.pairs_path(1)))[:5]:
        ids = response_ids(eager, pair.prompt, pair.chosen.text)
        assert (ids if pair.chosen.complete else ids[:-1]) == pair.chosen.token_ids


def test_a_run_is_analysed_with_pairs_from_elsewhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert "What changed inside the model" in (run.root / "report.html").read_text()
    assert found == json.loads((run.root / "analysis.json").read_text())
    own, foreign = found["separability"]
    assert (own["pairs"], foreign["pairs"]) == ("iteration 1", "external")
    assert foreign["before"]["auc"]["value"] > own["before"]["auc"]["value"], "nonsense is easy to tell"
    assert foreign["before"]["margin"]["n"] == 6
    layers = found["attention"]["layers"]
    assert len(layers) == 4
    assert all(0 < layer["mass"]["before"] < 1 for layer in layers)
    assert all(layer["mass"]["value"] != 0 for layer in layers), "the adapter moved something"
    assert sum(found["relevance"]["after"]) == pytest.approx(1.0)


def test_the_log_probabilities_before_training_are_the_ledgers(run: Run) -> None:
    """Under the policy that generated them, the ledger says what a forward pass says."""
    pairs = list(tables.read_pairs(run.pairs_path(1)))
    found = analyze(run, Silent(), num_responses=2, num_pairs=len(pairs))["separability"][0]["before"]
    sides = [[r.logprob / len(r.token_ids) for r in (pair.chosen, pair.rejected)] for pair in pairs]
    stored = [chosen - rejected for chosen, rejected in sides]
    assert found["margin"]["value"] == pytest.approx(sum(stored) / len(stored), abs=1e-4)


def test_pairs_without_both_sides_are_refused(run: Run) -> None:
    pairs = list(tables.read_pairs(run.pairs_path(1)))
    path = Path(pairs[0].prompt.image).parent / "half.jsonl"
    path.write_text(json.dumps({"id": "a", "image": pairs[0].prompt.image, "text": "Look.", "chosen": "A boat."}))
    with pytest.raises(CsrError, match="no usable pair"):
        analyze(run, Silent(), num_responses=2, num_pairs=2, external=path)
