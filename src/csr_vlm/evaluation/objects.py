"""The objects that captions are searched for, and how they are found in a row of words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from csr_vlm.core.errors import CsrError
from csr_vlm.store.files import digest

_COCO_TWO_WORDS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant",
    "laptop computer", "home plate", "train track",
)  # fmt: skip
"""Pairs of words that CHAIR reads as one; two of them so that they are NOT read as an object."""
_YOUNG_AND_OLD = (
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
)
_FOR_PASSENGERS = ("jet", "train")


def _coco_pairs() -> dict[str, str]:
    pairs = {pair: pair for pair in _COCO_TWO_WORDS}
    pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _YOUNG_AND_OLD}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in _FOR_PASSENGERS}
    return pairs | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


@dataclass(frozen=True)
class ObjectTable:
    """Which words name which objects."""

    objects: Mapping[str, str]
    """Word, or pair of words, to object."""
    pairs: Mapping[str, str]
    """Two neighbouring words to what they are read as."""
    of_coco: bool
    """Whether CHAIR's rules about COCO's captions apply: its pairs, and no seat beside a toilet."""

    @classmethod
    def read(cls, path: Path, of_coco: bool = True) -> ObjectTable:
        """Read a synonym file: a line an object, its name first, then its synonyms, split at ", ".

        It is read as CHAIR reads it, so a synonym behind two spaces keeps one and is never
        found, and a name on two lines belongs to the last.

        Raises:
            CsrError: The file cannot be read or is empty.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CsrError(f"the synonym file {path} cannot be read: {error}", "one object a line") from None
        lines = [line.strip().split(", ") for line in text.splitlines() if line.strip()]
        if not lines:
            raise CsrError(f"the synonym file {path} is empty", "one object a line: name, synonym, synonym")
        return cls.of(lines, of_coco)

    @classmethod
    def of(cls, lines: Iterable[Iterable[str]], of_coco: bool) -> ObjectTable:
        """Make a table of lines of synonyms, the object's name first in each."""
        objects = {word: names[0] for names in map(list, lines) for word in names}
        pairs = {word: word for word in objects if word.count(" ") == 1}
        return cls(objects, _coco_pairs() if of_coco else pairs, of_coco)

    @classmethod
    def coco(cls) -> ObjectTable:
        """Return our own table of COCO's 80 categories."""
        return cls.read(Path(str(resources.files("csr_vlm.evaluation"))) / "assets" / "coco_synonyms.txt")

    @property
    def vocabulary(self) -> frozenset[str]:
        """Every single word that can be part of an object or of a pair."""
        return frozenset(word for entry in (*self.objects, *self.pairs) for word in entry.split())

    @property
    def sha256(self) -> str:
        return digest({"objects": dict(self.objects), "pairs": dict(self.pairs)})


@dataclass(frozen=True)
class Reading:
    """The objects found in a row of words."""

    tokens: tuple[str, ...]
    """The words, pairs merged."""
    words: tuple[str, ...]
    """Those of them that name an object, in order, repetitions included."""
    objects: tuple[str, ...]
    """The objects they name."""
    places: tuple[int, ...]
    """Where they stand among the words before merging, as CHAIR counts: see :func:`find_objects`."""


def find_objects(words: list[str], table: ObjectTable) -> Reading:
    """Merge pairs from left to right, then keep the words that name objects.

    Where a caption of COCO has both toilet and seat, every seat is dropped; CHAIR does not
    drop their places, so the places behind one are too small, and ours are the same.
    """
    tokens: list[str] = []
    places: list[int] = []
    at = 0
    while at < len(words):
        places.append(at)
        merged = table.pairs.get(" ".join(words[at : at + 2]))
        tokens.append(words[at] if merged is None else merged)
        at += 1 if merged is None else 2
    kept = tokens
    if table.of_coco and "toilet" in tokens and "seat" in tokens:
        kept = [word for word in tokens if word != "seat"]
    found = [(token, places[index]) for index, token in enumerate(kept) if token in table.objects]
    return Reading(
        tokens=tuple(tokens),
        words=tuple(token for token, _ in found),
        objects=tuple(table.objects[token] for token, _ in found),
        places=tuple(place for _, place in found),
    )
