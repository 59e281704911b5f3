"""Implement ``csr push``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from csr_vlm.cli import console
from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.store.files import sha256_of
from csr_vlm.store.run import Run

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def push(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run.")],
    repository: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and the model card; upload nothing.")
    ] = False,
) -> None:
    """Upload the final adapter and model card to the hub.

    Uses the account of `hf auth login` or HF_TOKEN.

    Example: csr push runs/q me/llava-csr --dry-run
    """
    from csr_vlm.report.card import render_card, write_card

    if not _REPOSITORY.fullmatch(repository):
        raise CsrError(f"{repository!r} is not a valid repository id", "write OWNER/NAME")
    run = Run.open(target)
    folder = run.root / "adapter"
    if not (folder / "adapter_model.safetensors").is_file():
        raise CsrError(f"{target} has no final adapter yet", f"csr run {target}")
    _require_trained_weights(run, folder)
    if dry_run:
        card = render_card(run)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
        files["README.md"] = len(card.encode())
        if console.mode.json:
            console.print_json({"repository": repository, "files": files, "card": card})
            return
        rows = [[name, f"{size:,}"] for name, size in files.items()]
        console.print_table(f"to {repository}", ["file", "bytes"], rows)
        print(f"\n{card}")
        console.log("dry run: nothing was uploaded")
        return
    with run.locked(), console.reporter().stage("uploading", 0):
        write_card(run)
        address = _upload(folder, repository, private)
    console.done(address, then=f'PeftModel.from_pretrained(base, "{repository}") loads it')


def _require_trained_weights(run: Run, folder: Path) -> None:
    """Verify that the final adapter holds the weights that training wrote.

    Raises:
        CsrError: It does not.
    """
    name = "adapter_model.safetensors"
    if sha256_of(folder / name) != sha256_of(run.trained_adapter() / name):
        raise CsrError(f"{folder / name} was changed after it was written", f"csr run {run.root} writes it again")


def _upload(folder: Path, repository: str, private: bool) -> str:
    """Create the repository if necessary and upload the folder; return the URL of the commit.

    huggingface_hub reads the token; it is never printed.

    Raises:
        CsrError: There is no token, or the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add adapter")
    except LocalTokenNotFoundError:
        raise CsrError("not logged in to the hub", "run hf auth login, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        said = getattr(error, "server_message", None) or reason_of(error)
        raise CsrError(
            f"the hub refused {repository} ({status}): {said}", "check the name and the permissions of your token"
        ) from None
    except OSError as error:
        raise CsrError(f"the hub cannot be reached: {type(error).__name__}", "try again when online") from None
    return str(commit.commit_url)
