"""Ask a language model behind an OpenAI-compatible endpoint to judge answers, and keep everything it said.

Every request is sent at temperature 0. ``transcript.jsonl`` has one line per reply and is the cache
too: a question that it contains is not sent again, so an interrupted evaluation costs nothing twice.
A reply that cannot be read is asked for once more, and then counted as unread: it is never a score. A
judge that does not answer stops the evaluation.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from csr_vlm.core.errors import CsrError, reason_of
from csr_vlm.core.secrets import redact
from csr_vlm.store import files

KEY_VARIABLE = "JUDGE_API_KEY"
"""Environment variable with the endpoint's key."""
_OPENAI = "api.openai.com"
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Status codes after which the same request may succeed."""
_READINGS = 2
"""How often a question is asked until its reply can be read."""
_TIMEOUT = 120.0
_LONGEST_WAIT = 120.0
_MOST_BYTES = 1 << 20
"""Limit for a reply: a judge writes a few hundred words."""
_CHARS_PER_TOKEN = 4
_T = TypeVar("_T")


@dataclass(frozen=True)
class JudgeSettings:
    """Configure a judge."""

    url: str
    """Address of the endpoint up to and including ``/v1``."""
    model: str
    max_tokens: int = 512
    tries: int = 6
    """How often a request is sent until the endpoint answers it."""
    workers: int = 4
    """Most requests at the same time."""
    price: tuple[float, float] | None = None
    """Dollars per million input and output tokens, for the estimate."""


@dataclass(frozen=True)
class Judgment(Generic[_T]):
    """Hold what a judge said about one answer."""

    value: _T | None
    """The reply as it was read; None if it could not be read."""
    reply: str
    served_by: str
    """The model's name in the reply."""


@dataclass(frozen=True)
class JudgeCost:
    """Estimate what a judge will cost, at most."""

    requests: int
    input_tokens: int
    output_tokens: int
    dollars: float | None
    """None if the price of a token is not known."""

    def describe(self, model: str) -> str:
        """Format the estimate as one line."""
        price = "set --judge-price for dollars" if self.dollars is None else f"${self.dollars:,.2f}"
        return (
            f"{model} will get at most {self.requests:,} requests with about {self.input_tokens:,} tokens, and answer "
            f"with at most {self.output_tokens:,} ({price}); replies in the transcript cost nothing"
        )


def estimate_cost(settings: JudgeSettings, request_chars: Sequence[int]) -> JudgeCost:
    """Estimate the cost of judging, at four characters per token, before anything is sent.

    Example:
        >>> estimate_cost(JudgeSettings("http://localhost/v1", "m", 100, price=(1.0, 10.0)), [4000, 4000]).dollars
        0.004
    """
    num_input, num_output = sum(request_chars) // _CHARS_PER_TOKEN, len(request_chars) * settings.max_tokens
    dollars = None
    if settings.price is not None:
        dollars = (num_input * settings.price[0] + num_output * settings.price[1]) / 1e6
    return JudgeCost(len(request_chars), num_input, num_output, dollars)


class _NoRedirects(HTTPRedirectHandler):
    """Refuse to follow redirects: they would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Judge:
    """Ask one model, through a transcript that is also the cache.

    Args:
        folder: Folder of ``transcript.jsonl``.
        sleep: Waits between two tries.

    Raises:
        CsrError: The address is not one of http(s), or the transcript is damaged.
    """

    def __init__(self, settings: JudgeSettings, folder: Path, sleep: Callable[[float], None] = time.sleep) -> None:
        parts = urlsplit(settings.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise CsrError(
                f"{redact(settings.url)!r} is not the address of a judge", "such as https://api.openai.com/v1"
            )
        self.settings = settings
        self.host = parts.hostname + (f":{parts.port}" if parts.port else "")
        self.transcript = folder / "transcript.jsonl"
        self._address = f"{settings.url.rstrip('/')}/chat/completions"
        self._key = os.environ.get(KEY_VARIABLE) or (os.environ.get("OPENAI_API_KEY") if self.host == _OPENAI else None)
        self._sleep = sleep
        self._lock = threading.Lock()
        self._opener = build_opener(_NoRedirects)
        self._known = _read_transcript(self.transcript)

    def ask(
        self, questions: Sequence[str], read: Callable[[str], _T | None], tick: Callable[[int], object] = int
    ) -> list[Judgment[_T]]:
        """Ask all questions, several at a time.

        Args:
            questions: Texts of the requests.
            read: Returns what a reply means, or None if it means nothing.
            tick: Is called with 1 for every judged question.

        Returns:
            One judgment per question, in order.

        Raises:
            CsrError: The endpoint refuses a request, or does not answer after several tries. Replies so far are kept.
        """
        judgments: dict[int, Judgment[_T]] = {}
        pool = ThreadPoolExecutor(self.settings.workers, thread_name_prefix="judge")
        try:
            waiting: dict[Future[Judgment[_T]], int] = {
                pool.submit(self._judge, question, read): index for index, question in enumerate(questions)
            }
            for future in as_completed(waiting):
                judgments[waiting[future]] = future.result()
                tick(1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return [judgments[index] for index in range(len(questions))]

    def protocol(self, judgments: Sequence[Judgment[Any]]) -> dict[str, Any]:
        """Return who judged, for an evaluation's protocol: the name asked for, and the names in the replies."""
        return {
            "host": self.host,
            "model": self.settings.model,
            "served_by": sorted({judgment.served_by for judgment in judgments}),
            "temperature": 0,
            "max_tokens": self.settings.max_tokens,
        }

    def _judge(self, question: str, read: Callable[[str], _T | None]) -> Judgment[_T]:
        for reading in range(_READINGS):
            entry = self._reply(question, reading)
            value = read(entry["reply"])
            if value is not None:
                break
        return Judgment(value, entry["reply"], entry["served_by"])

    def _reply(self, question: str, reading: int) -> Mapping[str, Any]:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.settings.max_tokens,
        }
        key = files.digest({"host": self.host, "reading": reading, **body})
        with self._lock:
            known = self._known.get(key)
        if known is not None:
            return known
        answer = self._send(body)
        entry = {"key": key, "host": self.host, "reading": reading, "request": body, **answer}
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        with self._lock, files.disk_errors(self.transcript):
            self.transcript.parent.mkdir(parents=True, exist_ok=True)
            with self.transcript.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._known[key] = entry
        return entry

    def _send(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request until it is answered; wait longer after each failure, or as long as the endpoint says."""
        waits = random.Random(files.digest(body))
        for attempt in range(self.settings.tries):
            wait = min(_LONGEST_WAIT, 2.0**attempt * (1 + waits.random()))
            try:
                with self._opener.open(self._request(body), timeout=_TIMEOUT) as response:
                    return _answer(response.read(_MOST_BYTES + 1))
            except HTTPError as error:
                reason = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code not in _RETRIED:
                    raise CsrError(f"the judge refused a request: {redact(reason)}", self._hint(error.code)) from None
                wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (URLError, HTTPException, OSError, _NotAnAnswerError) as error:
                reason = reason_of(error)
            if attempt + 1 < self.settings.tries:
                self._sleep(wait)
        raise CsrError(
            f"the judge at {self.host} did not answer in {self.settings.tries} tries: {redact(reason)}",
            "replies so far are kept; rerun the same command later",
        )

    def _request(self, body: Mapping[str, Any]) -> Request:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return Request(self._address, json.dumps(body).encode(), headers)  # noqa: S310

    def _hint(self, status: int) -> str:
        if status in {401, 403}:
            return f"set {KEY_VARIABLE} to the key of {self.host}"
        if 300 <= status < 400:
            return "redirects are not followed; give --judge-url the final address"
        return "check --judge-url and --judge-model"


class _NotAnAnswerError(Exception):
    """Report a body that is not a chat completion."""


def _answer(content: bytes) -> dict[str, Any]:
    """Return the text, the model's name and the number of tokens in the body of a reply."""
    if len(content) > _MOST_BYTES:
        raise _NotAnAnswerError(f"a reply of more than {_MOST_BYTES:,} bytes")
    try:
        body = json.loads(content)
        message = body["choices"][0]["message"]
        text, served_by, usage = message.get("content"), body.get("model"), body.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _NotAnAnswerError("a reply that is not a chat completion") from None
    return {
        "reply": text if isinstance(text, str) else "",
        "served_by": served_by if isinstance(served_by, str) else "not stated",
        "usage": usage if isinstance(usage, dict) else {},
    }


def _retry_after(header: str | None, default: float) -> float:
    """Return the seconds that an endpoint asks to wait; the default if it does not, or names a date."""
    try:
        seconds = float(header or "")
    except ValueError:
        return default
    return min(max(seconds, 0.0), _LONGEST_WAIT) if seconds == seconds else default  # noqa: PLR0124 - not a number


def _read_transcript(path: Path) -> dict[str, Mapping[str, Any]]:
    """Read the replies so far by key. A line that a kill has cut off is ended, and ignored."""
    known: dict[str, Mapping[str, Any]] = {}
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return known
    except OSError as error:
        raise CsrError(f"{path} cannot be read: {error}", "delete it; the judge is then asked again") from None
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("key", "reply", "served_by")):
            known[entry["key"]] = entry
    if content and not content.endswith(b"\n"):
        with files.disk_errors(path), path.open("ab") as file:
            file.write(b"\n")
    return known
