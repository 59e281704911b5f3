"""Take secrets out of what is shown or shared: settings by their names, tokens and passwords by their form.

Model cards, reports, manifests, log lines, error messages and tracebacks all pass through this module.
"""

from __future__ import annotations

import html
import os
import re
from typing import Any

REDACTED = "(redacted)"
_NAME = re.compile(
    r"(hub|auth|access|api|bearer|refresh|session|private|hf|wandb)[_-]?(token|key)|^token$|secret|passw(or)?d|credential",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{16,}"
    r"|AKIA[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,})"
)
"""Tokens of Hugging Face, GitHub, GitLab, OpenAI, AWS, Slack and Google, and JSON Web Tokens."""
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.IGNORECASE)
"""User and password in a URL."""
_ASSIGNED = re.compile(
    r"((?:\b|_)(?:token(?!['\"]?\s*[=:]\s*['\"]?(?:<|&lt;|\d+\b))|api[_-]?key|access[_-]?key|password|passwd|secret)"
    r"['\"]?\s*[=:]\s*['\"]?)([^\s'\"&,;)]{6,})",
    re.IGNORECASE,
)
"""What is assigned to a secret name; special tokens of a vocabulary, such as ``<pad>``, and their ids are none."""
_BEARER = re.compile(r"(\bBearer\s+)[\w.~+/-]{8,}=*", re.IGNORECASE)
_MIN_CHARS = 8
"""Shorter values of environment variables are not looked for: they may occur in any text."""


def is_secret_name(name: str) -> bool:
    """Return whether a setting of this name holds a secret.

    Example:
        >>> is_secret_name("hub_token"), is_secret_name("pad_token"), is_secret_name("max_tokens")
        (True, False, False)
    """
    return _NAME.search(name) is not None


def redact(text: str) -> str:
    """Replace tokens, passwords in URLs, and the values of secret environment variables.

    Example:
        >>> redact("https://me:word@host/x refused hf_abcdefghijklmnopqrst")
        'https://(redacted)@host/x refused (redacted)'
    """
    for name, value in os.environ.items():
        if len(value) >= _MIN_CHARS and is_secret_name(name):
            text = text.replace(value, REDACTED).replace(html.escape(value), REDACTED)
    text = _USER.sub(rf"\1{REDACTED}@", _TOKEN.sub(REDACTED, text))
    return _ASSIGNED.sub(rf"\1{REDACTED}", _BEARER.sub(rf"\1{REDACTED}", text))


def without_secrets(value: Any, name: str = "") -> Any:
    """Redact all texts in plain data, and every text under a secret name.

    Example:
        >>> without_secrets({"hub_token": "x", "pad_token": "<pad>"})
        {'hub_token': '(redacted)', 'pad_token': '<pad>'}
    """
    if isinstance(value, dict):
        return {key: without_secrets(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner, name) for inner in value]
    if isinstance(value, str):
        return REDACTED if is_secret_name(name) else redact(value)
    return value
