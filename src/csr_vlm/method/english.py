"""Find the claims of English sentences, by a lexicon and the words around its nouns.

No parser is used: rules on a few closed classes of words decide whether a wording is a noun and
whether the sentence asserts it. tests/data/claims.jsonl measures how well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from csr_vlm.method.lexicon import Claim, Lexicon

_WORD = re.compile(r"[^\W\d_]+(?:[-'][^\W\d_]+)*|\d+|[^\w\s]")
_QUOTED = re.compile(r"[\"“][^\"“”]*[\"”]")
_MAX_WORDS = 4
"""Most words of a wording that is matched."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words(
    "a an the this that these those his her its their our your my another other some several many few various "
    "multiple numerous both each every any all most more one two three four five six seven eight nine ten dozen "
    "couple pair single lone"
)
_COUNTS = _words(
    "one two three four five six seven eight nine ten eleven twelve dozen several many few multiple numerous various "
    "some"
)
_COLORS = _words(
    "red orange yellow green blue purple pink brown black white gray grey beige gold golden silver turquoise teal "
    "maroon violet tan cream"
)
_PREPOSITIONS = _words(
    "in on at of with by near under over behind beside between among above below along across around through into "
    "onto from beneath underneath inside outside next against atop toward towards past amid including wearing "
    "holding carrying riding"
)
_PRONOUNS = _words("i you he she it we they who which what there")
_BREAKS = frozenset(',.;:!?()—–-*"')
_CONJUNCTIONS = _words("but however while although though because since so whereas yet")
"""Words that begin a clause, in addition to punctuation."""
_AUXILIARIES = _words(
    "is are was were be been being has have had do does did can could may might will would shall should must seems "
    "appears"
)
_ADVERBS = _words("also not now still only just even often always currently")
_NEGATIONS = _words("not never neither nor none lacking lacks lack devoid absent cannot n't")
_SHORT_NEGATIONS = _words("no without")
"""Negations of the next noun only: the street is claimed in "no cars on the street"; so does "not any"."""
_SUPPOSITIONS = _words(
    "if might could may would perhaps possibly maybe probably likely suggest suggests suggesting imply implies "
    "implying indicate indicates indicating whether presumably potentially unless must imagine suppose assume "
    "assuming consider considering question options expect expected"
)
_COMPARISONS = _words("like resembling resembles resemble reminiscent similar akin imitating")
_SINGULAR_DETERMINERS = _words("a an one each every another this that")
_CONTRASTS = _words("just only rather instead")
"""Words after a comma that end the list before it: "no dog, just a cat"."""
_ARTWORKS = _words("statue sculpture painting drawing mural figurine poster sticker sign")
"""Things whose "of" names what they show: "a statue of a soldier" claims a statue."""
_LOOKS = _words("looks is was seems feels appears sounds tastes smells shapes acts serves")
"""Words in -s before a "like" that compares; after a plural, "like" lists examples."""
_GENERALIZATIONS = _words("usually typically commonly generally traditionally often")
_PURPOSES = _words(
    "waiting wait waits looking look search searching preparing prepare prepared ready used use designed intended "
    "meant place space room perfect ideal suitable destination known need reserved famous"
)
"""Words before a "for" whose object need not be there."""
_BLOCKING_PAIRS = frozenset({
    ("rather", "than"), ("instead", "of"), ("other", "than"), ("free", "of"), ("as", "if"), ("as", "though"),
    ("let", "me"), ("let", "us"), ("to", "count"), ("to", "find"), ("to", "determine"), ("to", "identify"),
})  # fmt: skip
_ABSTRACT_HEADS = _words(
    "game games match matches practice tournament sport sports session lesson ride rides trip journey race party "
    "ceremony celebration event events industry business culture style styles design designs pattern patterns theme "
    "print prints color colors lover lovers enthusiast enthusiasts owner owners traffic safety level experience show "
    "festival competition season activity activities time day night life skill skills moment moments"
)
"""Nouns that no image shows. A noun before them only modifies: "tennis match" claims nothing."""
_KEY_NOUNS = _words("element elements role roles feature features component components aspect part focus")
"""Nouns before which "key" is an adjective."""

_MATERIALS = _words("stone glass metal wood brick marble leather fabric crystal lace canvas bamboo paper")
"""Nouns that say what the next noun is made of: "stone steps" claims no stone."""
_FUNCTION_WORDS = (
    _DETERMINERS | _PREPOSITIONS | _PRONOUNS | _AUXILIARIES | _ADVERBS | _CONJUNCTIONS | _words("and or as to for")
)

_IDIOMS = re.compile(
    r"\b(?:"
    + "|".join((
        # fixed phrases with a listed noun that the image need not show
        "on the (?:one|other) hand", "hand in hand", "(?:at|in|second)[- ]hand", "side by side", "face to face",
        "at home", "depth of field", "field of view", "point of view", "bird's[- ]eye view", "food for thought",
        "(?:in|through) the eyes? of",
        "(?:catch|draw)(?:es|s|ing)? (?:the|one's|your|the viewer's) (?:eye|attention)s?",
        "viewer's eyes?", "a watchful eye", "window of opportunity", "role model", "table of contents", "key to",
        "star of the show", "family[- ]friendly", "home to", "i (?:would|can|could) say",
        "(?:this|the) photograph (?:is|was|shows|captures|depicts|features)",
        "the whole family", "in the wake of", "light up",
        "cut(?:s|ting)? down", "in full (?:sail|bloom|swing)", "in the (?:picture|photo|image|frame)",
        # the viewer's camera
        r"(?:look|star|gaz|smil|pos|fac|glanc)\w*(?: \w+)? (?:at|for|into|toward|towards|to) the camera",
        "(?:facing|from) the camera",
        # quantities
        "a (?:sea|stream|flood|ocean|river|wall|mountain|blanket|carpet|splash|touch|pop) of",
        "a (?:couple|number|bunch|group|variety|pair|row|line) of",
        # verbs and adverbials
        "heads? (?:over|to|towards?|for|off|out|down|up|home)", "(?:at|by) the (?:head|foot) of", "on foot",
        "by (?:car|bus|train|boat|bike|plane|hand)", "in line", "on board", "on deck", "in bed", "to bed",
        "goes? to school", "at (?:school|church|sea)",
        "play(?:s|ing)? (?:soccer|football|baseball|basketball|volleyball|tennis|golf|frisbee|cards|catch|ball)",
    ))
    + r")\b"
)  # fmt: skip

_ALSO_VERBS = _words(
    "can watch face head leaf plant ring shop store cook guard coach train drink slide swing tie match suit dress "
    "house fan shadow stream branch dock ship sign stamp hand eye drum fire fly bat duck saw mask cap stage wall "
    "iron nail drill cast shower saddle bow rock paper tape screw bolt hose rake hammer mop bridge fence box park "
    "water seal judge cut bus pilot nurse mother star sail cross snow mirror seat stall carpet ornament plate "
    "sheet fish ski surf well scale gear net wave present gift light lock label string book glue pipe wire chain "
    "rope anchor crop field shelf shell horn tail paw finger shoulder elbow thumb belt button pocket collar "
    "sleeve coat cake egg pepper salt sauce butter cream honey jam oil milk spice smoke flame mist fog mud rose "
    "weed log orchard paddle raft kite balloon arrow spear shield puzzle tower block letter rack spray magnet lid "
    "tank whistle chalk marker crane drone taxi ferry cart sled hook frame harness guest ram painting drawing "
    "building crossing clothing railing parking icing fencing stocking"
)
"""Nouns that are verbs or adjectives as well. They need the context of a noun."""
_VERB_FORMS = _words("leaves")
"""Plurals that are verbs too although their singular is not spelled like the verb."""


@dataclass(frozen=True)
class _Span:
    """Represent a wording of the lexicon at its place in a sentence."""

    start: int
    """Index of its first word."""
    end: int
    """Index after its last word."""
    name: str


class EnglishClaims:
    """Find claims in English sentences."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._plurals = plurals(lexicon.names)
        self._names = self._plurals | dict(lexicon.names)
        for wording in lexicon.listed("plural only"):
            self._names.pop(wording, None)
        self._ambiguous = _ALSO_VERBS | plurals(dict.fromkeys(_ALSO_VERBS, "")).keys() | _VERB_FORMS

    def find(self, sentence: str) -> list[Claim]:
        """Return the distinct claims of a sentence in the order in which they appear."""
        text = sentence.strip().lower().replace("’", "'")
        if text.endswith("?"):
            return []
        for ignored in (_QUOTED, _IDIOMS):
            text = ignored.sub(lambda match: re.sub(r"\S", "~", match[0]), text)
        words = _WORD.findall(text.replace("n't", " n't"))
        nouns: list[_Span] = []
        for span in self._spans(words):
            if self._is_noun(words, span, nouns[-1] if nouns else None):
                nouns.append(span)
        claims: dict[str, Claim] = {}
        for span in _heads(nouns, words):
            if _is_asserted(words, span):
                wording = " ".join(words[span.start : span.end])
                claims.setdefault(span.name, Claim(span.name, wording, _count(words, span), _color(words, span)))
        return list(claims.values())

    def _spans(self, words: Sequence[str]) -> list[_Span]:
        """Match the longest wording at each place."""
        spans, start = [], 0
        while start < len(words):
            for end in range(min(start + _MAX_WORDS, len(words)), start, -1):
                wording = " ".join(words[start:end])
                name = self._names.get(wording) or self._names.get(wording.removesuffix("'s"))
                if name is not None:
                    if words[end : end + 1] == ["of"]:  # "two glasses of wine" are no spectacles
                        name = self._plurals.get(wording, name)
                    if name:
                        spans.append(_Span(start, end, name))
                    start = end
                    break
            else:
                start += 1
        return spans

    def _is_noun(self, words: Sequence[str], span: _Span, previous: _Span | None) -> bool:
        """Check whether a wording is a noun where it stands.

        Args:
            previous: The noun of the lexicon before it, if any.
        """
        word = words[span.start]
        before = words[span.start - 1] if span.start else ""
        after = words[span.end] if span.end < len(words) else ""
        if word == "orange":
            return before in _DETERMINERS and (after in _BREAKS | _PREPOSITIONS | _AUXILIARIES | {"", "and", "or"})
        if span.end - span.start > 1 or word not in self._ambiguous:
            return True
        if word == "can" and (after in _ADVERBS | {"be", "also"} or after.endswith("ly")):
            return False
        takes_object = after in _DETERMINERS or after in {"be", "up", "out", "down", "as", "at", "toward", "towards"}
        if before == "to" or before in _PRONOUNS or before in _AUXILIARIES or before in _ADVERBS or before[-2:] == "ly":
            return before in {"is", "are", "was", "were"} and word.endswith("s") and after not in _DETERMINERS
        if before in _DETERMINERS | _PREPOSITIONS | _COLORS or before.endswith("'s"):
            return not (after in {"be", "also"} or (word.endswith("ing") and after in _DETERMINERS))
        if previous is not None and previous.end == span.start:
            if takes_object or _is_plural(before) or _is_plural_phrase(words, previous):
                return False  # "cars can go", "drops of water fly"
            if not word.endswith("s"):
                return True  # "a pizza box lies"
            ends_phrase = after in _BREAKS | _PREPOSITIONS | _AUXILIARIES | {"", "and", "or"}
            return ends_phrase and not _SINGULAR_DETERMINERS & set(_modifiers(words, previous))  # not "a boat sails"
        # An unknown word before it is an adjective, unless what follows shows a verb with its object.
        return not takes_object


def _is_plural(word: str) -> bool:
    return word in {"people", "men", "women", "children"} or (word.endswith("s") and not word.endswith("ss"))


def _is_plural_phrase(words: Sequence[str], noun: _Span) -> bool:
    """Check whether a noun is the object of an "of" after a plural: "drops of water"."""
    return noun.start > 1 and words[noun.start - 1] == "of" and _is_plural(words[noun.start - 2])


def plurals(names: Mapping[str, str]) -> dict[str, str]:
    """Return the names of things by the plurals of their wordings, modern and classical ones.

    Example:
        >>> plurals({"wine glass": "glass", "cactus": "cactus"})
        {'wine glasses': 'glass', 'cactuses': 'cactus', 'cacti': 'cactus'}
    """
    found: dict[str, str] = {}
    inflect = _inflect()
    for is_classical in (False, True):
        engine = inflect.engine()
        engine.classical(all=is_classical)
        for wording, name in names.items():
            *modifiers, head = wording.split(" ")
            found.setdefault(" ".join([*modifiers, engine.plural_noun(head)]), name)
    return found


def _inflect() -> Any:
    """Import inflect without the type checks that it compiles into its source, which takes two seconds."""
    import typeguard

    typechecked = typeguard.typechecked
    typeguard.typechecked = lambda target: target  # type: ignore[assignment]
    try:
        import inflect
    finally:
        typeguard.typechecked = typechecked
    return inflect


def _heads(nouns: Sequence[_Span], words: Sequence[str]) -> list[_Span]:
    """Drop nouns that only modify the next word: another noun, or one that no image shows."""
    starts = {noun.start for noun in nouns}
    heads = []
    for noun in nouns:
        after = words[noun.end] if noun.end < len(words) else ""
        is_possessor = words[noun.end - 1].endswith("'s")
        is_verb = words[noun.end + 1 : noun.end + 2] and words[noun.end + 1] in _DETERMINERS  # "a man rides a horse"
        is_modifier = noun.end in starts or (after in _ABSTRACT_HEADS and not is_verb)
        is_modifier |= noun.name == "key" and after in _KEY_NOUNS
        if words[noun.start] in _MATERIALS and after.isalpha():
            is_modifier |= after not in _FUNCTION_WORDS and not after.endswith(("ing", "ed", "ly"))
        if is_possessor or not is_modifier:
            heads.append(noun)
    return heads


def _is_asserted(words: Sequence[str], span: _Span) -> bool:
    """Check that nothing before a noun in its clause negates, supposes, compares or generalizes it."""
    first = _clause_start(words, span)
    last = next((index for index in range(span.start, len(words)) if words[index] in _BREAKS), len(words))
    if _GENERALIZATIONS & {words[0], *words[first:last]}:
        return False
    clause = words[first : span.start]
    return not any(_blocks(clause, index) for index in range(len(clause)))


def _clause_start(words: Sequence[str], span: _Span) -> int:
    """Return the index of the first word of a noun's clause; a list with commas is one clause."""
    first = span.start
    after = words[span.end] if span.end < len(words) else ""
    is_item = after in {"", ",", ".", ";", "!", "and", "or"}
    while first > 0 and words[first - 1] not in _CONJUNCTIONS:
        if words[first - 1] in _BREAKS:
            item = words[first : span.start]
            others = _AUXILIARIES | _PRONOUNS | _PREPOSITIONS | _CONTRASTS
            if not (is_item and words[first - 1] == "," and len(item) <= 5 and not set(item) & others):
                break
            return _clause_start(words, _Span(first - 1, first - 1, "")) if first > 1 else 0
        first -= 1
    return first


def _blocks(clause: Sequence[str], index: int) -> bool:
    """Check whether a word keeps the noun after the clause from being asserted.

    Args:
        clause: Words of the clause before the noun.
        index: Index of the word in the clause.
    """
    word, rest = clause[index], clause[index + 1 :]
    before = clause[index - 1] if index else ""
    if word in _NEGATIONS and rest[:1] != ["any"]:
        return rest[:1] != ["only"]
    if word in _SHORT_NEGATIONS | _NEGATIONS:
        return not set(rest) & (_AUXILIARIES | _PREPOSITIONS | {"visible"})
    if word in _SUPPOSITIONS:
        return not (word in {"may", "could"} and rest[:1] == ["be"] and "seen" in rest)
    if word in _COMPARISONS:
        lists = word == "like" and before.endswith("s") and before not in _LOOKS
        return not lists and not set(rest) & (_AUXILIARIES | _PREPOSITIONS - {"of", "to", "with"})
    if word == "of":
        return before in _ARTWORKS
    if word == "for":
        return before in _PURPOSES
    return (word, *rest[:1]) in _BLOCKING_PAIRS


def _count(words: Sequence[str], span: _Span) -> str:
    """Return the number word within three words before a noun."""
    for word in _modifiers(words, span):
        if word in _COUNTS or word.isdigit():
            return word
        if word in {"a", "an"}:
            return "one"
    return ""


def _color(words: Sequence[str], span: _Span) -> str:
    """Return the color before a noun, or the color that the sentence says it is: "the bus is red"."""
    after = [word for word in words[span.end : span.end + 3] if not word.endswith("ly")]
    if len(after) > 1 and after[0] in {"is", "are", "was", "were"} and after[1] in _COLORS:
        return after[1]
    return next((word for word in _modifiers(words, span) if word in _COLORS), "")


def _modifiers(words: Sequence[str], span: _Span) -> list[str]:
    """Return up to three words before a noun that belong to it, the nearest first."""
    modifiers: list[str] = []
    for word in reversed(words[max(span.start - 3, 0) : span.start]):
        if word in _BREAKS or word in _PREPOSITIONS or word == "and":
            break
        modifiers.append(word)
    return modifiers
