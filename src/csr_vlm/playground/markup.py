"""Write answers and yes-or-no questions as HTML; every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from csr_vlm.method.claim_places import Level, Mark

_MEANINGS = {
    Level.SUPPORTED: "the scorer sees it",
    Level.UNCLEAR: "the scorer cannot tell",
    Level.DOUBTED: "the scorer doubts it",
}
_CLAIM = Markup(
    '<button type="button" class="claim {level}" data-claim="{thing}" title="{nats:+.1f} nats: {meaning}. '
    'Click to ask.">{text}<span class="spoken"> ({meaning})</span></button>'
)
_ANSWER = Markup('<article class="answer{state}"><h3>{policy}</h3><p>{body}</p><footer>{footer}</footer></article>')
LEGEND = Markup('<p class="legend">Claims: {0}</p>').format(
    Markup(" ").join(
        Markup('<span class="claim {0}">{1}</span>').format(level, _MEANINGS[level].replace("it", "this"))
        for level in (Level.SUPPORTED, Level.UNCLEAR, Level.DOUBTED)
    )
)
"""Explanation of the colors."""


@dataclass(frozen=True)
class Answer:
    """Hold what a policy has said so far."""

    policy: str
    text: str = ""
    marks: Sequence[Mark] | None = None
    """None while the answer is being generated, or has not begun."""
    seconds: float = 0.0


def answers_html(answers: Sequence[Answer]) -> str:
    """Write answers side by side."""
    written = Markup("").join(_answer(answer) for answer in answers)
    return str(Markup('<div class="answers">{0}</div>').format(written) + (LEGEND if answers else ""))


def _answer(answer: Answer) -> Markup:
    if answer.marks is None:
        state, footer = (" running", "answering") if answer.text else (" waiting", "waiting")
        return _ANSWER.format(state=state, policy=answer.policy, body=answer.text, footer=footer)
    words = len(answer.text.split())
    doubted = sum(mark.level is Level.DOUBTED for mark in answer.marks)
    footer = f"{words} words, {len(answer.marks)} claims, {doubted} doubted, {answer.seconds:.1f} s"
    return _ANSWER.format(state="", policy=answer.policy, body=marked(answer.text, answer.marks), footer=footer)


def marked(text: str, marks: Sequence[Mark]) -> Markup:
    """Escape a text and mark its claims.

    Example:
        >>> marked("A <dog>.", [Mark(3, 6, "dog", -1.5)]).striptags()
        'A <dog (the scorer doubts it)>.'
    """
    parts: list[Markup] = []
    position = 0
    for mark in marks:
        parts += [
            escape(text[position : mark.start]),
            _CLAIM.format(
                level=mark.level,
                thing=mark.thing,
                nats=mark.nats,
                meaning=_MEANINGS[mark.level],
                text=text[mark.start : mark.end],
            ),
        ]
        position = mark.end
    return Markup("").join([*parts, escape(text[position:])])


def questions_html(rows: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Write the probability of yes of each policy as a table, one row a question."""
    if not rows:
        return ""
    policies = list(rows[0][1])
    head = Markup("").join(Markup("<th>{0}</th>").format(policy) for policy in policies)
    body = Markup("").join(
        Markup("<tr><th>{0}</th>{1}</tr>").format(
            question, Markup("").join(_probability(values[policy]) for policy in policies)
        )
        for question, values in rows
    )
    return str(
        Markup('<table class="asked"><thead><tr><th>Probability of yes</th>{0}</tr></thead><tbody>{1}</tbody></table>')
        .format(head, body)
    )  # fmt: skip


def _probability(value: float) -> Markup:
    return Markup('<td><meter min="0" max="1" value="{0:.3f}"></meter> {0:.2f}</td>').format(value)
