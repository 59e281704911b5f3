"""Implement ``csr try``: a local page on which the policies of a run answer questions about a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import RunArgument, complete_run
from csr_vlm.core.errors import CsrError
from csr_vlm.core.installing import install_command, is_installed
from csr_vlm.store.run import Run


def try_page(
    target: RunArgument,
    other: Annotated[
        Path | None, typer.Argument(metavar="RUN_B", autocompletion=complete_run, help="Second run to compare with.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port (default: the first free from 7860).")
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, max=1000, help="Largest upload in MB.")] = 20,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Also create a public link through Gradio's server, with a password.")
    ] = False,
) -> None:
    """Try base model and iterations on a local page.

    Answers stream side by side. Claims are colored by their evidence, and a click on one asks every policy about it.
    The page is reachable from this machine only. Needs Gradio.

    Example: csr try runs/d0 --open
    """
    if not is_installed("gradio"):
        raise CsrError("csr try needs Gradio", f"{install_command('app')}; csr chat does the same in the terminal")
    runs = [Run.open(path) for path in (target, other) if path is not None]
    console.quiet_libraries()
    from csr_vlm.playground.uploads import upload_folder

    uploads = upload_folder()
    from csr_vlm.playground.page import Page, serve
    from csr_vlm.playground.session import Playground

    with console.reporter().stage("loading the models", 0):
        playground = Playground(runs)
    final = {(run.root, iteration) for run in runs for iteration in (0, run.last_trained)}
    selected = [name for name, one in playground.contestants.items() if (one.run.root, one.iteration) in final]
    page = Page(playground, uploads, selected)
    address = serve(page, port=port, share=share, max_upload_bytes=max_upload_mb * 2**20, open_browser=open_browser)
    if address.public:
        print(f"{address.public}  (user csr, password {address.password})")
    print(address.local, flush=True)
    console.log("Ctrl-C ends it")
    address.blocks.block_thread()
