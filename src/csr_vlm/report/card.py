"""The model card of an adapter: what it is, how it was made, what was measured.

It is written from finished stages only, as ``README.md`` beside the adapter's weights,
where the Hugging Face hub and PEFT users look for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from csr_vlm.core.formatting import fixed
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.report.measures import MEASURES, Evaluation, read_evaluation
from csr_vlm.store import files
from csr_vlm.store.run import Run

_METHOD = """\
This LoRA was trained by Calibrated Self-Rewarding (Zhou et al., NeurIPS 2024,
[arXiv 2405.14622](https://arxiv.org/abs/2405.14622)) without human labels and without a judge
model: the base model proposed responses sentence by sentence, each sentence was scored by the
model's own probability calibrated with an image-text relevance score, and DPO was run on the best
against the worst responses, for {iterations} iterations.
"""
_USE = """\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(model, "PATH OF THIS ADAPTER")
processor = AutoProcessor.from_pretrained({base!r}{revision})
```
"""


def write_card(run: Run) -> Path:
    """Write ``RUN/adapter/README.md``.

    Returns:
        The path of the card.
    """
    path = run.root / "adapter" / "README.md"
    files.write_text(path, render_card(run))
    return path


def render_card(run: Run) -> str:
    """Return the card of a run's final adapter as Markdown with the hub's YAML header."""
    model = run.config.model
    revision = f", revision={model.revision!r}" if model.revision else ""
    parts = [
        f"---\n{yaml.safe_dump(_header(run), sort_keys=False)}---",
        f"# {Path(model.path).name}, aligned by Calibrated Self-Rewarding",
        _METHOD.format(iterations=run.final),
        "## Use",
        _USE.format(base=model.path, revision=revision),
        "## What was measured",
        _measured(read_evaluation(run)),
        "## Training",
        _training(run),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(run.config.dump(), sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _header(run: Run) -> dict[str, Any]:
    header: dict[str, Any] = {
        "base_model": run.config.model.path,
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["csr-vlm", "dpo", "lora", "self-rewarding"],
    }
    licence = base_licence(run.config.model.path)
    return header if licence is None else {"license": licence, **header}


def base_licence(path: str) -> str | None:
    """Return the licence that a base model's own card names, where the card is on disk; else None."""
    directory = Path(path)
    if directory.is_dir():
        card: Path | None = directory / "README.md"
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "README.md") if path.count("/") == 1 else None
        card = Path(cached) if isinstance(cached, str) else None
    if card is None or not card.is_file():
        return None
    _, marker, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    try:
        header = yaml.safe_load(rest.partition("\n---")[0]) if marker else None
    except yaml.YAMLError:
        return None
    licence = header.get("license") if isinstance(header, dict) else None
    return licence if isinstance(licence, str) else None


def _measured(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "Nothing was measured in this run."
    found = evaluation.measured
    names = ["base" if number == 0 else f"iteration {number}" for number in found]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for measure in MEASURES:
        values = [metrics.get(measure.key) for metrics in found.values()]
        if any(value is not None for value in values):
            hint = f" ({measure.hint})" if measure.hint else ""
            lines.append(f"| {measure.label}{hint} | " + " | ".join(_cell(v, measure.digits) for v in values) + " |")
    protocol = ", ".join(f"{name} {value}" for name, value in evaluation.protocol.items())
    lines += ["", f"95 % bootstrap intervals over prompts in brackets. Protocol: {protocol}."]
    return "\n".join(lines)


def _cell(metric: Metric | None, digits: int) -> str:
    if metric is None:
        return "-"
    return f"{fixed(metric.value, digits)} [{fixed(metric.low, digits)}, {fixed(metric.high, digits)}]"


def _training(run: Run) -> str:
    lines = ["| iteration | pairs | mean margin | reference |", "|---|---|---|---|"]
    for number in range(1, run.final + 1):
        pairs, trained = run.result(number, "pairs"), run.result(number, "train")
        lines.append(f"| {number} | {trained['num_pairs']} | {pairs['margin']:.3f} | {trained['reference']} |")
    return "\n".join(lines)
