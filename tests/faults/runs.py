"""Write a small run directory with a finished iteration, without any model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from csr_vlm.config.load import resolve
from csr_vlm.core.progress import Silent
from csr_vlm.core.records import Finish, Node, NodeStatus
from csr_vlm.pipeline import stages
from csr_vlm.store import files, tables
from csr_vlm.store.run import Run

PROMPTS = 12


def write_run(root: Path) -> Run:
    """Check twelve prompts, write a synthetic ledger in parts of four prompts, and derive the pairs."""
    data = root.parent / "data"
    data.mkdir(parents=True)
    for number in range(PROMPTS):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(data / f"{number}.png")
    layer = {
        "iterations": 1,
        "model": {"path": "model"},
        "scorer": {"path": "scorer"},
        "data": {"prompts": str(data)},
        "generation": {"prompts_per_part": 4},
        "evaluation": {"heldout": 1},
        "preset": "sentences",
        "method": {"pairs": {"questions": {"per_prompt": 0}}},  # claim questions would need a model
    }
    run = Run.create(root, resolve(layer))
    stages.store_inputs(run, Silent(), model=None)
    for index, prompts in enumerate(tables.prompt_groups(run.prompts_path)):
        nodes = [node for prompt in prompts for node in tree(prompt.prompt_id)]
        tables.write_nodes(run.iteration(1) / "ledger" / f"part-{index:06d}-0123456789abcdef.parquet", nodes)
    run.mark_done(
        1, "generate", run.ledger_parts(1), nodes=8 * PROMPTS, statuses={"finished": 8 * PROMPTS}, seconds=1.0
    )
    stages.make_pairs(run, 1, Silent())
    log = [{"step": 1, "loss": 0.69, "rewards/chosen": 0.0, "rewards/margins": 0.0, "rewards/accuracies": 0.5}]
    adapter = run.iteration(1) / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    files.write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 16, "lora_alpha": 32})
    trained = {"reference": "ledger", "reference_difference": 0.0, "num_pairs": 12, "log": log}
    run.mark_done(1, "train", sorted(adapter.iterdir()), seconds=1.0, **trained)
    for number in (0, 1):
        metric = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 1}
        row = {"id": "x", "text": "Three words here.", "words": 3}
        document = {"metrics": {"words": metric}, "protocol": {"n": 1}, "rows": [row]}
        files.write_checksummed(run.evaluation_path(number, "heldout"), document)
        run.mark_done(number, "evaluate", heldout=document["metrics"], seconds=1.0)
    return run


def tree(prompt_id: str, iteration: int = 1) -> list[Node]:
    """Create two sentences with three continuations each: eight nodes, six complete responses."""
    nodes = []
    for first in range(2):
        for node_id in (f"{first}", *(f"{first}.{second}" for second in range(3))):
            nodes.append(
                Node(
                    prompt_id=prompt_id,
                    iteration=iteration,
                    node_id=node_id,
                    parent_id=node_id.rpartition(".")[0],
                    depth=node_id.count(".") + 1,
                    token_ids=(1, 2, 3),
                    token_logprobs=(-0.5, -0.25, -0.125),
                    text=f" Sentence {node_id}.",
                    finish=Finish.EOS if "." in node_id else Finish.DELIMITER,
                    status=NodeStatus.FINISHED if "." in node_id else NodeStatus.TOP,
                    cosines={"clip": 0.1 + len(nodes) / 50, "clip:others": 0.1},
                )
            )
    return nodes
