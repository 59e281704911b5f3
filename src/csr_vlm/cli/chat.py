"""Implement ``csr chat``: ask the policies of a run about one picture, in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument
from csr_vlm.cli.sanitize import printable
from csr_vlm.core.errors import CsrError
from csr_vlm.core.records import Prompt
from csr_vlm.store.run import Run

if TYPE_CHECKING:
    from csr_vlm.method.claim_places import Mark
    from csr_vlm.playground.answering import Sampling
    from csr_vlm.playground.session import Playground

_HELP = """\
Write a question, or:
  /ask THING          ask every policy whether the thing is there; without THING, about the doubted claims
  /policies A, B      answer with these policies
  /picture PATH       look at another picture
  /temperature X      0 is greedy
  /quit"""
_STYLES = {"supported": "green", "unclear": "dim", "doubted": "bold red underline"}


def chat(
    target: RunArgument,
    picture: Annotated[Path, typer.Argument(help="Picture to ask about.")],
    question: Annotated[
        str | None, typer.Argument(help="Question; without it, questions are read from the terminal.")
    ] = None,
    iteration: Annotated[
        list[int] | None, typer.Option(min=0, help="Iteration; 0 is the base model; may be repeated.")
    ] = None,
    ask: Annotated[
        list[str] | None, typer.Option("--ask", help="Thing to ask about with yes or no; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Probability mass of nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")] = 0,
) -> None:
    """Ask base model and iterations about a picture.

    One model is loaded; its LoRA is switched between answers. The claims of each answer are followed by their evidence
    in nats: what the run's scorer doubts is negative.

    Example: csr chat runs/d0 photo.jpg "Describe this image." --ask umbrella
    """
    run = Run.open(target)
    console.quiet_libraries()
    from csr_vlm.evaluation.compare import policy_name
    from csr_vlm.playground.answering import Sampling
    from csr_vlm.playground.session import Playground

    with console.reporter().stage("loading the model", 0):
        playground = Playground([run])
    numbers = iteration or list(dict.fromkeys((0, run.last_trained)))
    policies = [policy_name(number) for number in numbers]
    playground.require(policies)
    playground.check_picture(picture)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    conversation = _Conversation(playground, policies, picture, sampling)
    if question is None and not ask:
        if console.mode.json:
            raise CsrError("--json needs a question", "give it as an argument, or a thing with --ask")
        conversation.read_questions()
        return
    answers = [] if question is None else conversation.answer(question)
    asked = conversation.ask(ask) if ask else []
    if console.mode.json:
        console.print_json({"picture": str(picture), "question": question, "answers": answers, "asked": asked})


@dataclass
class _Conversation:
    """Answer questions about the current picture, and print the answers unless JSON is wanted."""

    playground: Playground
    policies: Sequence[str]
    picture: Path
    sampling: Sampling
    _doubted: Sequence[str] = ()
    """Claims of the last answers that the scorer doubts."""

    def read_questions(self) -> None:
        """Read questions and commands until the end of the input."""
        console.log(f"{_HELP}\nEmpty line: {self.playground.question}")
        while (line := self._read()) is not None:
            try:
                if line.startswith("/"):
                    if not self._command(*line[1:].split(maxsplit=1)):
                        return
                else:
                    self.answer(line or self.playground.question)
            except CsrError as error:
                print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)

    def _read(self) -> str | None:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        return line.strip() if line else None

    def _command(self, name: str = "", argument: str = "") -> bool:
        """Run a command; return whether to go on."""
        if name == "ask":
            self.ask([argument] if argument else self._doubted)
        elif name == "policies":
            policies = [part.strip() for part in argument.split(",") if part.strip()]
            self.playground.require(policies)
            self.policies = policies or self.playground.policies
        elif name == "picture":
            self.playground.check_picture(Path(argument))
            self.picture = Path(argument)
        elif name == "temperature":
            self.sampling = replace(self.sampling, temperature=_temperature(argument))
        elif name in ("quit", "exit", "q"):
            return False
        else:
            console.log(_HELP)
        return True

    def answer(self, question: str) -> list[dict[str, Any]]:
        """Answer a question with every policy."""
        prompt = Prompt("chat", str(self.picture.resolve()), question)
        answers = []
        doubted: list[str] = []
        for policy in self.policies:
            text = ""
            for piece in self._pieces(policy, prompt):
                text += piece
                self._print(printable(piece), end="")
            marks = self.playground.marks(prompt, text)
            self._print()
            self._print_claims(marks)
            doubted += [mark.thing for mark in marks if mark.nats < 0]
            answers.append(
                {"policy": policy, "text": text, "claims": [vars(mark) | {"level": mark.level} for mark in marks]}
            )
        self._doubted = list(dict.fromkeys(doubted))
        return answers

    def ask(self, things: Sequence[str]) -> list[dict[str, Any]]:
        """Ask every policy whether things are in the picture."""
        picture = str(self.picture.resolve())
        questions = [self.playground.claim_question(thing) for thing in things]
        rows = [
            [self.playground.probability_of_yes(policy, picture, question) for policy in self.policies]
            for question in questions
        ]
        if not questions:
            console.log("the scorer doubts nothing here; name a thing, such as /ask umbrella")
        elif not console.mode.json:
            cells = [[question, *map("{:.3f}".format, row)] for question, row in zip(questions, rows, strict=True)]
            console.print_table("", ["P(yes)", *self.policies], cells)
        return [
            {"question": question, "probability_of_yes": dict(zip(self.policies, row, strict=True))}
            for question, row in zip(questions, rows, strict=True)
        ]

    def _pieces(self, policy: str, prompt: Prompt) -> Iterator[str]:
        """Yield what each step adds to the answer."""
        from rich.text import Text

        if not console.mode.json:
            console.terminal().print(Text(f"\n{policy}", style="bold"))
        done = ""
        for text in self.playground.answer(policy, prompt, self.sampling):
            yield text.removeprefix(done) if text.startswith(done) else ""
            done = text

    def _print(self, text: str = "", end: str = "\n") -> None:
        if not console.mode.json:
            print(text, end=end, flush=True)

    def _print_claims(self, marks: Sequence[Mark]) -> None:
        if console.mode.json or not marks:
            return
        from rich.text import Text

        line = Text("evidence in nats: ", style="dim")
        for thing, mark in {mark.thing: mark for mark in marks}.items():
            line.append(printable(thing), style=_STYLES[mark.level])
            line.append(f" {mark.nats:+.1f}  ")
        console.terminal().print(line, soft_wrap=True)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 100:
        raise CsrError(f"{text!r} is not a temperature", "write a number from 0 on, such as /temperature 0.7")
    return value
