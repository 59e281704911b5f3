"""From a text to the words that objects are looked for among: the word rules of CHAIR.

``pattern``   the original's: tokens, singular by :func:`csr_vlm.evaluation.singular.singularize`.
``wordnet``   OPERA's and lmms-eval's: tokens, tagged, lemmatised by WordNet.
``plain``     runs of letters, as they are: for closed vocabularies without inflection.

The two that read COCO differ by points of CHAIR_S, so every number names its rule.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.singular import singularize

WordRuleName = Literal["pattern", "wordnet", "plain"]
PartOfSpeech = Literal["n", "v", "a", "r"]
_LETTERS = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class WordRule:
    """A named way to read words."""

    name: WordRuleName
    read: Callable[[str], list[str]]
    """Text to words in lower case and base form, in order."""
    source: Mapping[str, str]
    """What the result depends on beyond the name: for the protocol."""


def word_rule(name: str, vocabulary: Set[str] = frozenset(), nltk_data: Path | None = None) -> WordRule:
    """Return a word rule by name.

    Args:
        vocabulary: The words that will be looked for; only ``wordnet`` without nltk's data
            needs them.
        nltk_data: An nltk_data directory with ``corpora/wordnet`` and
            ``taggers/averaged_perceptron_tagger_eng`` for ``wordnet``; without it the
            directories that nltk itself searches, and where these hold neither, the
            built-in approximation. ``source`` says which it was.

    Raises:
        CsrError: An unknown name, or a directory given that does not hold both.
    """
    if name == "pattern":
        return WordRule("pattern", lambda text: [singularize(token) for token in tokenize(text)], {})
    if name == "plain":
        return WordRule("plain", letters, {})
    if name == "wordnet":
        return _wordnet(vocabulary, nltk_data)
    raise CsrError(f"there is no word rule {name!r}", f"one of {', '.join(get_args(WordRuleName))}")


def letters(text: str) -> list[str]:
    """List the runs of a to z in a text, lower-cased."""
    return _LETTERS.findall(text.lower())


def tokenize(text: str) -> list[str]:
    """Lower-case a text and split it into sentences and Treebank tokens, as ``nltk.word_tokenize``.

    Of nltk's English sentence model only the abbreviations are used: on lower-cased text
    the rest of it decides nothing, and so nothing is downloaded.
    """
    sentences, tokens = _tokenizers()
    return [token for sentence in sentences(text.lower()) for token in tokens(sentence)]


@lru_cache(maxsize=1)
def _tokenizers() -> tuple[Callable[[str], list[str]], Callable[[str], list[str]]]:
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    assets = resources.files("csr_vlm.evaluation") / "assets"
    parameters.abbrev_types = set((assets / "abbreviations.txt").read_text(encoding="utf-8").splitlines())
    return PunktSentenceTokenizer(parameters).tokenize, NLTKWordTokenizer().tokenize


def _wordnet(vocabulary: Set[str], nltk_data: Path | None) -> WordRule:
    found = _nltk_wordnet(nltk_data)
    lemma, tag = found or (
        lru_cache(maxsize=65536)(partial(builtin_lemma, nouns=vocabulary - _NO_NOUNS)),
        builtin_tags,
    )

    def read(text: str) -> list[str]:
        tokens = tokenize(text)
        return [lemma(token, pos) for token, pos in zip(tokens, tag(tokens), strict=True)]

    return WordRule("wordnet", read, {"wordnet": "nltk_data" if found else "built in"})


Lemmatizer = Callable[[str, PartOfSpeech], str]
Tagger = Callable[[Sequence[str]], list[PartOfSpeech]]


def _nltk_wordnet(directory: Path | None) -> tuple[Lemmatizer, Tagger] | None:
    """Return nltk's lemmatiser and tagger if their data is on this machine."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    paths = None if directory is None else [str(directory)]
    searched = list(nltk.data.path)
    nltk.data.path.extend(paths or ())  # nltk reads only below the directories it knows
    try:
        with warnings.catch_warnings(action="ignore"):  # that it knows English only
            wordnet = WordNetCorpusReader(_find(nltk.data, "corpora/wordnet", paths), None)
        tagger = nltk.tag.PerceptronTagger(load=False)
        tagger.load_from_json("eng", _find(nltk.data, "taggers/averaged_perceptron_tagger_eng", paths))
    except (LookupError, OSError, ValueError) as error:
        if directory is None:
            return None
        raise CsrError(
            f"{directory} holds no whole WordNet and tagger: {str(error).strip().splitlines()[0]}",
            f"python -m nltk.downloader -d {directory} wordnet averaged_perceptron_tagger_eng",
        ) from None
    finally:
        nltk.data.path[:] = searched

    def lemma(word: str, pos: PartOfSpeech) -> str:
        return min(wordnet._morphy(word, pos), key=len, default=word)

    def tags(tokens: Sequence[str]) -> list[PartOfSpeech]:
        letter: dict[str, PartOfSpeech] = {"J": "a", "V": "v", "R": "r"}
        return [letter.get(tag[:1], "n") for _, tag in tagger.tag(list(tokens))]

    return lru_cache(maxsize=65536)(lemma), tags


def _find(data: Any, name: str, paths: list[str] | None) -> Any:
    try:
        return data.find(name, paths)
    except LookupError:
        return data.find(f"{name}.zip/{name.rpartition('/')[2]}/", paths)


# What WordNet 3.0 says about the words CHAIR looks for. A lemma matters to CHAIR only if it
# is, or hides, one of these, so everything else may stay as it is.

_NO_NOUNS = frozenset(
    """biker bluejay brindle children coworker firetruck glas hairdryer hot lenovo longboard macbook netbook oxen
    paddleboat pitbull potted riverboat sailboard shortboard skimboard skis smartphone solider sports stovetop teddybear
    televison""".split()
)
"""Words of COCO's synonym list that WordNet has no noun for: their plurals are not found."""
_NOUN_EXCEPTIONS = {
    "buffaloes": "buffalo", "busses": "bus", "calves": "calf", "children": "child", "flamingoes": "flamingo",
    "geese": "goose", "grandchildren": "grandchild", "knives": "knife", "men": "men", "mice": "mouse", "oxen": "ox",
    "people": "people", "pocketknives": "pocketknife", "skis": "ski", "sports": "sport", "taxies": "taxi",
    "thieves": "thief", "vases": "vas",
}  # fmt: skip
"""Irregular plurals, and words that have a shorter or another lemma than one expects."""
_NOUN_ENDINGS = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
    ("ies", "y"),
)  # fmt: skip
_VERBS = frozenset(
    """air automobile baby backpack ball barge bat bear bed bench bicycle bike bird boat book bore bottle bow bowl
    buffalo bull bulldog bus cab cake canoe case cat chair clock cocker cop couch cow crow cub cup cycle doctor dog duck
    falcon father ferry fire foal fork fowl glass goose groom gull guy home horse hound jet kayak kid kit kite kitten
    knife lamb light man meter microwave monitor mother motor motorbike motorboat motorcycle mouse officer parrot people
    phone plan plane plant plat plate pot pup purse quail racket ram raven sandwich seaplane seat ship sign signal sink
    skateboard ski sky snowboard soldier spoon stave stool stop sub suit surfboard swan table taxi telephone tie top
    track traffic train truck unicycle win wine yacht""".split()
)
_VERB_EXCEPTIONS = {
    "babied": "baby", "born": "bear", "borne": "bear", "bulldogging": "bulldog", "bussed": "buss", "bussing": "buss",
    "ferried": "ferry", "lit": "light", "sank": "sink", "stove": "stave", "sunk": "sink", "sunken": "sink",
    "taxis": "taxis", "taxying": "taxi", "trafficked": "traffic", "trafficking": "traffic", "tying": "tie",
}  # fmt: skip
_VERB_ENDINGS = (
    ("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""),
)  # fmt: skip
_DOUBLED = re.compile(
    r"(bat|bed|cat|cop|cub|cup|dog|jet|kid|man|pot|pup|ram|ship|signal|stop|sub|top)[bdglmnpt](?:ed|ing)"
)
"""Verbs that double their last letter."""


_RULES: Mapping[str, tuple[Mapping[str, str], Sequence[tuple[str, str]], Set[str] | None]] = {
    "n": (_NOUN_EXCEPTIONS, _NOUN_ENDINGS, None),
    "v": (_VERB_EXCEPTIONS, _VERB_ENDINGS, _VERBS),
}
"""Exceptions, detachments and known lemmas, the last None for nouns, which the caller knows."""
_DETERMINERS = frozenset("a an the this that his her its their our my your another each every some no".split())
_PARTICIPLES = frozenset("born borne lit sank sunk sunken".split())
_NOUNS_IN_ING = frozenset("batting bedding bowling lighting parking seating shipping trafficking training".split())


def builtin_lemma(word: str, pos: PartOfSpeech, nouns: Set[str]) -> str:
    """Lemmatise by WordNet's detachment rules, right for the words that CHAIR can find.

    As the WordNet lemmatiser does, it takes the shortest of the word itself and its
    detached forms that are known for the part of speech, or leaves the word. ``nouns``
    need be no more than the words that are looked for: any other lemma is no object.
    """
    if pos not in _RULES:
        return word
    exceptions, endings, verbs = _RULES[pos]
    known = nouns if verbs is None else verbs
    if word in exceptions:
        return exceptions[word]
    forms = [word, *(word.removesuffix(ending) + base for ending, base in endings if word.endswith(ending))]
    if verbs is not None and (doubled := _DOUBLED.fullmatch(word)):
        forms.append(doubled.group(1))
    return min((form for form in forms if form in known), key=len, default=word)


def builtin_tags(tokens: Sequence[str]) -> list[PartOfSpeech]:
    """Guess parts of speech: nouns, but for forms in -ing and -ed and participles.

    A stand-in for the trained tagger. Behind a determiner a participle is an adjective (a
    potted plant) and a form in -ing a noun; elsewhere both are verbs (seated, skiing).
    """
    tags: list[PartOfSpeech] = []
    for before, token in zip(["", *tokens], tokens, strict=False):
        if token.endswith("ing"):
            tags.append("n" if token in _NOUNS_IN_ING or before in _DETERMINERS else "v")
        elif token.endswith("ed") or token in _PARTICIPLES:
            tags.append("a" if before in _DETERMINERS else "v")
        else:
            tags.append("n")
    return tags
