"""Implement ``csr eval``: CHAIR, POPE, test scenes, and the prompts, questions and answers that they need."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.cli.common import RunByDefault
from csr_vlm.cli.hallucination import eval_hallucination
from csr_vlm.cli.lmms import eval_lmms
from csr_vlm.config.load import load_config
from csr_vlm.core.errors import CsrError

AnnotationsOption = Annotated[
    Path, typer.Option("--annotations", help="Directory with COCO's instances_*.json and captions_*.json.")
]
Seed = Annotated[int, typer.Option(min=0, help="Random seed of images and objects.")]
Store = Annotated[
    Path | None, typer.Option("--store", metavar="RUN", help="Store the result in this run, for csr compare.")
]
AnsweredBy = Annotated[
    int | None,
    typer.Option("--iteration", min=0, help="Iteration that gave the answers (default: from their protocol file)."),
]

app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Evaluate the policies of a run: csr eval RUN.",
)


def evaluate_run(
    target: RunArgument,
    again: Annotated[bool, typer.Option("--again", help="Repeat the evaluations that the recipe configures.")] = False,
) -> None:
    """Print all metrics of a run; compute missing ones.

    Example: csr eval runs/d0
    """
    from csr_vlm.store.run import Run

    run = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation.compare import evaluated_iterations, read_documents
    from csr_vlm.pipeline import stages

    numbers = range(run.last_trained + 1)
    if again or not all(run.is_done(number, "evaluate") for number in numbers):
        with run.locked():
            for number in numbers:
                stages.evaluate(run, number, console.reporter(), again)
    documents = {number: read_documents(run, number) for number in evaluated_iterations(run)}
    if not documents:
        raise CsrError(f"{target} has no evaluation", "set evaluation in its recipe, or see csr eval --help")
    if console.mode.json:
        measured = [
            {"iteration": number, "evaluation": name, "metrics": document["metrics"], "protocol": document["protocol"]}
            for number, by_name in documents.items()
            for name, document in by_name.items()
        ]
        console.print_json({"run": str(target), "measured": measured})
        return
    for name in sorted({name for by_name in documents.values() for name in by_name}):
        by_iteration = {number: by_name[name] for number, by_name in documents.items() if name in by_name}
        console.print_metrics(
            f"{name}, with 95 % intervals", {number: document["metrics"] for number, document in by_iteration.items()}
        )
        for protocol in _distinct([document["protocol"] for document in by_iteration.values()]):
            console.log(f"{name}: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    console.log(f"next: csr compare {target} tests the differences prompt by prompt")


def evaluate_world(
    target: RunArgument,
    scenes: Annotated[int, typer.Option(min=10, help="Number of test scenes.")] = 1000,
    world_seed: Annotated[int, typer.Option(min=0, help="Random seed of the scenes: 0 to 9999.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
) -> None:
    """Evaluate every policy of a run on test scenes.

    Example: csr eval world runs/d0 --scenes 1000 --world-seed 7 --json
    """
    from csr_vlm.store.run import Run

    run = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation.compare import policy_name
    from csr_vlm.pipeline import policy_evaluation

    reporter = console.reporter()
    overrides = [f"evaluation.world.num_scenes={scenes}", f"evaluation.world.seed={world_seed}"]
    config = load_config(None, overrides, base=run.config.dump())
    documents: dict[int, Any] = {}
    for number in range(run.last_trained + 1):
        documents[number] = policy_evaluation.evaluate_world(
            config, run.adapter_path(number), policy_name(number), reporter, temperature
        )
    if console.mode.json:
        iterations = [
            {"iteration": number, "metrics": document["metrics"], "protocol": document["protocol"]}
            for number, document in documents.items()
        ]
        console.print_json({"run": str(target), "iterations": iterations})
    else:
        console.print_metrics(f"{scenes} test scenes", {n: document["metrics"] for n, document in documents.items()})


def chair(
    captions: Annotated[Path, typer.Option(help="JSON Lines with id, image_id, caption.")],
    annotations: AnnotationsOption,
    words: Annotated[
        str, typer.Option(help="Word rule: pattern (original CHAIR), wordnet (OPERA, lmms-eval) or plain.")
    ] = "pattern",
    synonyms: Annotated[
        Path | None, typer.Option(help="Synonym file, such as the original's (default: built-in COCO table).")
    ] = None,
    nltk_data: Annotated[
        Path | None, typer.Option(help="nltk_data directory with WordNet and the English tagger, for --words wordnet.")
    ] = None,
    store: Store = None,
    iteration: AnsweredBy = None,
) -> None:
    """Compute CHAIR: objects named in captions but not in images.

    Example: csr eval chair --captions a.jsonl --annotations coco/annotations
    """
    from csr_vlm.evaluation.annotations import read_annotations, truth_of
    from csr_vlm.evaluation.answers import read_captions
    from csr_vlm.evaluation.chair import by_length, counts, evaluate, object_reader, summarize
    from csr_vlm.evaluation.chair import evaluation_document as chair_document
    from csr_vlm.evaluation.chair import protocol as chair_protocol

    captions_read = read_captions(captions)
    reader, table_name = object_reader(words, synonyms, nltk_data)
    coco = read_annotations(annotations)
    rows = evaluate(captions_read, truth_of(captions_read, coco, reader, captions), reader)
    metrics = summarize(rows)
    protocol = chair_protocol(reader, table_name, coco.sources)
    if store is not None:
        _store(store, iteration, [captions], chair_document(rows, protocol))
    protocol |= _answers_protocol(captions)
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
    _print_rates(f"CHAIR, word rule {words}", result)
    print()
    _print_by_length(result["by_length"])
    _print_notes(result)


def pope(
    questions: Annotated[list[Path], typer.Option(help="POPE question file, or a directory of them; repeatable.")],
    answers: Annotated[
        list[Path], typer.Option(help="JSON Lines with question_id, answer; one file per question file.")
    ],
    store: Store = None,
    iteration: AnsweredBy = None,
) -> None:
    """Compute POPE with the official and two other parsers.

    Example: csr eval pope --questions coco_pope_random.json --answers a.jsonl --json
    """
    from csr_vlm.evaluation.pope import evaluate, evaluation_document, match_answers, read_questions
    from csr_vlm.evaluation.pope import protocol as pope_protocol

    question_paths, answer_paths = _files_in(questions), _files_in(answers)
    paired = match_answers([read_questions(path) for path in question_paths], answer_paths)
    parsers = evaluate(paired)
    official = parsers["official"]
    single_setting = next(iter(official["settings"].values())) if len(paired) == 1 else {}
    protocol = pope_protocol([file for file, _ in paired])
    if store is not None:
        _store(store, iteration, answer_paths, evaluation_document(paired, protocol))
    protocol["answers"] = [_answers_protocol(path) for path in answer_paths]
    result = {
        **single_setting,
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
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 500,
    per_image: Annotated[int, typer.Option(min=1, help="Number of yes and of no questions per image.")] = 3,
    seed: Seed = 0,
) -> None:
    """Write POPE questions from COCO-format annotations.

    Example: csr eval pope-build --annotations coco/annotations --out questions
    """
    from csr_vlm.evaluation.annotations import read_annotations
    from csr_vlm.evaluation.pope import SETTINGS
    from csr_vlm.evaluation.pope_build import Scenery, build_questions, rows
    from csr_vlm.store.files import write_text

    coco = read_annotations(annotations, split)
    objects = {coco.file_names.get(key) or str(key): frozenset(names) for key, names in coco.instances.items()}
    scenery = Scenery(objects, coco.categories)
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
    images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 500,
    text: Annotated[str, typer.Option(help="Text of every prompt.")] = "Please describe this image in detail.",
    seed: Seed = 0,
) -> None:
    """Sample images and write caption prompts for CHAIR.

    Example: csr eval chair-prompts --annotations coco/annotations --out chair.jsonl
    """
    import random

    from csr_vlm.evaluation.annotations import read_annotations
    from csr_vlm.store.files import write_text

    coco = read_annotations(annotations, split)
    named = sorted((name, key) for key, name in coco.file_names.items() if name)
    if len(named) < images:
        raise CsrError(f"the annotations name only {len(named)} images", f"use --images {len(named)}")
    sampled = random.Random(seed).sample(named, images)
    rows = [{"id": str(key), "image_id": key, "image": name, "text": text} for name, key in sampled]
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    console.done(
        out, then=f"csr eval answer RUN --prompts {out} --images FOLDER --out captions.jsonl", prompts=len(rows)
    )


def answer(
    target: RunArgument,
    prompts: Annotated[Path, typer.Option(help="JSON Lines with id (or question_id), image, text.")],
    out: Annotated[Path, typer.Option("--out", help="File for the answers; the protocol is written next to it.")],
    iteration: Annotated[
        int | None, typer.Option(min=0, help="Iteration; 0 is the base model (default: result).")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images (default: that of the prompt file).")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens; 64 or 512 are common for CHAIR.")
    ] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")] = 0,
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished", help="Keep a last sentence that the token limit cut off.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of prompts to answer (default: all).")] = None,
) -> None:
    """Answer prompts with a run's policy, for chair and pope.

    Example: csr eval answer runs/a --prompts chair.jsonl --out a.jsonl
    """
    from csr_vlm.store.run import Run

    run = Run.open(target)
    number = run.final if iteration is None else iteration
    console.quiet_libraries()
    from csr_vlm.evaluation import answers, resumable_answers
    from csr_vlm.evaluation.compare import policy_name
    from csr_vlm.models.loading import load_prompt_encoder
    from csr_vlm.models.prompt_check import ProcessorCheck

    resumable_answers.require_policy(run, number)
    policies = resumable_answers.SwitchedPolicies(run, [number])
    check = ProcessorCheck(load_prompt_encoder(run.config.model, run.config.data.max_image_pixels))
    read_prompts = answers.read_evaluation_prompts(prompts, images, limit, out.parent / "images", check)
    decoding = answers.AnswerSettings(max_new_tokens, temperature, seed, drop_unfinished=not keep_unfinished)
    journal = out.with_suffix(".partial.jsonl")
    with console.reporter().stage(f"{policy_name(number)}: answering", len(read_prompts)) as progress:
        rows, protocol = answers.answer_prompts(
            read_prompts,
            resumable_answers.policy_responder(
                lambda: policies.using(number),
                decoding,
                progress,
                journal,
                resumable_answers.identify_policy(run, number),
            ),
            decoding,
            {"model": run.config.model.path, "run": str(target), "iteration": number},
        )
    answers.write_answers(out, rows, protocol)
    journal.unlink(missing_ok=True)
    if protocol["unfinished"]:
        console.log(f"{protocol['unfinished']} of {len(rows)} answers reached the limit of {max_new_tokens} tokens")
    then = f"csr eval chair --captions {out} --annotations COCO, or csr eval pope --questions {prompts} --answers {out}"
    console.done(out, then=then, rows=len(rows), protocol=protocol)


def _store(root: Path, iteration: int | None, answers: Sequence[Path], document: dict[str, Any]) -> None:
    """Store an evaluation in the run whose policy gave the answers.

    Raises:
        CsrError: The iteration is unknown, ambiguous or not trained, or a row id is repeated.
    """
    from csr_vlm.evaluation.answers import generation_settings, read_protocol
    from csr_vlm.evaluation.resumable_answers import require_policy
    from csr_vlm.store import files
    from csr_vlm.store.run import Run

    run = Run.open(root)
    generated = [read_protocol(path) for path in answers]
    recorded = {answered["policy"].get("iteration") for answered in generated if answered is not None} - {None}
    numbers = recorded if iteration is None else {iteration}
    if len(numbers) != 1 or not recorded <= numbers:
        named = " and ".join(f"iteration {number}" for number in sorted(recorded)) or "an unknown iteration"
        raise CsrError(f"the answers are by {named}", "give --iteration N and only answers of that policy")
    (number,) = numbers
    require_policy(run, number)
    ids = [row["id"] for row in document["rows"]]
    if len(set(ids)) < len(ids):
        raise CsrError(f"repeated row ids: {len(ids) - len(set(ids))}", "every row needs its own id")
    stored = {**document, "protocol": {**document["protocol"], **generation_settings(generated)}}
    path = run.evaluation_path(number, str(document["protocol"]["metric"]).lower())
    with run.locked():
        files.write_checksummed(path, stored)
    console.log(f"stored in {path}; next: csr eval {root}; csr compare {root}")


def _answers_protocol(path: Path) -> dict[str, Any]:
    """Return the digest of a file of answers, and how they were generated if that is known."""
    from csr_vlm.evaluation.answers import read_protocol
    from csr_vlm.store.files import sha256_of

    return {"answers_sha256": sha256_of(path), "generation": read_protocol(path)}


def _with_id(protocol: dict[str, Any]) -> dict[str, Any]:
    from csr_vlm.store.files import digest

    return {"protocol": protocol, "protocol_id": digest(protocol)}


def _files_in(paths: Sequence[Path]) -> list[Path]:
    """List files, with directories replaced by their JSON files."""
    expanded = [file for path in paths for file in (sorted(path.glob("*.json*")) if path.is_dir() else [path])]
    return [file for file in expanded if not file.name.endswith(".protocol.json")]


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
        console.log("it is unknown how the captions were generated: there is no protocol file next to them")


def _print_undefined(settings: Mapping[str, Mapping[str, Any]]) -> None:
    for setting, values in settings.items():
        for name, reason in values["undefined"].items():
            print(f"{setting}: {name} is undefined because {reason}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 10 else f"{value:.1f}"


def _distinct(protocols: Sequence[Any]) -> list[Any]:
    return [protocol for index, protocol in enumerate(protocols) if protocol not in protocols[:index]]


app.command("run")(evaluate_run)
app.command("chair-prompts")(chair_prompts)
app.command("pope-build")(pope_build)
app.command("answer")(answer)
app.command("chair")(chair)
app.command("pope")(pope)
app.command("world")(evaluate_world)
app.command("lmms")(eval_lmms)
app.command("hallucination")(eval_hallucination)
