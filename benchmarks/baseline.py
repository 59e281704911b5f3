"""Measure what presets prefer on every profile: the part of ``evidence.py baseline`` that needs no model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evidence_tables import interval, seeds_cell, table

from csr_vlm.evaluation.statistics import Metric, over_runs

PRESETS = {
    "calibrated": "",
    "sentences": "preset=sentences",
    "paper": "preset=paper",
    "official": "preset=official",
    "only_rt": "preset=only_rt",
    "only_ri": "preset=only_ri",
    "sentinel": "preset=sentinel",
    "random_pairs": "preset=random_pairs",
    "self-rewarding": "preset=sentences method.lambda=0",
}
"""Name in the tables to the overrides of the default configuration."""
NUM_PICTURES = 60
"""Pictures per profile and seed."""
NUM_SEEDS = 3
Row = Mapping[str, Any]
"""One preset on one profile with one seed: its key and the fields of ``profiles.Outcome``."""


def measure_profiles(out: Path, commit: str, num_pictures: int = NUM_PICTURES) -> list[Row]:
    """Run every preset on every profile with each seed; rows that ``out/profiles.jsonl`` holds are not run again."""
    from profiles import BASE, PROFILES, run_profile

    from csr_vlm.config.load import load_config
    from csr_vlm.evaluation.scorer_profile import read_profile

    path = out / "profiles.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {tuple(row["key"]) for row in rows}
    profiles = [read_profile(profile) for profile in sorted(PROFILES.glob("*.yaml"))]
    for seed in range(NUM_SEEDS):
        for preset, overrides in PRESETS.items():
            config = load_config(None, overrides.split(), base=BASE)
            for profile in profiles:
                key = (preset, overrides, profile.name, seed, num_pictures)
                if key in known:
                    continue
                outcome = asdict(run_profile(profile, config, num_pictures, seed))
                rows.append({"key": list(key), "preset": preset, "seed": seed, "commit": commit} | outcome)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return [row for row in rows if row["key"][-1] == num_pictures]


def share_right(rows: Iterable[Row]) -> Metric:
    """Compute right / (right + wrong), its mean over seeds and Student's t interval over them, within 0..1."""
    judged = [(row["right"], row["right"] + row["wrong"]) for row in rows]
    known = [(right, total) for right, total in judged if total]
    found = over_runs([right / total for right, total in known], max((1 / total for _, total in known), default=0.0))
    if found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def profile_tables(rows: Sequence[Row]) -> str:
    """Write one table of all presets, and one of each preset with every count."""
    presets = [name for name in PRESETS if any(row["preset"] == name for row in rows)]
    profiles = sorted({row["profile"] for row in rows})
    cells = {(p, q): [r for r in rows if (r["preset"], r["profile"]) == (p, q)] for p in presets for q in profiles}
    overview = [[q, *(_share(cells[p, q]) for p in presets)] for q in profiles]
    parts = [
        "### Share of right decisions\n\nRight / (right + wrong): mean over seeds (95 % interval).\n\n"
        + table(["profile", *presets], overview)
    ]
    head = ["profile", "seeds", "right : wrong", "END > true", "true > END", "false > END", "pairs"]
    head += ["prompts with pairs", "questions", "right", "nonsense", "audit"]
    for preset in presets:
        setting = f"`{PRESETS[preset]}`" if PRESETS[preset] else "the default"
        body = [_counts(profile, cells[preset, profile]) for profile in profiles]
        parts.append(f"### {preset}\n\nSetting: {setting}. Counts are sums over seeds.\n\n{table(head, body)}")
    return "\n".join(parts)


def _share(rows: Sequence[Row]) -> str:
    found = share_right(rows)
    if found.value is None:
        return "-"
    return f"{found.value:.3f} ({interval(found)})"


def _counts(profile: str, rows: Sequence[Row]) -> list[str]:
    total: Counter[str] = Counter()
    for row in rows:
        total.update({name: value for name, value in row.items() if isinstance(value, int)})
    audits = Counter(row["audit"] for row in rows)
    asked = total["questions"]
    with_pairs = sum(row["prompts_with_pairs"] for row in rows) / max(len(rows), 1)
    return [
        profile,
        seeds_cell(len(rows), NUM_SEEDS),
        f"{total['right']} : {total['wrong']}",
        *(str(total[name]) for name in ("end_over_true", "true_over_end", "false_over_end", "pairs")),
        f"{with_pairs:.0%}",
        str(asked),
        f"{total['questions_right'] / asked:.1%}" if asked else "-",
        f"{total['questions_nonsense'] / asked:.1%}" if asked else "-",
        ", ".join(f"{verdict} {number}" for verdict, number in sorted(audits.items())),
    ]
