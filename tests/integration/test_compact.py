"""Test that a compacted ledger yields the same scores, pairs and questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from csr_vlm.config.load import scorer_config
from csr_vlm.core.progress import Silent
from csr_vlm.pipeline import stages
from csr_vlm.store import ledger, tables
from csr_vlm.store.run import Run
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config
from tests.integration.test_cli import csr


def test_scores_pairs_and_questions_of_a_compacted_ledger_are_the_same(tmp_path: Path) -> None:
    config = small_config(tmp_path, iterations=1, generation={"prompts_per_part": 3})
    loose = Run.create(tmp_path / "loose", config)
    stages.check_inputs(loose, Silent())
    stages.generate(loose, 1, Silent())
    shutil.copytree(loose.root, tmp_path / "packed")
    packed = Run.open(tmp_path / "packed")
    num_parts = len(loose.ledger_parts(1))
    summary = json.loads(csr("compact", packed.root, "--json").stdout)
    assert num_parts > 2
    assert (summary["before"], summary["after"], len(packed.ledger_parts(1))) == (num_parts, 1, 1)

    second = scorer_config(path=str(assets() / "clip"), name="second", others=2)
    for run in (loose, packed):
        stages.score(run, 1, second, Silent())
        stages.make_pairs(run, 1, Silent())
    trees = list(ledger.trees(loose, 1))
    assert list(ledger.trees(packed, 1)) == trees
    assert all("second:others" in node.cosines for tree in trees for node in tree if node.sentence)
    assert packed.pairs_path(1).read_bytes() == loose.pairs_path(1).read_bytes()
    assert packed.questions_path(1).read_bytes() == loose.questions_path(1).read_bytes()
    assert packed.result(1, "pairs")["questions"] > 0
    in_this_process = stages.question_pairs(packed, 1, packed.config, Silent())
    assert list(tables.read_pairs(packed.questions_path(1))) == in_this_process
