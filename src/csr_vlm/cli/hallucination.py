"""Implement ``csr eval hallucination``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.core.errors import CsrError

if TYPE_CHECKING:
    from csr_vlm.evaluation.hallucination.suite import Suite
    from csr_vlm.evaluation.judge import Judge
    from csr_vlm.store.run import Run


def eval_hallucination(
    target: RunArgument,
    suite: Annotated[str, typer.Option(help="Comma-separated: chair, pope, amber, objecthal, mmhal, hallusion.")],
    chair: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CHAIR's prompts (csr eval chair-prompts).")
    ] = None,
    pope: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="POPE question file; repeatable.")] = None,
    amber: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkout of AMBER; its script is run.")] = None,
    objecthal: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkout of RLAIF-V.")] = None,
    mmhal: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkout of MMHal-Bench, with images.")] = None,
    hallusion: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkout of HallusionBench, with hallusion_bench.")
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="DIR", help="COCO's annotations, for chair and objecthal.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="COCO's images (default: next to the prompts).")
    ] = None,
    words: Annotated[str, typer.Option(help="CHAIR's word rule: pattern, wordnet or plain.")] = "pattern",
    synonyms: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CHAIR's synonym file (default: built-in COCO table).")
    ] = None,
    nltk_data: Annotated[Path | None, typer.Option(metavar="DIR", help="nltk_data, for --words wordnet.")] = None,
    amber_images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="AMBER's images (default: image in the checkout).")
    ] = None,
    amber_python: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Interpreter with spaCy for AMBER's script (default: this one).")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible endpoint, such as http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(metavar="NAME", help="Model that judges.")] = None,
    judge_price: Annotated[
        str | None, typer.Option(metavar="IN,OUT", help="Dollars per million input and output tokens.")
    ] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Print what the judge will cost; run nothing.")] = False,
    iteration: Annotated[
        list[int] | None,
        typer.Option("--iteration", min=0, help="Iteration; repeatable (default: base model and result)."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of questions per part, for a quick test.")] = None,
) -> None:
    """Run hallucination benchmarks with the adapter off and on.

    Answers and results are stored in the run, for csr compare. Object HalBench and MMHal-Bench are scored by a judge;
    its key is read from JUDGE_API_KEY.

    Example: csr eval hallucination runs/a --suite hallusion --hallusion HallusionBench
    """
    from csr_vlm.evaluation.hallucination.suites import Sources, build_suites, run_suites
    from csr_vlm.store.run import Run

    run = Run.open(target)
    sources = Sources(
        chair=chair, pope=pope or (), amber=amber, objecthal=objecthal, mmhal=mmhal, hallusion=hallusion,
        annotations=annotations, images=images, words=words, synonyms=synonyms, nltk_data=nltk_data,
        amber_images=amber_images, amber_python=amber_python, limit=limit,
    )  # fmt: skip
    suites = build_suites([name.strip() for name in suite.split(",") if name.strip()], sources)
    numbers = sorted(set(iteration)) if iteration is not None else sorted({0, run.final})
    judge = _judge(run, suites, judge_url, judge_model, judge_price, len(numbers), estimate)
    if estimate:
        return
    console.quiet_libraries()
    from csr_vlm.models.loading import load_prompt_encoder
    from csr_vlm.models.prompt_check import ProcessorCheck

    with run.locked():
        check = ProcessorCheck(load_prompt_encoder(run.config.model, run.config.data.max_image_pixels))
        documents = run_suites(run, suites, numbers, check, judge, console.reporter())
    _print(target, documents)


def _judge(
    run: Run,
    suites: Sequence[Suite],
    url: str | None,
    model: str | None,
    price: str | None,
    num_policies: int,
    estimate: bool,
) -> Judge | None:
    """Return the judge that the suites need, after saying what it will cost.

    Raises:
        CsrError: A suite needs a judge and none is given, or an option is unusable.
    """
    from csr_vlm.evaluation.judge import Judge, JudgeSettings, estimate_cost

    judged = [suite.name for suite in suites if suite.judged]
    if not judged:
        if estimate:
            raise CsrError("none of these suites has a judge", "leave out --estimate")
        return None
    if not url or not model:
        raise CsrError(
            f"{' and '.join(judged)}: a language model scores the answers",
            "give --judge-url and --judge-model, and its key in JUDGE_API_KEY",
        )
    settings = JudgeSettings(url, model, price=_price(price))
    judge = Judge(settings, run.root / "hallucination" / "judge")
    cost = estimate_cost(settings, [chars for suite in suites for chars in suite.request_chars()] * num_policies)
    if estimate and console.mode.json:
        console.print_json({"judge": model, **asdict(cost)})
    elif estimate:
        print(cost.describe(model))
    else:
        console.log(cost.describe(model))
    return judge


def _price(text: str | None) -> tuple[float, float] | None:
    """Parse two prices.

    Raises:
        CsrError: The text is not two numbers.
    """
    if text is None:
        return None
    try:
        prices = [float(part) for part in text.split(",")]
    except ValueError:
        prices = []
    if len(prices) != 2 or not all(0 <= value < float("inf") for value in prices):
        raise CsrError(f"{text!r} is not a price", "write dollars per million tokens in and out, such as 2.5,10")
    return prices[0], prices[1]


def _print(target: Path, documents: Mapping[int, Mapping[str, dict[str, Any]]]) -> None:
    """Print every suite's metrics by policy, the hash of its protocol, and who judged."""
    from csr_vlm.store.files import digest

    if console.mode.json:
        console.print_json(
            [
                {
                    "iteration": number,
                    "suite": name,
                    "metrics": document["metrics"],
                    "protocol": document["protocol"],
                    "protocol_id": digest(document["protocol"]),
                    "outcome": document.get("outcome"),
                }
                for number, by_name in documents.items()
                for name, document in by_name.items()
            ]
        )
        return
    for name in next(iter(documents.values())):
        by_number = {number: by_name[name] for number, by_name in documents.items()}
        first = next(iter(by_number.values()))["protocol"]
        judges = sorted({name for document in by_number.values() for name in _judges(document)})
        title = f"{name}, {first['suite']}" + (f", judged by {', '.join(judges)}" if judges else "")
        console.print_metrics(title, {number: document["metrics"] for number, document in by_number.items()})
        for number, document in by_number.items():
            unread = document.get("outcome", {}).get("unread", 0)
            if unread:
                console.log(f"iteration {number}: {unread} replies of the judge could not be read and are left out")
            console.log(f"iteration {number}: {name} protocol {digest(document['protocol'])}")
    console.log(f"next: csr compare {target} tests the differences; csr reproduce {target} shows published numbers")


def _judges(document: Mapping[str, Any]) -> list[str]:
    judge = document["protocol"].get("judge", {})
    return list(judge.get("served_by", ()))
