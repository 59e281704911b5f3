"""Implement ``csr push``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal, TypeVar

import typer

from csr_vlm.cli import console
from csr_vlm.cli.arguments import BaseModel
from csr_vlm.cli.export import Format
from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.store.files import read_json, sha256_of, write_json
from csr_vlm.store.run import Run

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_Answer = TypeVar("_Answer")


def push(
    target: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run.")],
    repository: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub; created if it does not exist.")
    ],
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Upload the preference pairs as a data set, in place of the adapter.")
    ] = False,
    form: Annotated[Format, typer.Option("--format", help="Format of the pairs.")] = Format.TRL,
    iteration: Annotated[int | None, typer.Option(min=1, help="Iteration of the pairs (default: last).")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the files and the card; upload nothing.")] = False,
    base_model: BaseModel = None,
) -> None:
    """Upload the final adapter, or the pairs, to the hub.

    A model card or a dataset card goes along. Uses the account of `hf auth login` or HF_TOKEN, which is checked before
    anything is created.

    Example: csr push runs/q me/llava-csr --dry-run
    """
    if not _REPOSITORY.fullmatch(repository):
        raise CsrError(f"{repository!r} is not a valid repository id", "write OWNER/NAME")
    run = Run.open(target)
    upload = None if dry_run else _Upload(repository, "dataset" if pairs else "model", private)
    if pairs:
        _push_pairs(run, repository, upload, form.value, iteration, base_model)
    else:
        _push_adapter(run, repository, upload, base_model)


def _push_adapter(run: Run, repository: str, upload: _Upload | None, base_model: str | None) -> None:
    """Upload the adapter, or show what would be uploaded."""
    from csr_vlm.report.card import public_name, render_card

    folder = run.root / "adapter"
    if not (folder / "adapter_model.safetensors").is_file():
        raise CsrError(f"{run.root} has no final adapter yet", f"csr run {run.root}")
    _require_trained_weights(run, folder)
    card = render_card(run, base_model)
    if upload is None:
        _show(repository, folder, card)
        return
    with run.locked(), console.reporter().stage("uploading", 0), TemporaryDirectory() as temporary:
        upload.require_account()
        shared = Path(temporary) / "adapter"
        _copy_to_share(folder, shared, public_name(run.config.model.path, base_model))
        (shared / "README.md").write_text(card, encoding="utf-8")
        address = upload.send(shared)
    console.done(address, then=f'PeftModel.from_pretrained(base, "{repository}") loads it')


def _copy_to_share(adapter: Path, shared: Path, base_model: str) -> None:
    """Copy an adapter; its configuration names the base model as others know it, not by a folder of this machine."""
    shutil.copytree(adapter, shared)
    path = shared / "adapter_config.json"
    settings = read_json(path)
    if isinstance(settings, dict):
        write_json(path, settings | {"base_model_name_or_path": base_model})


def _push_pairs(
    run: Run, repository: str, upload: _Upload | None, format_name: str, iteration: int | None, base_model: str | None
) -> None:
    """Export the pairs with their images and upload them, or show what would be uploaded."""
    from csr_vlm.pipeline.exporting import export_pairs

    console.quiet_libraries()
    with TemporaryDirectory() as temporary, run.locked_to_write(Path(temporary)):
        folder = Path(temporary)
        if upload is not None:
            upload.require_account()
        with console.reporter().stage("writing pairs", 0):
            _, selection = export_pairs(run, iteration, format_name, folder, copy_images=True, base_model=base_model)
        for line in selection.summary():
            console.log(line)
        if upload is None:
            _show(repository, folder, (folder / "README.md").read_text(encoding="utf-8"))
            return
        with console.reporter().stage("uploading", 0):
            address = upload.send(folder)
    console.done(address, then=f'datasets.load_dataset("{repository}") loads it', pairs=selection.num_pairs)


def _show(repository: str, folder: Path, card: str) -> None:
    """Print what would be uploaded."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    files["README.md"] = len(card.encode())
    if console.mode.json:
        console.print_json({"repository": repository, "files": files, "card": card})
        return
    rows = [[name, f"{size:,}"] for name, size in files.items()]
    console.print_table(f"to {repository}", ["file", "bytes"], rows)
    print(f"\n{card}")
    console.log("dry run: nothing was uploaded")


def _require_trained_weights(run: Run, folder: Path) -> None:
    """Verify that the final adapter holds the weights that training wrote.

    Raises:
        CsrError: It does not.
    """
    name = "adapter_model.safetensors"
    if sha256_of(folder / name) != sha256_of(run.trained_adapter() / name):
        raise CsrError(f"{folder / name} was changed after it was written", f"csr run {run.root} writes it again")


class _Upload:
    """Upload a folder to a repository of the hub. huggingface_hub reads the token; it is never printed."""

    def __init__(self, repository: str, kind: Literal["model", "dataset"], private: bool) -> None:
        from huggingface_hub import HfApi

        self._api = HfApi()
        self._repository = repository
        self._kind: Literal["model", "dataset"] = kind
        self._private = private

    def require_account(self) -> None:
        """Verify that the account can write to the repository's owner, before a repository is created.

        Raises:
            CsrError: There is no valid token, it only reads, the owner is someone else, or the hub cannot be reached.
        """
        account = self._answer(self._api.whoami)
        owner, names = self._repository.partition("/")[0], [account["name"]]
        names += [organization["name"] for organization in account.get("orgs") or ()]
        if owner not in names:
            raise CsrError(f"{account['name']} cannot write to {owner} on the hub", f"use one of: {', '.join(names)}")
        token = (account.get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise CsrError("the hub's token can only read", "log in with a token that can write: hf auth login")

    def send(self, folder: Path) -> str:
        """Create the repository if necessary and upload the folder; return the URL of the commit.

        Raises:
            CsrError: The hub refuses the upload or cannot be reached.
        """
        return self._answer(lambda: self._send(folder))

    def _send(self, folder: Path) -> str:
        self._api.create_repo(self._repository, repo_type=self._kind, private=self._private, exist_ok=True)
        commit = self._api.upload_folder(
            repo_id=self._repository,
            repo_type=self._kind,
            folder_path=folder,
            commit_message="Add adapter" if self._kind == "model" else "Add pairs",
        )
        return str(commit.commit_url)

    def _answer(self, request: Callable[[], _Answer]) -> _Answer:
        """Return what the hub answers.

        Raises:
            CsrError: There is no valid token, or the hub refuses or cannot be reached. The message is the hub's own.
        """
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

        try:
            return request()
        except LocalTokenNotFoundError:
            raise CsrError("not logged in to the hub", "run hf auth login, or set HF_TOKEN") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "no answer"
            message = getattr(error, "server_message", None) or reason_of(error)
            hint = "log in again: hf auth login" if status == 401 else "check the name and your token's permissions"
            raise CsrError(f"the hub refused {self._repository} ({status}): {message}", hint) from None
        except HFValidationError as error:
            raise CsrError(f"{self._repository} is not a valid repository id", reason_of(error)) from None
        except Exception as error:  # of whichever HTTP library huggingface_hub uses
            raise CsrError(
                f"the hub cannot be reached: {type(error).__name__}: {reason_of(error)}", "try again when online"
            ) from None
