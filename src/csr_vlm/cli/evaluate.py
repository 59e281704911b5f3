"""``csr eval chair``, ``pope`` and what leads to them: prompts, questions, answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.core.errors import CsrError

if TYPE_CHECKING:
    from csr_vlm.core.progress import Progress
    from csr_vlm.core.records import Finish, Prompt
    from csr_vlm.evaluation.answers import Decoding, Respond
    from csr_vlm.store.run import Run

AnnotationsOption = Annotated[
    Path, typer.Option("--annotations", help="Directory with COCO's instances_*.json and captions_*.json.")
]
Seed = Annotated[int, typer.Option(min=0, help="Which images and objects are drawn.")]
Store = Annotated[
    Path | None, typer.Option("--store", metavar="RUN", help="Keep the result with this run, for csr compare.")
]
AnsweredBy = Annotated[
    int | None,
    typer.Option("--iteration", min=0, help="Whose answers are stored; what stands beside them says so by default."),
]
_ANSWERED_AT_ONCE = 256


def chair(
    captions: Annotated[Path, typer.Option(help="JSON lines: id, image_id, caption.")],
    annotations: AnnotationsOption,
    words: Annotated[
        str, typer.Option(help="How words are read: pattern (as the original), wordnet (as OPERA, lmms-eval), plain.")
    ] = "pattern",
    synonyms: Annotated[
        Path | None, typer.Option(help="Synonym file, such as the original's; our own COCO table by default.")
    ] = None,
    nltk_data: Annotated[
        Path | None, typer.Option(help="nltk_data directory with WordNet and the English tagger, for wordnet.")
    ] = None,
    store: Store = None,
    iteration: AnsweredBy = None,
) -> None:
    """Compute CHAIR of captions: which named objects are not in the image.

    Example: csr eval chair --captions a.jsonl --annotations coco/annotations --words pattern --json
    """
    from csr_vlm.evaluation.annotations import read_annotations
    from csr_vlm.evaluation.answers import read_captions
    from csr_vlm.evaluation.chair import Reader, by_length, counts, evaluate, summarise
    from csr_vlm.evaluation.chair import document as chair_document
    from csr_vlm.evaluation.objects import ObjectTable
    from csr_vlm.evaluation.words import word_rule

    given = read_captions(captions)
    table = ObjectTable.read(synonyms, of_coco=words != "plain") if synonyms else ObjectTable.coco()
    reader = Reader(word_rule(words, table.vocabulary, nltk_data), table)
    found = read_annotations(annotations)
    rows = evaluate(given, _truth(given, found, reader, captions), reader)
    metrics = summarise(rows)
    protocol = {
        "metric": "CHAIR",
        "words": {"rule": words, **reader.rule.source},
        "synonyms": {"file": synonyms.name if synonyms else "csr-vlm's own", "sha256": table.sha256},
        "annotations": dict(found.sources),
        "interval": "95 % percentile bootstrap over captions",
    }
    if store is not None:
        _store(store, iteration, [captions], chair_document(rows, protocol))
    protocol |= _given_by(captions)
    result = {
        **{name: metric.value for name, metric in metrics.items()},
        "n": len(rows),
        "intervals": {name: [metric.low, metric.high] for name, metric in metrics.items()},
        "counts": counts(rows),
        "by_length": by_length(rows),
        **_with_id(protocol),
    }
    if console.mode.json:
        console.print_json({**result, "sentences": [row.dump() for row in rows]})
        return
    _print_rates(f"CHAIR, words by {words}", result)
    print()
    _print_by_length(result["by_length"])
    _print_notes(result)


def pope(
    questions: Annotated[
        list[Path], typer.Option(help="POPE question file; repeat for several settings, or give a directory.")
    ],
    answers: Annotated[
        list[Path], typer.Option(help="JSON lines: question_id, answer; one for each question file, in order.")
    ],
    store: Store = None,
    iteration: AnsweredBy = None,
) -> None:
    """Compute POPE of answers, read by the official parser and by a strict and a lenient one.

    Example: csr eval pope --questions coco_pope_random.json --answers a.jsonl --json
    """
    from csr_vlm.evaluation.pope import document, evaluate, pair_up, read_questions

    question_paths, answer_paths = _files_in(questions), _files_in(answers)
    paired = pair_up([read_questions(path) for path in question_paths], answer_paths)
    parsers = evaluate(paired)
    official = parsers["official"]
    only = next(iter(official["settings"].values())) if len(paired) == 1 else {}
    protocol: dict[str, Any] = {
        "metric": "POPE",
        "questions": [
            {"setting": file.setting, "file": file.name, "n": len(file.questions), "sha256": file.sha256}
            for file, _ in paired
        ],
        "interval": "95 % percentile bootstrap over questions",
    }
    if store is not None:
        _store(store, iteration, answer_paths, document(paired, protocol))
    protocol["answers"] = [_given_by(path) for path in answer_paths]
    result = {
        **only,
        **official["mean"],
        "n": sum(len(file.questions) for file, _ in paired),
        "settings": official["settings"],
        "parsers": parsers,
        **_with_id(protocol),
    }
    if console.mode.json:
        console.print_json(result)
        return
    columns = ["parser, setting", "accuracy", "precision", "recall", "f1", "yes_ratio", "unread"]
    table = []
    for parser, scores in parsers.items():
        for setting, values in scores["settings"].items():
            rates = [_number(values[name]) for name in columns[1:-1]]
            table.append([f"{parser}, {setting}", *rates, str(values["unread"])])
        if len(scores["settings"]) > 1:
            table.append([f"{parser}, mean", *(_number(scores["mean"][name]) for name in columns[1:-1]), ""])
    console.print_table(f"POPE of {result['n']} answers", columns, table)
    for file, _ in paired:
        print(f"{file.setting}: {file.name}")
    _print_undefined(official["settings"])


def pope_build(
    annotations: AnnotationsOption,
    out: Annotated[Path, typer.Option("--out", help="Directory for pope_random.jsonl, _popular, _adversarial.")],
    split: Annotated[str, typer.Option(help="Read only instances_SPLIT.json.")] = "*",
    images: Annotated[int, typer.Option(min=1, help="Images asked about.")] = 500,
    per_image: Annotated[int, typer.Option(min=1, help="Questions of each answer an image.")] = 3,
    seed: Seed = 0,
) -> None:
    """Write POPE-like questions about any images with COCO-format annotations.

    Example: csr eval pope-build --annotations coco/annotations --split val2014 --out questions
    """
    from csr_vlm.evaluation.annotations import read_annotations
    from csr_vlm.evaluation.pope import SETTINGS
    from csr_vlm.evaluation.pope_build import Scenery, build_questions, rows
    from csr_vlm.store.files import write_text

    found = read_annotations(annotations, split)
    objects = {found.file_names.get(key) or str(key): frozenset(names) for key, names in found.instances.items()}
    scenery = Scenery(objects, found.categories)
    written = []
    for setting in SETTINGS:
        questions = build_questions(scenery, setting, num_images=images, per_image=per_image, seed=seed)
        path = out / f"pope_{setting}.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows(questions)))
        written.append(path)
    console.done(*written, then=f"csr eval answer RUN --prompts {written[0]} --images FOLDER --out answers.jsonl")


def chair_prompts(
    annotations: AnnotationsOption,
    out: Annotated[Path, typer.Option("--out", help="Prompt file to write.")],
    split: Annotated[str, typer.Option(help="Read only instances_SPLIT.json.")] = "val2014",
    images: Annotated[int, typer.Option(min=1, help="Images drawn.")] = 500,
    text: Annotated[str, typer.Option(help="What is asked.")] = "Please describe this image in detail.",
    seed: Seed = 0,
) -> None:
    """Draw images for CHAIR and write the prompts that ask for their captions.

    Example: csr eval chair-prompts --annotations coco/annotations --out chair.jsonl
    """
    import random

    from csr_vlm.evaluation.annotations import read_annotations
    from csr_vlm.store.files import write_text

    found = read_annotations(annotations, split)
    named = sorted((name, key) for key, name in found.file_names.items() if name)
    if len(named) < images:
        raise CsrError(f"the annotations name {len(named)} images", f"ask for fewer with --images {len(named)}")
    drawn = random.Random(seed).sample(named, images)
    rows = [{"id": str(key), "image_id": key, "image": name, "text": text} for name, key in drawn]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    console.done(
        out, then=f"csr eval answer RUN --prompts {out} --images FOLDER --out captions.jsonl", prompts=len(rows)
    )


def answer(
    target: RunArgument,
    prompts: Annotated[Path, typer.Option(help="JSON lines: id (or question_id), image, text.")],
    out: Annotated[Path, typer.Option("--out", help="Captions or answers to write; the protocol beside them.")],
    iteration: Annotated[int | None, typer.Option(min=0, help="Whose policy; 0: base; by default the result.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images; the prompt file's by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="64 and 512 are usual for CHAIR.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished", help="Keep a caption's last sentence where the limit cut it.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first so many.")] = None,
) -> None:
    """Let a run's policy caption images or answer questions, for csr eval chair and csr eval pope.

    Example: csr eval answer runs/a --prompts chair.jsonl --images val2014 --out a.jsonl
    """
    from csr_vlm.store.run import Run

    opened = Run.open(target)
    number = opened.final if iteration is None else iteration
    _require_policy(opened, number)
    console.quiet_libraries()
    from csr_vlm.evaluation import answers
    from csr_vlm.evaluation.compare import policy_name

    asked = answers.read_asked(prompts, images, limit)
    decoding = answers.Decoding(max_new_tokens, temperature, seed, drop_unfinished=not keep_unfinished)
    with console.reporter().stage(f"{policy_name(number)}: answering", len(asked)) as progress:
        rows, protocol = answers.answer(
            asked,
            _respond(opened, number, decoding, progress),
            decoding,
            {"model": opened.config.model.path, "run": str(target), "iteration": number},
        )
    answers.write_answers(out, rows, protocol)
    if protocol["unfinished"]:
        console.log(f"{protocol['unfinished']} of {len(rows)} ran into {max_new_tokens} tokens")
    then = f"csr eval chair --captions {out} --annotations COCO, or csr eval pope --questions {prompts} --answers {out}"
    console.done(out, then=then, rows=len(rows), protocol=protocol)


def _require_policy(run: Run, iteration: int) -> None:
    if iteration and not run.is_done(iteration, "train"):
        raise CsrError(f"iteration {iteration} of {run.root} has no adapter", f"the last one is {run.last_trained}")


def _store(root: Path, iteration: int | None, answers: Sequence[Path], document: dict[str, Any]) -> None:
    """Keep an evaluation with the policy that gave the answers."""
    from csr_vlm.evaluation.answers import chosen_in, read_protocol
    from csr_vlm.store import files
    from csr_vlm.store.run import Run

    run = Run.open(root)
    generated = [read_protocol(path) for path in answers]
    said = {found["policy"].get("iteration") for found in generated if found is not None} - {None}
    numbers = said if iteration is None else {iteration}
    if len(numbers) != 1 or not said <= numbers:
        named = " and ".join(f"iteration {number}" for number in sorted(said)) or "nobody knows which iteration"
        raise CsrError(f"the answers are by {named}", "give --iteration N, and the answers of that policy alone")
    (number,) = numbers
    _require_policy(run, number)
    ids = [row["id"] for row in document["rows"]]
    if len(set(ids)) < len(ids):
        raise CsrError(f"{len(ids) - len(set(ids))} ids come twice", "each row needs its own id to be compared by")
    stored = {**document, "protocol": {**document["protocol"], **chosen_in(generated)}}
    path = run.evaluation_path(number, str(document["protocol"]["metric"]).lower())
    with run.locked():
        files.write_json(path, stored)
    console.log(f"stored in {path}; next: csr eval {root} and csr compare {root} show it")


def _respond(run: Run, iteration: int, decoding: Decoding, progress: Progress) -> Respond:
    """Return what answers prompts with the policy of an iteration."""
    from csr_vlm.core.batching import batched
    from csr_vlm.generation.transformers_engine import TransformersEngine
    from csr_vlm.models.loading import load_policy

    policy = load_policy(run.config.model, run.adapter_path(iteration), run.config.data.max_image_pixels)
    generation = run.config.generation
    engine = TransformersEngine(policy, generation.max_rows, generation.attention)

    def respond(prompts: Sequence[Prompt]) -> Iterator[tuple[str, Finish]]:
        for chunk in batched(prompts, _ANSWERED_AT_ONCE):
            found = engine.respond(chunk, decoding.max_new_tokens, decoding.temperature, decoding.seed)
            yield from ((candidate.text, candidate.finish) for candidate in found)
            engine.forget()
            progress.advance(len(chunk))

    return respond


def _truth(captions: Sequence[Any], annotations: Any, reader: Any, path: Path) -> Mapping[Any, Any]:
    """Return the objects of every captioned image, under the name that its caption gives it."""
    from csr_vlm.evaluation.annotations import truth_of

    ids = {caption.image_id: annotations.find(caption.image_id) for caption in captions}
    unknown = [str(name) for name, found in ids.items() if found is None]
    if unknown:
        raise CsrError(
            f"{path}: the annotations know nothing of {len(unknown)} images, such as {', '.join(unknown[:3])}",
            "image_id is COCO's number or the file name; are these the right annotations?",
        )
    truth = truth_of(annotations, set(ids.values()), reader)
    return {name: truth[found] for name, found in ids.items()}


def _given_by(path: Path) -> dict[str, Any]:
    """Say which answers these are, and how they were generated if that is known."""
    from csr_vlm.evaluation.answers import read_protocol
    from csr_vlm.store.files import sha256_of

    return {"answers_sha256": sha256_of(path), "generation": read_protocol(path)}


def _with_id(protocol: dict[str, Any]) -> dict[str, Any]:
    from csr_vlm.store.files import digest

    return {"protocol": protocol, "protocol_id": digest(protocol)}


def _files_in(paths: Sequence[Path]) -> list[Path]:
    """Replace directories by their JSON files."""
    found = [file for path in paths for file in (sorted(path.glob("*.json*")) if path.is_dir() else [path])]
    return [file for file in found if not file.name.endswith(".protocol.json")]


def _print_rates(title: str, result: Mapping[str, Any]) -> None:
    rows = []
    for name, (low, high) in result["intervals"].items():
        interval = "-" if low is None else f"{_number(low)} to {_number(high)}"
        rows.append([name, _number(result[name]), interval])
    console.print_table(title, ["", "", "95 %"], rows)


def _print_by_length(parts: Sequence[Mapping[str, Any]]) -> None:
    names = ["chair_s", "chair_i", "recall", "f1"]
    rows = [
        ["-".join(map(str, part["words"])), str(part["n"]), *(_number(part[name]) for name in names)] for part in parts
    ]
    console.print_table("by length", ["words", "n", *names], rows)


def _print_notes(result: Mapping[str, Any]) -> None:
    shown = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in result["counts"].items())
    print(f"\n{shown}")
    if result["protocol"]["generation"] is None:
        console.log("how the captions were generated is not known: no protocol stands beside them")


def _print_undefined(settings: Mapping[str, Mapping[str, Any]]) -> None:
    for setting, values in settings.items():
        for name, reason in values["undefined"].items():
            print(f"{setting}: {name} is undefined, since {reason}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 10 else f"{value:.1f}"


EVAL_COMMANDS: Mapping[str, Callable[..., None]] = {
    "chair": chair,
    "chair-prompts": chair_prompts,
    "pope": pope,
    "pope-build": pope_build,
    "answer": answer,
}
