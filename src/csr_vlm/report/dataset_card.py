"""Write the dataset card of exported pairs: ``README.md`` beside them, with the Hub's YAML header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from csr_vlm.core.formatting import plural
from csr_vlm.core.secrets import redact
from csr_vlm.report.card import CITATION, hub_datasets, public_name
from csr_vlm.store import files
from csr_vlm.store.run import Run

_TAG = "csr-vlm"
_FIELDS = {
    "trl": "`images`, `prompt`, `chosen` and `rejected` are those of TRL's DPOTrainer",
    "llava": "`conversations` and `rejected_conversations` are those of LLaVA's and POVID's releases",
    "llamafactory": "`conversations`, `chosen`, `rejected` and `images` are those of LLaMA-Factory (sharegpt, ranking)",
    "swift": "`messages`, `rejected_response` and `images` are those of ms-swift",
    "rlaifv": "`image`, `question`, `chosen` and `rejected` are those of RLAIF-V",
    "sentinel": "`image_path`, `question`, `context`, `y_win` and `y_lose` are those of SENTINEL",
}
_REWARDS = """\
`chosen_reward` and `rejected_reward` are the rewards of both sides, `margin` is their difference. Question pairs and
external pairs have no rewards, which is written as 0.
"""
_CONTINUED = """\
Some responses do not end: their pairs compare two sentences that continue the same `context`, `y_win` and `y_lose`.
`chosen_ends` and `rejected_ends` say which responses end with their sentence.
"""


@dataclass(frozen=True)
class ExportedData:
    """Hold what a dataset card says of the exported pairs."""

    iteration: int
    format: str
    file: Path
    kind: str
    num_pairs: int
    num_questions: int
    described: bool
    """Whether some responses do not end."""


def write_dataset_card(run: Run, data: ExportedData, out: Path, base_model: str | None = None) -> Path | None:
    """Write ``README.md`` and return its path; None if there is a README of another origin, which is left alone.

    Raises:
        CsrError: The file cannot be written.
    """
    path = out / "README.md"
    if path.exists() and f"- {_TAG}" not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    files.write_text(path, render_dataset_card(run, data, base_model))
    return path


def render_dataset_card(run: Run, data: ExportedData, base_model: str | None = None) -> str:
    """Return the card of exported pairs as Markdown with the Hub's YAML header."""
    from huggingface_hub import DatasetCard, DatasetCardData

    config = run.config
    model = public_name(config.model.path, base_model)
    total = data.num_pairs + data.num_questions
    header = DatasetCardData(
        pretty_name=f"Preference pairs of {Path(model).name}",
        task_categories=["image-text-to-text"],
        tags=[_TAG, "dpo", "preference", "self-rewarding"],
        size_categories=[next(name for limit, name in _SIZES if total < limit)],
        source_datasets=hub_datasets(run) or None,
        configs=[{"config_name": "default", "data_files": data.file.name}],
    )
    questions = f" and {plural(data.num_questions, 'question pair')} (yes or no, about its own claims)"
    origin = (
        "They come from other data, which the run was given."
        if data.kind == "external"
        else f"{model} generated both responses; Calibrated Self-Rewarding ranked them (preset {config.preset}, scorer "
        f"{public_name(config.scorer.path)}). Nobody labeled them."
    )
    lines = [
        f"---\n{header.to_yaml()}\n---",
        f"# Preference pairs of {Path(model).name}",
        f"{plural(data.num_pairs, f'{data.kind} pair')}{questions if data.num_questions else ''}: what iteration "
        f"{data.iteration} of a run of [csr-vlm](https://github.com/csr-vlm/csr-vlm) trained on. {origin}"
        if data.kind != "whole-response"
        else f"{plural(data.num_pairs, 'whole-response pair')} of iteration {data.iteration} of a run of "
        f"[csr-vlm](https://github.com/csr-vlm/csr-vlm). {origin}",
        "## Fields",
        f"{_FIELDS[data.format]}. {_REWARDS}",
        *([_CONTINUED] if data.described else []),
        "Images are as the policy saw them: upright, opaque. They have the license of the data that they come from.",
        "## Citation",
        CITATION,
    ]
    card = DatasetCard(redact("\n\n".join(line.rstrip("\n") for line in lines) + "\n"))
    return str(card)


_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (float("inf"), "n>1M"),
)
