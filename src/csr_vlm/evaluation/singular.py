"""Compute singular forms exactly as the ``pattern`` library does, mistakes included.

The original CHAIR applies ``pattern.en.singularize``, which removes a final s from nearly every
word: bus becomes bu and ties becomes ty, so neither matches an object. Results comparable with
the original need the same forms. The rules are those of that library (BSD license; they go back
to Bermi Ferrer's Inflector, MIT license), restated as suffixes: the first rule applies whose
ending the word has, preceded by one of the strings that the rule requires.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

_PREPOSITIONS = frozenset(
    """about above across after among around at athwart before behind below beneath beside besides between betwixt
    beyond but by during except for from in into near of off on onto out over since till to under until unto upon
    with""".split()
)
_UNCHANGED = tuple(
    """advice bison bread bream breeches britches butter carp chassis cheese christmas clippers cod contretemps corps
    debris diabetes djinn eland electricity elk equipment flounder fruit furniture gallows garbage georgia graffiti
    gravel happiness headquarters herpes high-jinks homework information innings jackanapes ketchup knowledge love
    luggage mackerel mathematics mayonnaise measles meat mews mumps mustard news pincers pliers proceedings progress
    rabies research rice salmon sand scissors series shears software species swine swiss trout tuna understanding water
    whiting wildebeest""".split()
)
"""Words without a singular; the library keeps every word that is an ENDING of one of them, such as ears (shears)."""
_PLURAL_KEPT = tuple(
    f"{word}s"
    for word in """alergie auntie beanie birdie bogie bombie collie cookie cutie doggie eyrie freebie goonie groupie
    hankie hippie hoagie hottie indie junkie laddie laramie lingerie meanie newbie nightie oldie pixie quickie reverie
    rookie softie sortie stoolie sweetie techie toughie valkyrie veggie weenie yuppie zombie""".split()
)
"""Plurals that the library recognizes but returns unchanged."""
_IRREGULAR = {
    "atlantes": "atlas", "atlases": "atlas", "axes": "axe", "beeves": "beef", "brethren": "brother",
    "children": "child", "corpora": "corpus", "corpuses": "corpus", "ephemerides": "ephemeris", "feet": "foot",
    "ganglia": "ganglion", "geese": "goose", "genera": "genus", "genii": "genie", "graffiti": "graffito",
    "helves": "helve", "kine": "cow", "leaves": "leaf", "loaves": "loaf", "men": "man", "mongooses": "mongoose",
    "monies": "money", "moves": "move", "mythoi": "mythos", "numena": "numen", "occipita": "occiput",
    "octopodes": "octopus", "opera": "opus", "opuses": "opus", "our": "my", "oxen": "ox", "penes": "penis",
    "penises": "penis", "people": "person", "sexes": "sex", "soliloquies": "soliloquy", "teeth": "tooth",
    "testes": "testis", "trilbys": "trilby", "turves": "turf", "zoa": "zoon",
}  # fmt: skip
"""Endings, not whole words: four ends in our and becomes fmy. No key is an ending of another."""


@dataclass(frozen=True)
class _Rule:
    """Replace ``ending`` by ``singular`` in words that end in ``before`` + ``ending``."""

    ending: str
    singular: str
    before: tuple[str, ...] = ("",)
    """Strings, one of which must precede the ending; with ``other_than``, letters that must not."""
    other_than: bool = False

    def apply(self, word: str) -> str | None:
        if not word.endswith(self.ending):
            return None
        stem = word.removesuffix(self.ending)
        fits = stem[-1:] not in {"", *self.before} if self.other_than else stem.endswith(self.before)
        return stem + self.singular if fits else None


_RULES = (
    _Rule("ae", "a", (), other_than=True),
    _Rule("itis", "itis", (), other_than=True),
    _Rule("eaux", "eau", (), other_than=True),
    _Rule("zes", "", ("quiz",)),
    _Rule("ices", "ix", ("matr",)),
    _Rule("ices", "ex", ("ap", "vert", "ind")),
    _Rule("es", "", ("alias", "status")),
    _Rule("i", "us", tuple("octp|vir")),
    _Rule("es", "is", ("cris", "ax", "test")),
    _Rule("s", "", ("shoe",)),
    _Rule("es", "", ("o", "bus")),
    _Rule("ice", "ouse", tuple("m|l")),
    _Rule("es", "", ("x", "ch", "ss", "sh")),
    _Rule("ovies", "ovie", ("m",)),
    _Rule("ombies", "ombie", (), other_than=True),
    _Rule("eries", "eries", ("s",)),
    _Rule("ies", "y", tuple("aeiouy"), other_than=True),
    _Rule("ies", "y", ("qu",)),
    _Rule("ves", "f", ("al", "el", "ol")),
    _Rule("eaves", "eaf", ("d",), other_than=True),
    _Rule("arves", "arf"),
    _Rule("erves", "erve"),
    _Rule("ves", "fe", ("ni", "li", "wi")),
    _Rule("ves", "f", ("l", "r")),
    _Rule("ves", "ve", ("a", "e", "o")),
    _Rule("s", "", ("sive", "tive", "hive")),
    _Rule("ves", "fe", ("f",), other_than=True),
    _Rule("ses", "sis", ("ba", "diagno", "parenthe", "progno", "synop", "the")),
    _Rule("opses", "opsis", (), other_than=True),
    _Rule("yses", "ysis", (), other_than=True),
    _Rule("oses", "ose", ("h", "d", "r", "o", "n", "b", "cl", "p")),
    _Rule("ose", "ose", ("fruct", "gluc", "galact", "lact", "ket", "malt", "rib", "sacchar", "cellul")),
    _Rule("oses", "osis", (), other_than=True),
    _Rule("a", "um", ("t", "i")),
    _Rule("ews", "ews", ("n",)),
    _Rule("s", ""),
)


@lru_cache(maxsize=65536)
def singularize(word: str) -> str:
    """Return ``pattern.en.singularize(word)`` for a lower-case token.

    Example:
        >>> [singularize(word) for word in ("dogs", "children", "bus", "ties", "knives")]
        ['dog', 'child', 'bu', 'ty', 'knife']
    """
    head, *rest = word.split("-")
    if rest and rest[0] in _PREPOSITIONS:
        return "-".join((singularize(head), *rest))
    if word.endswith("'"):
        return singularize(word[:-1]) + "'s"
    if any(entry.endswith(word) for entry in _UNCHANGED) or word.endswith(_PLURAL_KEPT):
        return word
    for plural, singular in _IRREGULAR.items():
        if word.endswith(plural):
            return word.removesuffix(plural) + singular
    return _regular(word)


def _regular(word: str) -> str:
    if word.startswith("oxen"):  # the only rule about a prefix
        return "ox" + word.removeprefix("oxen")
    if word.endswith("analyses"):  # after a prefix, the library repeats the letter a of its regex group
        return word.removesuffix("yses") + ("ysis" if word == "analyses" else "yasis")
    return next((singular for rule in _RULES if (singular := rule.apply(word)) is not None), word)
