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
    r"(hub|auth|access|api|bearer|refresh|session|private|hf|wandb|github|gh|gitlab|slack|sas|bot|job|id|deploy|user|client"
    r"|hugging_?face|openai|anthropic|azure|aws|gcp|google|mlflow|tracking|comet|neptune|trackio|proxy|ssh|account|signing"
    r"|encryption)[_-]?(token|key)(?!iz|s\b)|^token$|secret|passw(or)?d|passphrase|credential",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"(^|_)(token|key|secret|pass|passw(or)?d|pwd|passphrase|credentials?|dsn)$", re.IGNORECASE)
"""Names of environment variables that hold secrets besides these, such as PYPI_TOKEN and SMTP_PASS."""
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|hf_oauth_\w{16,}|api_org_[A-Za-z0-9]{16,}|wandb_v1_\w{16,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|dckr_pat_[\w-]{16,}|gsk_[A-Za-z0-9]{20,}"
    r"|sk-[\w-]{16,}|[rs]k_(?:live|test)_\w{16,}|A[KS]IA[A-Z0-9]{16}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{30,}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))"
)
"""Tokens of Hugging Face, W&B, GitHub, GitLab, npm, PyPI, Docker, Groq, OpenAI, Stripe, AWS, Slack and Google, JSON Web
Tokens and private keys."""
_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@'\"]+@", re.IGNORECASE)
"""User and password in a URL."""
_QUERY = re.compile(
    r"((?:[?&]|&amp;)[\w.%-]*(?:token|key|sig|signature|secret|passw(?:or)?d|credential|auth)=)((?!\(redacted)[^\s'\"&,;)]{6,})",
    re.IGNORECASE,
)
"""Secret parameter of a URL, such as the signature of a presigned one."""
_ASSIGNED = re.compile(
    r"((?:\b|_|(?-i:(?<=[a-z])(?=[A-Z])))"
    r"(?:token(?!['\"]?\s*[=:]\s*['\"]?(?:<|&lt;|\d+\b))|(?:api|access|account|auth|private|secret)[_-]?key|password|passwd|pwd"
    r"|passphrase|secret)['\"]?\s*[=:]\s*['\"]?)((?!\(redacted)[^\s'\"&,;)]{6,})",
    re.IGNORECASE,
)
"""What is assigned to a secret name; special tokens of a vocabulary, such as ``<pad>``, and their ids are none."""
_OPTION = re.compile(r"(--[\w-]*(?:token|key|password|secret)[ =])((?!\(redacted)[^\s-]\S{5,})", re.IGNORECASE)
"""Secret option of a command line."""
_BEARER = re.compile(r"(\bBearer\s+|\bAuthorization['\"]?\s*[:=]\s*['\"]?\w+\s+)[\w.~+/-]{8,}=*", re.IGNORECASE)
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
        if len(value) >= _MIN_CHARS and (is_secret_name(name) or _VARIABLE.search(name)) and not _is_path(value):
            text = text.replace(value, REDACTED).replace(html.escape(value), REDACTED)
    text = _USER.sub(rf"\1{REDACTED}@", _TOKEN.sub(REDACTED, text))
    for pattern in (_BEARER, _QUERY, _ASSIGNED, _OPTION):
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text


def _is_path(value: str) -> bool:
    """Return whether a value is the path of a file that holds a secret, rather than one."""
    return value.startswith(("/", "~", "./")) and os.path.exists(os.path.expanduser(value))  # noqa: PTH110, PTH111


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
