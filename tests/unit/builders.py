"""Small makers of records, so that a test shows only the numbers it is about."""

from __future__ import annotations

from typing import Any

from csr_vlm.config.load import resolve
from csr_vlm.config.schema import MethodConfig, RunConfig
from csr_vlm.core.progress import SilentProgress
from csr_vlm.core.records import Finish, Node, NodeStatus, Prompt
from csr_vlm.world.corpus import sentence
from csr_vlm.world.scenes import HARBOUR, Scene

REQUIRED = {"model": {"path": "model"}, "scorer": {"path": "scorer"}, "data": {"prompts": "prompts.jsonl"}}


def config(**settings: Any) -> RunConfig:
    return resolve(REQUIRED | settings)


def method(weight: float = 0.5, **sections: Any) -> MethodConfig:
    """Return the defaults of the schema, without a preset, with ``weight`` as lambda."""
    return MethodConfig.model_validate({"lambda": weight} | sections)


def prompt(prompt_id: str = "p") -> Prompt:
    return Prompt(prompt_id, f"/images/{prompt_id}.png", "Describe the image.")


def node(
    node_id: str,
    text: str = "A sentence.",
    *,
    cosine: float | None = 0.2,
    logprobs: tuple[float, ...] = (-1.0,),
    ids: tuple[int, ...] | None = None,
    status: NodeStatus = NodeStatus.PRUNED,
    finish: Finish = Finish.DELIMITER,
    prompt_id: str = "p",
    iteration: int = 1,
) -> Node:
    return Node(
        prompt_id=prompt_id,
        iteration=iteration,
        node_id=node_id,
        parent_id=node_id.rpartition(".")[0],
        depth=node_id.count(".") + 1,
        token_ids=ids if ids is not None else tuple(range(len(logprobs))),
        token_logprobs=logprobs,
        text=text,
        finish=finish,
        status=status,
        cosines={} if cosine is None else {"clip": cosine},
    )


def true_caption(scene: Scene) -> str:
    """Name every object in reading order and nothing else."""
    return " ".join(sentence(HARBOUR, (item.kind, item.color)) for item in scene.objects)


class CountedProgress(SilentProgress):
    """Append each advance to a list."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def advance(self, number: int = 1) -> None:
        self.counts.append(number)
