"""Test that a hub that does not respond costs seconds, not minutes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from csr_vlm.config.load import resolve
from csr_vlm.core import hub
from csr_vlm.core.errors import CsrError
from csr_vlm.pipeline.start import require_sources


@pytest.fixture(params=["refuses", "hangs"])
def no_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Point the hub's library to a server that refuses connections, or accepts them and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "hangs":
            server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "TIMEOUT", 0.5)
        yield


def cached(folder: Path) -> None:
    snapshot = folder / "cache" / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("option", ["model", "scorer", "prompts", "pairs"])
def test_what_is_not_on_this_disk_fails_in_seconds(tmp_path: Path, option: str) -> None:
    settings = {"model": {"path": "."}, "scorer": {"path": "."}, "data": {"prompts": "."}}
    if option in ("model", "scorer"):
        settings[option] = {"path": "org/none"}
    else:
        settings["data"][option] = "org/none"
    started = time.monotonic()
    with pytest.raises(CsrError, match=r"there is no folder org/none here, and http.* does not respond"):
        require_sources(resolve(settings))
    assert time.monotonic() - started < 2


@pytest.mark.usefixtures("no_hub")
def test_a_cached_model_is_used_without_asking_the_hub_again(tmp_path: Path) -> None:
    cached(tmp_path)
    hub.require_on_disk_or_reachable("model.path", "org/model")
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(CsrError, match="HF_HUB_OFFLINE is set"):
        hub.require_on_disk_or_reachable("model.path", "org/other")


@pytest.mark.parametrize("name", [".", "./nowhere", "/nowhere", "a/b/c", "~/x"])
def test_a_path_is_no_hub_id(name: str) -> None:
    hub.require_on_disk_or_reachable("model.path", name)


@pytest.mark.parametrize("path", ["./nowhere", "nowhere.jsonl", "*.tar", __file__])
def test_a_source_that_cannot_be_read_is_found_before_anything_is_opened(path: str) -> None:
    settings = {"model": {"path": "."}, "scorer": {"path": "."}, "data": {"prompts": path}}
    with pytest.raises(CsrError, match=r"there is no file|cannot be opened|no file matches|unknown format"):
        require_sources(resolve(settings))
