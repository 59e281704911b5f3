"""Find out within seconds whether the Hugging Face hub can be reached, before anything waits for it.

The hub's library tries every file several times, with long timeouts: without a network, a misspelled path takes a
minute to fail.
"""

from __future__ import annotations

import ssl
import threading
from functools import cache
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from csr_vlm.core.errors import CsrError

TIMEOUT = 2.5
"""Seconds to wait for the hub's first answer, including the lookup of its address."""


def require_on_disk_or_reachable(
    option: str, name: str, revision: str | None = None, file: str = "config.json"
) -> None:
    """Verify that a model is a local path, in the hub's cache, or can be downloaded.

    If it is in the cache and the hub does not respond, the hub's library does not try.

    Args:
        option: Option that names the model, for the message.
        name: Local path or hub id.
        revision: Revision of a hub repository.
        file: File that the repository has.

    Raises:
        CsrError: The model is not on this disk, and the hub does not respond or is switched off.
    """
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        is_cached = isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    except HFValidationError:
        return  # The library itself says what is wrong with the name.
    if constants.HF_HUB_OFFLINE or is_reachable(constants.ENDPOINT):
        if constants.HF_HUB_OFFLINE and not is_cached:
            raise CsrError(
                f"{option}: there is no folder {name} here, nor is it in the hub's cache, and HF_HUB_OFFLINE is set",
                "give a directory, or download it where there is a network: hf download NAME",
            )
        return
    if not is_cached:
        raise CsrError(
            f"{option}: there is no folder {name} here, and {constants.ENDPOINT} does not respond",
            "give a directory, or download it where there is a network: hf download NAME",
        )
    constants.HF_HUB_OFFLINE = True


def require_reachable(option: str, name: str) -> None:
    """Verify that the hub can be asked about a dataset that is not on this disk.

    Raises:
        CsrError: The hub does not respond.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and not is_reachable(constants.ENDPOINT):
        raise CsrError(
            f"{option}: there is no folder {name} here, and {constants.ENDPOINT} does not respond",
            "give a path, or download it where there is a network: hf download --repo-type dataset NAME",
        )


@cache
def is_reachable(endpoint: str) -> bool:
    """Return whether a server answers anything at all within :data:`TIMEOUT` seconds."""
    answers: list[bool] = []
    # The lookup of a name has a timeout of its own, which is longer.
    thread = threading.Thread(target=lambda: answers.append(_answers(endpoint)), daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    return bool(answers and answers[0])


def _answers(endpoint: str) -> bool:
    request = Request(endpoint, method="HEAD", headers={"User-Agent": "csr-vlm"})  # noqa: S310 - HF_ENDPOINT
    try:
        with urlopen(request, timeout=TIMEOUT):  # noqa: S310
            return True
    except HTTPError:
        return True
    except URLError as error:
        # A certificate that Python does not know may still be known to the hub's library.
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, HTTPException, ValueError):
        return False
