"""Write the model card of an adapter.

The card is generated from finished stages only and stored as ``README.md`` beside the adapter's
weights, where the Hugging Face Hub and PEFT users expect it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from csr_vlm.core.formatting import plural
from csr_vlm.core.secrets import redact, without_secrets
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.metrics import METRICS, MetricSpec
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.report.evaluations import Evaluation, read_evaluation
from csr_vlm.store import files
from csr_vlm.store.run import Run

_METHOD = """\
This LoRA adapter was trained with Calibrated Self-Rewarding (Zhou et al., NeurIPS 2024,
[arXiv 2405.14622](https://arxiv.org/abs/2405.14622)), without human labels and without a judge
model. Training ran for {iterations}. In each iteration, the policy generated responses sentence by
sentence, each sentence was scored by the policy's own probability calibrated with an image-text
relevance score, and DPO was run on the resulting preference pairs.
"""
_USAGE = """\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(model, "PATH_TO_THIS_ADAPTER")
processor = AutoProcessor.from_pretrained({base!r}{revision})
```
"""


def write_card(run: Run) -> Path:
    """Write ``RUN/adapter/README.md`` and return its path."""
    path = run.root / "adapter" / "README.md"
    files.write_text(path, render_card(run))
    return path


def render_card(run: Run) -> str:
    """Return the card of a run's final adapter as Markdown with the Hub's YAML header."""
    model = run.config.model
    revision = f", revision={model.revision!r}" if model.revision else ""
    parts = [
        f"---\n{yaml.safe_dump(_header(run), sort_keys=False)}---",
        f"# {Path(model.path).name}, aligned with Calibrated Self-Rewarding",
        _METHOD.format(iterations=plural(run.final, "iteration")),
        "## Usage",
        _USAGE.format(base=model.path, revision=revision) + _picture_note(model.max_image_tokens),
        "## Evaluation",
        _evaluation(read_evaluation(run)),
        "## Training",
        _training(run),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(without_secrets(run.config.dump()), sort_keys=False, allow_unicode=True)}```",
    ]
    return redact("\n\n".join(part.rstrip("\n") for part in parts) + "\n")


def _picture_note(max_image_tokens: int | None) -> str:
    if max_image_tokens is None:
        return ""
    return (
        f"\nPictures had at most {max_image_tokens} tokens in training (`model.max_image_tokens`). Limit them alike: "
        "for Qwen-VL by `max_pixels`, for InternVL by `max_patches`, for others by `size` of the image processor.\n"
    )


def _header(run: Run) -> dict[str, Any]:
    header: dict[str, Any] = {
        "base_model": run.config.model.path,
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["csr-vlm", "dpo", "lora", "self-rewarding"],
    }
    license_id = base_license(run.config.model.path)
    return header if license_id is None else {"license": license_id, **header}


def base_license(path: str) -> str | None:
    """Return the license in the base model's own card; None if the card is not on disk or names none."""
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
    license_id = header.get("license") if isinstance(header, dict) else None
    return license_id if isinstance(license_id, str) else None


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "This run has no evaluation."
    names = [policy_name(number) for number in evaluation.metrics]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, spec in METRICS.items():
        if key in evaluation.keys:
            cells = [_cell(spec, metrics.get(key)) for metrics in evaluation.metrics.values()]
            hint = f" ({spec.hint})" if spec.hint else ""
            lines.append(f"| {spec.label}{hint} | " + " | ".join(cells) + " |")
    protocol = ", ".join(f"{name} {value}" for name, value in evaluation.protocol.items())
    lines += ["", f"Brackets: 95 % intervals over prompts. Protocol: {protocol}."]
    return "\n".join(lines)


def _cell(spec: MetricSpec, metric: Metric | None) -> str:
    if metric is None:
        return "-"
    return f"{spec.format(metric.value)} [{spec.format(metric.low)}, {spec.format(metric.high)}]"


def _training(run: Run) -> str:
    lines = ["| iteration | pairs | mean margin | reference log-probabilities |", "|---|---|---|---|"]
    for number in range(1, run.final + 1):
        pairs, trained = run.result(number, "pairs"), run.result(number, "train")
        lines.append(f"| {number} | {trained['num_pairs']} | {pairs['margin']:.3f} | {trained['reference']} |")
    return "\n".join(lines)
