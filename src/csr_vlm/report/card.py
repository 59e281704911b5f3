"""Write the model card of an adapter.

The card is generated from finished stages only and stored as ``README.md`` beside the adapter's
weights, where the Hugging Face Hub and PEFT users expect it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from csr_vlm.core.formatting import plural
from csr_vlm.core.secrets import redact, without_secrets
from csr_vlm.data.sources import is_local
from csr_vlm.evaluation.compare import policy_name
from csr_vlm.evaluation.metrics import METRICS, MetricSpec
from csr_vlm.evaluation.statistics import Metric
from csr_vlm.report.evaluations import Evaluation, read_evaluation
from csr_vlm.store import files
from csr_vlm.store.run import Run

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PAPER = "(Zhou et al., NeurIPS 2024,\n[arXiv 2405.14622](https://arxiv.org/abs/2405.14622))"
_SEARCH = """\
In each iteration that searches, the policy generated responses sentence by sentence, and each sentence was scored by
the policy's own probability calibrated with the image-text relevance that {scorer} measures (lambda {weight:g}). No
human label and no judge model is part of that. {compared} DPO trained this adapter on the resulting pairs.
"""
_SIBLINGS = "Each pair compares two sentences that continue the same response."
_RESPONSES = "Each pair compares two whole responses."
_EXTERNAL = """\
Iteration 1 trained on preference pairs from {source}, which this run did not make: whether people or other models
labeled them is said there.
"""
_QUESTIONS = "Further pairs answer yes-or-no questions about things that the policy's own responses claim."
_USAGE = """\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({base!r}{revision})
model = PeftModel.from_pretrained(model, "PATH_TO_THIS_ADAPTER")
processor = AutoProcessor.from_pretrained("PATH_TO_THIS_ADAPTER")
```
"""
CITATION = """\
```bibtex
@inproceedings{zhou2024calibrated,
  title     = {Calibrated Self-Rewarding Vision Language Models},
  author    = {Zhou, Yiyang and Fan, Zhiyuan and Cheng, Dongjie and Yang, Sihan and Chen, Zhaorun and Cui, Chenhang and
               Wang, Xiyao and Li, Yun and Zhang, Linjun and Yao, Huaxiu},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://arxiv.org/abs/2405.14622}
}
```
"""
"""How to cite the method."""
_DATASETS = {
    "world": ("csr-vlm-world", "scenes of csr-vlm's embedded world"),
    "chair": ("coco", "COCO captions (CHAIR)"),
    "heldout": ("held-out-prompts", "held-out prompts of the run"),
}
"""Type and name of the data of each evaluation, for the Hub's model-index."""


def write_card(run: Run, base_model: str | None = None) -> Path:
    """Write ``RUN/adapter/README.md`` and return its path."""
    path = run.root / "adapter" / "README.md"
    files.write_text(path, render_card(run, base_model))
    return path


def render_card(run: Run, base_model: str | None = None) -> str:
    """Return the card of a run's final adapter as Markdown with the Hub's YAML header.

    Args:
        run: A run with a trained adapter.
        base_model: Id of the base model on the Hub; needed if the run has it as a folder.
    """
    from huggingface_hub import ModelCard

    model = run.config.model
    base = public_name(model.path, base_model)
    evaluation = read_evaluation(run)
    revision = f", revision={model.revision!r}" if model.revision else ""
    usage = _USAGE.format(base=base, revision=revision)
    if not _HUB_ID.fullmatch(base):
        usage += f"\n`{base}` is the folder of the base model.\n"
    parts = [
        f"---\n{_header(run, base, evaluation)}\n---",
        f"# {Path(base).name}, aligned with Calibrated Self-Rewarding",
        _method(run),
        "## Usage",
        usage + _picture_note(model.max_image_tokens),
        "## Evaluation",
        _evaluation(evaluation),
        "## Training",
        _training(run),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(_shared_recipe(run, base_model), sort_keys=False, allow_unicode=True)}```",
        "## Citation",
        CITATION,
    ]
    return str(ModelCard(redact("\n\n".join(part.rstrip("\n") for part in parts) + "\n")))


def _picture_note(max_image_tokens: int | None) -> str:
    if max_image_tokens is None:
        return ""
    return (
        f"\nPictures had at most {max_image_tokens} tokens in training (`model.max_image_tokens`). The processor "
        "in this folder limits them alike; other programs need the same limit (vLLM: `--mm-processor-kwargs`).\n"
    )


def public_name(path: str, hub_id: str | None = None) -> str:
    """Return how a model or a file is named where others read it: a hub id, or the last part of a local path."""
    if hub_id is not None:
        return hub_id
    return Path(os.path.abspath(path)).name if _is_path(path) else path  # noqa: PTH100 - also for missing folders


def _is_path(value: str) -> bool:
    if re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        return False
    starts = value.startswith(("/", "./", "../", "~"))
    return starts or "\\" in value or ("/" in value and (not _HUB_ID.fullmatch(value) or is_local(value)))


def hub_datasets(run: Run) -> list[str]:
    """Return the hub ids of the data that a run was given."""
    data = run.config.data
    prompts = [data.prompts] if isinstance(data.prompts, str) else list(data.prompts)
    names = [*prompts, *([data.pairs] if data.pairs is not None else [])]
    return [name for name in dict.fromkeys(names) if _HUB_ID.fullmatch(name) and not is_local(name) and "." not in name]


def _header(run: Run, base: str, evaluation: Evaluation | None) -> str:
    from huggingface_hub import ModelCardData

    return ModelCardData(
        license=base_license(run.config.model.path),
        base_model=base if _HUB_ID.fullmatch(base) else None,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["csr-vlm", "dpo", "lora", "self-rewarding"],
        datasets=hub_datasets(run) or None,
        model_name=f"{Path(base).name}-csr",
        eval_results=list(_eval_results(evaluation)) or None,
    ).to_yaml()


def _eval_results(evaluation: Evaluation | None) -> Iterable[Any]:
    """Yield the final policy's metrics as the Hub's EvalResult."""
    from huggingface_hub import EvalResult

    if evaluation is None:
        return
    kind, name = _DATASETS[evaluation.name]
    for key, spec in METRICS.items():
        metric = evaluation.metrics[evaluation.last].get(key)
        if metric is not None and metric.value is not None:
            yield EvalResult(
                task_type="image-text-to-text",
                dataset_type=kind,
                dataset_name=name,
                metric_type=key,
                metric_name=spec.label,
                metric_value=round(metric.value, 6),
                metric_args={"n": metric.n, "low": metric.low, "high": metric.high},
            )


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


def _method(run: Run) -> str:
    """Describe how the adapter was trained, as far as that happened."""
    config, external = run.config, run.config.data.pairs is not None
    searched = run.final - external
    parts = [f"This LoRA adapter was trained for {plural(run.final, 'iteration')}"]
    parts[0] += f" with Calibrated Self-Rewarding {_PAPER}." if searched else " with DPO by csr-vlm."
    if external:
        assert config.data.pairs is not None
        source = config.data.pairs if config.data.pairs in hub_datasets(run) else "other data"
        parts.append(_EXTERNAL.format(source=source).strip())
    if searched:
        compared = _SIBLINGS if config.method.pairs.between == "siblings" else _RESPONSES
        if config.method.pairs.selection == "random":
            compared += " Which side is preferred was chosen at random, as a control."
        scorer = public_name(config.scorer.path)
        parts.append(_SEARCH.format(scorer=scorer, weight=config.method.lambda_, compared=compared).strip())
    if any(run.result(number, "pairs").get("questions") for number in range(1, run.final + 1)):
        parts.append(_QUESTIONS)
    return "\n\n".join(parts)


def _shared_recipe(run: Run, base_model: str | None) -> Any:
    """Return the settings of a run without secrets and without the paths of this machine."""
    settings = without_secrets(run.config.dump())
    if base_model is not None:
        settings["model"]["path"] = base_model
    return _without_paths(settings)


def _without_paths(value: Any) -> Any:
    """Shorten every local path in plain data to its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return public_name(value) if isinstance(value, str) and "\n" not in value else value


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
    protocol = ", ".join(f"{name} {_without_paths(value)}" for name, value in evaluation.protocol.items())
    lines += ["", f"Brackets: 95 % intervals over prompts. Protocol: {protocol}."]
    return "\n".join(lines)


def _cell(spec: MetricSpec, metric: Metric | None) -> str:
    if metric is None:
        return "-"
    return f"{spec.format(metric.value)} [{spec.format(metric.low)}, {spec.format(metric.high)}]"


def _training(run: Run) -> str:
    lines = [
        "| iteration | pairs | question pairs | mean margin | reference log-probabilities |",
        "|---|---|---|---|---|",
    ]
    for number in range(1, run.final + 1):
        pairs, trained = run.result(number, "pairs"), run.result(number, "train")
        questions = pairs.get("questions", 0)
        external = number == 1 and run.config.data.pairs is not None
        margin = "external, no rewards" if external else f"{pairs['margin']:.3f}"
        lines.append(
            f"| {number} | {trained['num_pairs'] - questions} | {questions} | {margin} | {trained['reference']} |"
        )
    return "\n".join(lines)
