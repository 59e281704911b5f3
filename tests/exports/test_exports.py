"""Train exported pairs for two steps in other programs' trainers, each in an environment of its own.

``make test-exports`` installs them and runs these tests; otherwise they are skipped. It also runs TRL's tests, in
``tests/integration/test_exchange.py``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from math import isfinite, log
from pathlib import Path

import pytest

from csr_vlm.core.progress import Silent
from csr_vlm.pipeline.exporting import export_pairs
from csr_vlm.pipeline.loop import align
from csr_vlm.store.run import Run
from csr_vlm.world.demo import assets
from tests.integration.conftest import small_config

ROOT = Path(__file__).parents[2]
LLAMAFACTORY = ROOT / ".venv-llamafactory" / "bin" / "llamafactory-cli"
SWIFT = ROOT / ".venv-swift" / "bin" / "swift"
OPTIONS = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "lora_rank": 4, "logging_steps": 1}
POLICY = assets() / "llava"


def needs(program: Path) -> pytest.MarkDecorator:
    wanted = os.environ.get("CSR_EXPORTS") == "all" and program.exists()
    return pytest.mark.skipif(not wanted, reason="takes minutes and other environments (make test-exports)")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run of one iteration, with pairs of siblings and question pairs."""
    run = Run.create(tmp_path_factory.mktemp("run"), small_config(tmp_path_factory.mktemp("world"), iterations=1))
    align(run, Silent())
    return run


def export(run: Run, form: str, out: Path, whole: bool) -> list[dict]:
    file, selection = export_pairs(run, 1, form, out, whole_responses=whole, copy_images=form == "llamafactory")
    assert selection.described is not whole
    text = file.read_text(encoding="utf-8")
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def output_of(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "MODELSCOPE_CACHE": str(cwd / "cache")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | offline,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def require_two_steps(output: str) -> None:
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.]+)", output)]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(log(2), abs=1e-3)
    assert isfinite(losses[1])
    assert losses[1] != losses[0], "the policy changed after the first step"


@needs(LLAMAFACTORY)
@pytest.mark.parametrize("whole", [False, True])
def test_llamafactory_trains(run: Run, tmp_path: Path, whole: bool) -> None:
    rows = export(run, "llamafactory", tmp_path / "out", whole)
    settings = OPTIONS | {
        "model_name_or_path": str(POLICY),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "q_proj,v_proj",
        "dataset_dir": str(tmp_path / "out"),
        "dataset": "csr_pairs",
        "template": "llava",
        "cutoff_len": 2048,
        "output_dir": str(tmp_path / "trained"),
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
    }
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    output = output_of(LLAMAFACTORY, "train", "train.yaml", cwd=tmp_path)
    require_two_steps(output)
    assert f"Num examples = {len(rows)}" in output
    printed = re.search(r"chosen_labels:\n(.*)\n", output)
    assert printed is not None
    assert printed[1].startswith(rows[0]["chosen"]["value"])


@needs(SWIFT)
@pytest.mark.parametrize("whole", [False, True])
def test_swift_trains(run: Run, tmp_path: Path, whole: bool) -> None:
    rows = export(run, "swift", tmp_path / "out", whole)
    options = OPTIONS | {
        "rlhf_type": "dpo",
        "model": POLICY,
        "model_type": "llava1_5_hf",
        "template": "llava1_5_hf",
        "custom_dataset_info": "out/dataset_info.json",
        "dataset": "out/pairs.jsonl",
        "remove_unused_columns": "false",
        "tuner_type": "lora",
        "torch_dtype": "float32",
        "report_to": "none",
        "output_dir": "trained",
        "split_dataset_ratio": 0,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "use_cpu": "true",
        "gradient_checkpointing": "false",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    output = output_of(SWIFT, "rlhf", *arguments, cwd=tmp_path)
    require_two_steps(output)
    by_text = {(row["messages"][1]["content"], row["rejected_response"]): row for row in rows}
    end = "</s>"
    sides = [re.search(rf"\[{side}_LABELS\] \[-100 \* \d+\](.*)", output) for side in ("CHOSEN", "REJECTED")]
    texts = [match[1] for match in sides if match is not None]
    row = by_text[texts[0].removesuffix(end).strip(), texts[1].removesuffix(end).strip()]
    ends = [text.endswith(end) for text in texts]
    assert ends == ([True, True] if whole else [row["add_eos"], row["rejected_add_eos"]])
