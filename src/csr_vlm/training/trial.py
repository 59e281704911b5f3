"""Try one training step before the first search, so that what cannot train says so in the first minutes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.records import Pair, Prompt, Response
from csr_vlm.models.devices import resolve_device
from csr_vlm.models.encoding import PromptEncoder
from csr_vlm.models.loading import load_prompt_encoder
from csr_vlm.store import tables
from csr_vlm.training.dpo import train

_SHORT = 8
"""Tokens of the responses on a CPU, where memory is rarely what is missing."""


def try_training(prompts: Sequence[Prompt], config: RunConfig, previous: Path | None) -> None:
    """Train one step on invented pairs: forward, backward and optimizer, on the longest tree that a pass may hold.

    On a CPU the tree is one short pair.

    Args:
        prompts: Some prompts of the run; the longest one is used.
        config: Configuration of the run.
        previous: Adapter that training starts from.

    Raises:
        CsrError: Training fails; see :func:`csr_vlm.training.dpo.train`.
    """
    encoder = load_prompt_encoder(config.model, config.data.max_image_pixels)
    prompt = max(prompts, key=lambda prompt: _num_tokens(encoder, prompt))
    on_cpu = resolve_device(config.model.device) == "cpu"
    length = _SHORT if on_cpu else config.method.search.max_sentence_tokens
    budget = 0 if on_cpu else config.training.max_tokens
    pairs = list(_invented_pairs(encoder, prompt, length, budget))
    trl = {**config.training.trl, "max_steps": 1, "per_device_train_batch_size": len(pairs), "report_to": "none"}
    training = config.training.model_copy(
        update={"reference": "model", "trl": {**trl, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0}}
    )
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory) / "iteration-0" / "trainer"
        path = Path(directory) / "pairs.parquet"
        tables.write_pairs(path, pairs)
        adapter = Path(directory) / "adapter"
        train(
            [path],
            config.model,
            training,
            previous=previous,
            adapter=adapter,
            work=work,
            seed=config.seed,
            max_image_pixels=config.data.max_image_pixels,
        )


def _num_tokens(encoder: PromptEncoder, prompt: Prompt) -> int:
    return int(encoder.process(prompt)["input_ids"].shape[1])


def _invented_pairs(encoder: PromptEncoder, prompt: Prompt, length: int, budget: int) -> Iterator[Pair]:
    """Yield pairs of responses without meaning, until their tree has the budget of tokens."""
    excluded = {*encoder.image_token_ids, *encoder.eos_ids, *encoder.tokenizer.all_special_ids}
    words = [token for token in range(len(encoder.tokenizer)) if token not in excluded]
    num_tokens = _num_tokens(encoder, prompt)
    for number in count():
        sides = [
            tuple(words[(side * 7919 + index) % len(words)] for index in range(length))
            for side in (2 * number, 2 * number + 1)
        ]
        chosen, rejected = (Response("invented", ids, 0.0, "", 1, 0.0, complete=False) for ids in sides)
        yield Pair(prompt, 0, chosen, rejected)
        num_tokens += 2 * length
        if num_tokens + 2 * length > budget:
            return
