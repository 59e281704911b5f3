"""Test which variants of an ablation may share a ledger, and how they are named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from csr_vlm.config.load import load_config, merged
from csr_vlm.config.schema import RunConfig
from csr_vlm.core.errors import CsrError
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline import ablation
from csr_vlm.pipeline.ablation import BOTH, Variant, needs_own_run, variants
from csr_vlm.store.run import Run
from tests.unit.builders import REQUIRED


def found(lambdas: Sequence[float] = (), presets: Sequence[str] = (), **recipe: Any) -> dict[str, Variant]:
    def load(overrides: Sequence[str]) -> RunConfig:
        return load_config(None, overrides, base=merged(REQUIRED, recipe))

    return {variant.name: variant for variant in variants(load, lambdas, presets)}


def test_one_ledger_serves_a_search_that_the_reward_does_not_steer() -> None:
    rows = found((0.1, 0.9), preset="official", iterations=1)
    assert list(rows) == [BOTH, "only R_T", "only R_I", "lambda 0.1"], "lambda 0.9 is the recipe itself"
    assert {name: row.own_run for name, row in rows.items()} == dict.fromkeys(rows)
    assert [rows[name].config.method.lambda_ for name in rows] == [0.9, 0.0, 1.0, 0.1]
    assert rows["only R_T"].config.method.pairs.questions.per_prompt == 0


def test_a_search_that_the_reward_steers_makes_another_ledger() -> None:
    rows = found((0.5,), preset="paper", iterations=1)
    assert rows[BOTH].own_run is None
    assert rows["lambda 0.5"].own_run == "method.lambda steers the search"


def test_later_iterations_generate_with_the_variants_own_policy() -> None:
    rows = found((), preset="official", iterations=3)
    assert {row.own_run for name, row in rows.items() if name != BOTH} == {
        "each iteration generates with its own policy"
    }


def test_without_relevance_there_are_no_claims() -> None:
    rows = found(iterations=1)
    assert rows[BOTH].config.method.reward.unit == "claim"
    assert rows["only R_T"].config.method.reward.unit == "sentence"
    assert rows["only R_I"].config.method.reward.unit == "claim"


def test_a_preset_with_another_search_gets_a_run() -> None:
    rows = found((), ("paper",), preset="official", iterations=1)
    assert rows["preset paper"].own_run is not None
    assert rows["preset paper"].own_run.startswith("method.search.")
    training = load_config(None, ["training.trl.beta=0.3"], base=rows[BOTH].config.dump())
    assert needs_own_run(rows[BOTH].config, training) is None


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(CsrError, match="officail"):
        found((), ("officail",))


def test_a_variant_that_fails_leaves_the_others_and_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def train(run: Run, config: RunConfig, overrides: Sequence[str], iteration: int, root: Path, _: Any) -> Any:
        done.append(root.name)
        if config.method.lambda_ == 0:
            raise CsrError("these settings yield no pairs", "loosen method.pairs")
        return {"metrics": {"heldout": {"relevance": {"value": config.method.lambda_}}}}

    monkeypatch.setattr(ablation, "train_on_ledger", train)
    monkeypatch.setattr(ablation, "align", lambda run, _: done.append(run.root.name))
    monkeypatch.setattr(ablation, "read_documents", lambda _, number: {"heldout": {"metrics": {"n": number}}})
    rows = ablation.ablate(list(found((0.5,), preset="official", iterations=1).values()), tmp_path, Silent())
    assert done == ["both", "only-rt", "only-ri", "lambda-0.5"]
    assert [row["name"] for row in rows] == ["base", BOTH, "only R_T", "only R_I", "lambda 0.5"]
    assert [row["failed"] for row in rows] == [None, None, "these settings yield no pairs", None, None]
    assert rows[2]["metrics"] == {}
    assert rows[4]["metrics"]["heldout"]["relevance"]["value"] == 0.5
    assert json.loads((tmp_path / "ablation.json").read_text())["variants"] == rows


def test_a_recipe_that_fails_ends_the_ablation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise CsrError("no usable prompt")

    monkeypatch.setattr(ablation, "align", fail)
    with pytest.raises(CsrError, match="no usable prompt"):
        ablation.ablate(list(found(preset="official", iterations=1).values()), tmp_path, Silent())
