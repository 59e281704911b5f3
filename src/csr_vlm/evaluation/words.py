"""Split a text into the words among which objects are looked for: CHAIR's word rules.

``pattern``   The original's rule: tokens made singular by :func:`csr_vlm.evaluation.singular.singularize`.
``wordnet``   The rule of OPERA and lmms-eval: tokens tagged and lemmatized with WordNet.
``plain``     Runs of letters, unchanged; for closed vocabularies without inflection.

On COCO, ``pattern`` and ``wordnet`` differ by several points of CHAIR_S, so every result names its rule.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from csr_vlm.core.errors import CsrError
from csr_vlm.evaluation.singular import singularize

WordRuleName = Literal["pattern", "wordnet", "plain"]
PartOfSpeech = Literal["n", "v", "a", "r"]
Lemmatizer = Callable[[str, PartOfSpeech], str]
Tagger = Callable[[Sequence[str]], list[PartOfSpeech]]
_LETTERS = re.compile(r"[a-z]+")
_DOWNLOAD = "python -m nltk.downloader {}wordnet averaged_perceptron_tagger_eng"


@dataclass(frozen=True)
class WordRule:
    """Name a way to split text into words, and apply it."""

    name: WordRuleName
    read: Callable[[str], list[str]]
    """Text to words in lower case and base form, in order."""
    source: Mapping[str, str]
    """External data that the result depends on, for the protocol."""


def word_rule(name: str, nltk_data: Path | None = None) -> WordRule:
    """Return a word rule by name.

    Args:
        nltk_data: Directory with ``corpora/wordnet`` and
            ``taggers/averaged_perceptron_tagger_eng``, for ``wordnet``; by default the
            directories that nltk searches.

    Raises:
        CsrError: The name is unknown, or ``wordnet`` is requested and its nltk data is missing.
    """
    if name == "pattern":
        return WordRule("pattern", lambda text: [singularize(token) for token in tokenize(text)], {})
    if name == "plain":
        return WordRule("plain", letters, {})
    if name == "wordnet":
        return _wordnet(nltk_data)
    raise CsrError(f"{name!r} is not a valid word rule", f"expected one of: {', '.join(get_args(WordRuleName))}")


def letters(text: str) -> list[str]:
    """List the runs of the letters a to z in a lower-cased text."""
    return _LETTERS.findall(text.lower())


def tokenize(text: str) -> list[str]:
    """Lower-case a text and split it into sentences and Treebank tokens, as ``nltk.word_tokenize``.

    Only the abbreviations of nltk's English sentence model are used. The rest of the model has
    no effect on lower-cased text, so nothing needs to be downloaded.
    """
    sentences, tokens = _tokenizers()
    return [token for sentence in sentences(text.lower()) for token in tokens(sentence)]


@lru_cache(maxsize=1)
def _tokenizers() -> tuple[Callable[[str], list[str]], Callable[[str], list[str]]]:
    """Return nltk's sentence splitter and its word tokenizer."""
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    assets = resources.files("csr_vlm.evaluation") / "assets"
    parameters.abbrev_types = set((assets / "abbreviations.txt").read_text(encoding="utf-8").splitlines())
    return PunktSentenceTokenizer(parameters).tokenize, NLTKWordTokenizer().tokenize


def _wordnet(nltk_data: Path | None) -> WordRule:
    lemmatize, tag = _load_nltk_wordnet(nltk_data)

    def read(text: str) -> list[str]:
        tokens = tokenize(text)
        return [lemmatize(token, pos) for token, pos in zip(tokens, tag(tokens), strict=True)]

    return WordRule("wordnet", read, {"wordnet": "nltk_data"})


def _load_nltk_wordnet(directory: Path | None) -> tuple[Lemmatizer, Tagger]:
    """Load nltk's lemmatizer and tagger from a directory, or from wherever nltk finds their data."""
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    paths = None if directory is None else [str(directory)]
    search_path = list(nltk.data.path)
    nltk.data.path.extend(paths or ())  # nltk reads only below the directories on its search path
    try:
        with warnings.catch_warnings(action="ignore"):  # about the missing multilingual WordNet
            wordnet = WordNetCorpusReader(_find(nltk.data, "corpora/wordnet", paths), None)
        tagger = nltk.tag.PerceptronTagger(load=False)
        tagger.load_from_json("eng", _find(nltk.data, "taggers/averaged_perceptron_tagger_eng", paths))
    except (LookupError, OSError, ValueError) as error:
        option = "" if directory is None else f"-d {directory} "
        where = "" if directory is None else f" in {directory}"
        reason = next((line.strip(" *.") for line in str(error).splitlines() if line.strip(" *.")), repr(error))
        raise CsrError(
            f"the word rule 'wordnet' needs nltk's WordNet and English tagger{where}: {reason}",
            f"run: {_DOWNLOAD.format(option)}; or use --words pattern",
        ) from None
    finally:
        nltk.data.path[:] = search_path

    def lemmatize(word: str, pos: PartOfSpeech) -> str:
        return min(wordnet._morphy(word, pos), key=len, default=word)

    def tag(tokens: Sequence[str]) -> list[PartOfSpeech]:
        parts: dict[str, PartOfSpeech] = {"J": "a", "V": "v", "R": "r"}
        return [parts.get(label[:1], "n") for _, label in tagger.tag(list(tokens))]

    return lru_cache(maxsize=65536)(lemmatize), tag


def _find(data: Any, name: str, paths: list[str] | None) -> Any:
    """Find a resource of nltk, unpacked or as it is downloaded, zipped."""
    try:
        return data.find(name, paths)
    except LookupError:
        return data.find(f"{name}.zip/{name.rpartition('/')[2]}/", paths)
