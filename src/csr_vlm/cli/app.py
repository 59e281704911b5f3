"""Register the verbs of ``csr`` and run the command line; each verb is implemented in the module of its name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from csr_vlm.cli import INTERRUPTED, error_messages, evaluate, world
from csr_vlm.cli.ablate import ablate
from csr_vlm.cli.analyze import analyze
from csr_vlm.cli.audit import audit
from csr_vlm.cli.chat import chat
from csr_vlm.cli.check import check
from csr_vlm.cli.common import Verbs
from csr_vlm.cli.compact import compact
from csr_vlm.cli.compare import compare
from csr_vlm.cli.convert import convert
from csr_vlm.cli.demo import demo
from csr_vlm.cli.env import env
from csr_vlm.cli.export import export
from csr_vlm.cli.generate import generate
from csr_vlm.cli.help import show_help
from csr_vlm.cli.init import init
from csr_vlm.cli.merge import merge
from csr_vlm.cli.pairs import pairs
from csr_vlm.cli.push import push
from csr_vlm.cli.recipes import recipes
from csr_vlm.cli.report import report
from csr_vlm.cli.reproduce import reproduce
from csr_vlm.cli.run import run
from csr_vlm.cli.score import score
from csr_vlm.cli.show import show
from csr_vlm.cli.signals import Stopped
from csr_vlm.cli.sweep import sweep
from csr_vlm.cli.train import train
from csr_vlm.cli.try_page import try_page
from csr_vlm.cli.validate_scorer import validate_scorer
from csr_vlm.cli.version import print_version_and_exit, version
from csr_vlm.cli.watch import watch

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Calibrated Self-Rewarding: reduce hallucination in vision-language models, without labels.",
    epilog="""Start with: csr demo, or csr init for your own model. Every verb has an example: csr help VERB.

\b
Exit codes:
  0    success
  1    error; stderr says what went wrong and what to do
  2    usage error: unknown verb or option
  3    a --fail-if rule holds, or the audit says stop
  130  interrupted, 143 terminated; rerun the same command to resume""",
)


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version_and_exit, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Hold the options of ``csr`` itself."""


_VERBS: Sequence[Callable[..., None]] = (
    *(init, recipes, run, demo, check, watch),
    *(show, chat, report, audit, analyze),
    *(compare, reproduce, validate_scorer),
    *(export, merge, push),
    *(generate, score, pairs, train, sweep, ablate, convert, compact, env, version),
)
for _verb in _VERBS:
    app.command()(_verb)
app.add_typer(evaluate.app, name="eval")
app.add_typer(world.app, name="world")
app.command("help")(show_help)
app.command("try")(try_page)


def main() -> None:
    """Run the command line; errors are printed without a traceback."""
    try:
        code = app(prog_name="csr", standalone_mode=False)
    except Stopped:
        raise  # the signal handler has printed how to resume
    except Exception as error:
        error_messages.print_error(error)
        sys.exit(error_messages.exit_code(error))
    if code == INTERRUPTED:  # typer returns it for Ctrl-C
        raise KeyboardInterrupt
    sys.exit(code or 0)
