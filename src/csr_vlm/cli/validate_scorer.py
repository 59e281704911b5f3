"""Implement ``csr validate-scorer``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import Overrides
from csr_vlm.config.load import load_config, scorer_config
from csr_vlm.core.errors import CsrError
from csr_vlm.core.formatting import interval
from csr_vlm.store import files

if TYPE_CHECKING:
    from csr_vlm.config.schema import ClaimsConfig, RunConfig, ScorerConfig
    from csr_vlm.evaluation.labeled_captions import LabeledCaptions
    from csr_vlm.evaluation.scorer_validation import ScoredCaptions
    from csr_vlm.report.scorer_page import Validation

DEFAULT_SCORER = "openai/clip-vit-large-patch14-336"
"""The scorer of the recipes for real models."""
_BASE = {"model": {"path": "none"}, "scorer": {"path": "none"}, "data": {"prompts": "none"}}


def validate_scorer(
    annotations: Annotated[
        Path,
        typer.Option(help="Directory with COCO's instances_*.json, or JSON Lines with image and objects."),
    ],
    captions: Annotated[Path, typer.Option(help="JSON Lines with image (or image_id) and caption.")],
    settings: Overrides = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the pictures (default: beside the annotations).")
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help=f"Scorer, as in scorer.path; repeatable (default: {DEFAULT_SCORER})."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Directory for the page, the pictures, the profile and the scores.")
    ] = Path("scorer-validation"),
    words: Annotated[str, typer.Option(help="Word rule of csr eval chair: pattern, wordnet or plain.")] = "pattern",
    synonyms: Annotated[
        Path | None, typer.Option(help="Synonym file, one object per line (default: built-in COCO table).")
    ] = None,
    nltk_data: Annotated[Path | None, typer.Option(help="nltk_data directory, for --words wordnet.")] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda, mps.")] = "auto",
    trust_import: Annotated[
        bool, typer.Option("--trust-import", help="Allow python:MODULE:CLASS to import and run that class.")
    ] = False,
) -> None:
    """Measure whether a scorer tells true from false captions.

    Example: csr validate-scorer --annotations coco/annotations --captions a.jsonl
    """
    config = load_config(None, settings or (), base=_BASE)
    scorers = _scorers(scorer or [DEFAULT_SCORER], trust_import)
    labeled = _read(annotations, captions, images, words, synonyms, nltk_data, config.method.claims)
    console.quiet_libraries()
    from csr_vlm.evaluation.scorer_validation import score_captions
    from csr_vlm.models.devices import resolve_device
    from csr_vlm.scoring.registry import load_scorer

    group = load_scorer(scorers, resolve_device(device))
    scored = score_captions(labeled, group, config.scorer.others, console.reporter())
    paths = {member.name: member.path for member in (scorers, *scorers.extra)}
    validation = _validate(scored, config, {"scorers": paths, "words": words, "captions_sha256": _digest(captions)})
    written = _write(validation, out)
    result = _result(validation)
    if console.mode.json:
        console.print_json({"written": [str(path) for path in written], **result})
        return
    _print(validation)
    for path in written:
        print(path)
    profile = next((path for path in written if path.name == "profile.yaml"), None)
    if profile is not None:
        console.log(f"next: python benchmarks/profiles.py {profile} shows what the method prefers under this scorer")


def _digest(path: Path) -> str:
    return files.sha256_of(path)


def _scorers(named: Sequence[str], trust_import: bool) -> ScorerConfig:
    """Return the configuration of the scorers that ``[NAME=]PATH`` arguments name.

    Raises:
        CsrError: Two scorers have the same name, or an option is out of bounds.
    """
    members: list[dict[str, Any]] = []
    for number, argument in enumerate(named):
        name, separator, path = argument.partition("=")
        if not separator:
            name, path = ("clip" if number == 0 else f"scorer{number + 1}"), argument
        members.append({"name": name, "path": path, "trust_import": trust_import})
    first, *extra = members
    return scorer_config(**first, extra=extra)


def _read(
    annotations: Path,
    captions: Path,
    images: Path | None,
    words: str,
    synonyms: Path | None,
    nltk_data: Path | None,
    claims: ClaimsConfig,
) -> LabeledCaptions:
    from csr_vlm.evaluation.chair import ObjectReader
    from csr_vlm.evaluation.labeled_captions import label_captions, read_any_captions, read_labels
    from csr_vlm.evaluation.objects import ObjectTable
    from csr_vlm.evaluation.words import word_rule

    if not annotations.exists():
        raise CsrError(f"{annotations} does not exist", "pass a directory with instances_*.json, or JSON Lines")
    read = read_labels(annotations)
    table = coco = ObjectTable.coco()
    if synonyms:
        table = ObjectTable.read(synonyms, of_coco=False)
        if set(coco.objects.values()) <= set(table.objects.values()):  # COCO's kinds: CHAIR's special cases apply
            table = ObjectTable.read(synonyms, of_coco=True)
    reader = ObjectReader(word_rule(words, nltk_data), table)
    folder = annotations if annotations.is_dir() else annotations.parent
    roots = [images] if images else [folder, folder / "images", folder.parent, folder.parent / "images"]
    return label_captions(read, read_any_captions(captions), reader, roots, claims)


def _validate(scored: ScoredCaptions, config: RunConfig, protocol: dict[str, Any]) -> Validation:
    from csr_vlm.evaluation.reward_placement import place
    from csr_vlm.evaluation.scorer_validation import compare_scorers, measure
    from csr_vlm.evaluation.scorer_verdict import decide
    from csr_vlm.report.scorer_page import Validation

    pairs = tuple(compare_scorers(scored, *names) for names in combinations(scored.scorers, 2))
    columns = [*scored.scorers, *(f"{pair.first}+{pair.second}" for pair in pairs)]
    results = tuple(measure(scored, column) for column in columns)
    placements = {column: place(scored, column, config.method) for column in columns}
    num_pictures = len(scored.captions.pictures)
    verdicts = {result.name: decide(result, placements[result.name], pairs, num_pictures, config) for result in results}
    facts = {
        "pictures": num_pictures,
        "negative_images": config.scorer.others,
        "preset": config.preset,
        **scored.captions.sources,
        **protocol,
        "intervals": "95 %, over pictures: DeLong with clusters (Obuchowski 1997), log-odds, Student's t",
    }
    return Validation(scored, results, placements, verdicts, pairs, config.preset, list(_notes(scored)), facts)


def _notes(scored: ScoredCaptions) -> Iterator[str]:
    """Yield what a reader must know about the labels."""
    captions = scored.captions
    left_out = captions.sources["captions_of_other_pictures"]
    if left_out:
        yield f"{left_out} captions are of pictures without annotations and were left out."
    if captions.habits_known:
        yield (
            "False claims are by habit if the kind is one of the three absent ones that other pictures with the same "
            "objects show, or that their captions name, most often."
        )
    else:
        yield "Too few pictures are labeled to tell false claims by habit from others; the profile has both alike."
    labeled = {kind for picture in captions.pictures for kind in picture.objects}
    false = [claim.claims[0] for claim in captions.claims if claim.truth != "grounded"]
    never = [kind for kind in false if kind not in labeled]
    if len(never) * 2 > len(false):
        yield (
            f"{len(never)} of {len(false)} false claims name kinds that no captioned picture is labeled with, such as "
            f"{never[0]}. If you did not label those, leave them out of the synonym file (--synonyms)."
        )


def _write(validation: Validation, out: Path) -> list[Path]:
    """Write the page, the pictures, the profiles, the numbers and the scored texts."""
    from csr_vlm.report.scorer_page import render_validation, scorer_picture

    written = [out / "report.html"]
    files.write_text(written[0], render_validation(validation))
    for result in validation.results:
        for of in ("sentences", "claims"):
            svg = scorer_picture(validation, result, of, standalone=True)
            if svg:
                written.append(out / f"{of}-{result.name}.svg")
                files.write_text(written[-1], f"{svg}\n")
    for name, text in _profiles(validation):
        written.append(out / name)
        files.write_text(written[-1], text)
    written += [out / "validation.json", out / "texts.jsonl"]
    files.write_json(written[-2], _result(validation))
    rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in _texts(validation.scored))
    files.write_text(written[-1], "".join(rows))
    return written


def _profiles(validation: Validation) -> Iterator[tuple[str, str]]:
    """Yield file names and contents: the first two scorers in one profile, and each of several in its own."""
    from csr_vlm.evaluation.profile_measurement import measured_profile, profile_text

    scored = validation.scored
    wanted = [("profile.yaml", scored.scorers[:2])]
    if len(scored.scorers) > 1:
        wanted += [(f"profile-{name}.yaml", (name,)) for name in scored.scorers]
    shared = validation.pairs[0].shared_claim_error if validation.pairs else None
    for file, names in wanted:
        paths = validation.protocol["scorers"]
        description = "Measured: " + " and ".join(f"{name} ({paths[name]})" for name in names)
        profile = measured_profile(scored, f"measured-{'+'.join(names)}", description, names, shared)
        if profile is not None:
            yield file, profile_text(profile)
        elif file == "profile.yaml":
            console.log("no profile was written: it needs at least 5 true and 5 false sentences, and as many claims")


def _texts(scored: ScoredCaptions) -> Iterator[dict[str, Any]]:
    """Yield every scored text with its truth and its contrasts."""
    for of in ("sentences", "claims"):
        contrasts = {name: scored.contrasts(name, of) for name in scored.scorers}
        for index, text in enumerate(scored.texts(of)):
            picture = scored.captions.pictures[text.picture]
            yield {
                "image": picture.prompt.prompt_id,
                "of": of.removesuffix("s"),
                "kind": text.kind,
                "position": text.position,
                "text": text.text,
                "claims": list(text.claims),
                "truth": text.truth,
                "size": text.size,
                "contrast": {name: round(values[index], 6) for name, values in contrasts.items()},
            }


def _result(validation: Validation) -> dict[str, Any]:
    return {
        "verdicts": [verdict.dump() for verdict in validation.verdicts.values()],
        "scorers": [result.dump() for result in validation.results],
        "placements": [placement.dump() for placement in validation.placements.values()],
        "pairs": [pair.dump() for pair in validation.pairs],
        "notes": list(validation.notes),
        "protocol": dict(validation.protocol),
    }


def _print(validation: Validation) -> None:
    for result in validation.results:
        rows = []
        for of, groups in (("sentences", result.sentences), ("claims", result.claims)):
            for one in groups:
                if not (one.true.n or one.false.n):
                    continue
                auc = one.auc
                cells = ["-", ""] if auc is None else [f"{auc.value:.3f}", interval(auc.low, auc.high, 2)]
                means = ["-" if side.mean is None else f"{side.mean:.3f}" for side in (one.true, one.false)]
                name = one.group if one.group in ("claims", "details") else f"{of}, {one.group}"
                rows.append([name, *cells, *means, str(one.true.n), str(one.false.n)])
        columns = ["", "AUC", "95 %", "true", "false", "n true", "n false"]
        console.print_table(f"{result.name}: AUC and mean contrast", columns, rows)
        verdict = validation.verdicts[result.name]
        print(f"\n{result.name}: {verdict.summary}")
        for line in verdict.advice:
            print(f"- {line}")
        _print_placement(validation, result.name)
        print()
    for pair in validation.pairs:
        shared = [pair.shared_sentence_error, pair.shared_claim_error]
        by_sentence, by_claim = ("-" if value is None else f"{value:.2f}" for value in shared)
        print(f"{pair.first} and {pair.second}: errors correlate {by_sentence} by sentence, {by_claim} by claim")
    for note in validation.notes:
        console.log(f"note: {note}")


def _print_placement(validation: Validation, name: str) -> None:
    placed = validation.placements[name]
    if placed.zero_line is None or placed.true_below_zero is None or placed.false_above_zero is None:
        return
    own = placed.margins[0]
    margin = "" if placed.margin is None else f", margin {placed.margin:.3f}"
    print(
        f"preset {validation.preset}: zero line at contrast {placed.zero_line:.3f}{margin}; "
        f"{placed.true_below_zero:.0%} of the true details are below the line, {placed.false_above_zero:.0%} of the "
        f"false ones above it; {own.right} right : {own.wrong} wrong decisions, {own.undecided} within the margin"
    )
