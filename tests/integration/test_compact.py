"""A packed ledger gives the scores, pairs and questions that its parts gave."""

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


def test_nothing_that_comes_after_the_search_sees_a_difference(tmp_path: Path) -> None:
    config = small_config(tmp_path, iterations=1, generation={"prompts_per_part": 3})
    loose = Run.create(tmp_path / "loose", config)
    stages.check_inputs(loose, Silent())
    stages.generate(loose, 1, Silent())
    shutil.copytree(loose.root, tmp_path / "packed")
    packed = Run.open(tmp_path / "packed")
    number = len(loose.ledger_parts(1))
    told = json.loads(csr("compact", packed.root, "--json").stdout)
    assert number > 2
    assert (told["before"], told["after"], len(packed.ledger_parts(1))) == (number, 1, 1)

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
    asked_here = stages.ask(packed, 1, packed.config, Silent())
    assert list(tables.read_pairs(packed.questions_path(1))) == asked_here
