"""Define the objects that captions are searched for, and find them in a sequence of words."""

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
"""Word pairs that CHAIR merges; the last two name no object, and are merged so that train is not read as one."""
_ANIMALS_WITH_AGE = (
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
_PASSENGER_VEHICLES = ("jet", "train")


def _coco_pairs() -> dict[str, str]:
    pairs = {pair: pair for pair in _COCO_TWO_WORDS}
    pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS_WITH_AGE}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in _PASSENGER_VEHICLES}
    return pairs | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"}


@dataclass(frozen=True)
class ObjectTable:
    """Map words to the objects that they name."""

    objects: Mapping[str, str]
    """Word or word pair to object."""
    pairs: Mapping[str, str]
    """Two adjacent words to the token that replaces them."""
    of_coco: bool
    """Whether CHAIR's special cases for COCO apply: its word pairs, and no seat beside a toilet."""

    @classmethod
    def read(cls, path: Path, of_coco: bool = True) -> ObjectTable:
        """Read a synonym file: one object per line, its name first, then its synonyms, separated by ", ".

        The file is parsed exactly as CHAIR parses it: a synonym after two spaces keeps one of
        them and never matches, and a name on two lines belongs to the last of them.

        Raises:
            CsrError: The file cannot be read or is empty.
        """
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise CsrError(
                f"the synonym file {path} cannot be read: {error}", "pass a UTF-8 text file with one object per line"
            ) from None
        lines = [line.strip().split(", ") for line in text.splitlines() if line.strip()]
        if not lines:
            raise CsrError(f"the synonym file {path} is empty", "write one object per line: name, synonym, synonym")
        return cls.of(lines, of_coco)

    @classmethod
    def of(cls, lines: Iterable[Iterable[str]], of_coco: bool) -> ObjectTable:
        """Build a table from lists of synonyms, each of which starts with the object's name."""
        objects = {word: names[0] for names in map(list, lines) for word in names}
        pairs = {word: word for word in objects if word.count(" ") == 1}
        return cls(objects, _coco_pairs() if of_coco else pairs, of_coco)

    @classmethod
    def coco(cls) -> ObjectTable:
        """Return the table of COCO's 80 categories that ships with this package."""
        return cls.read(Path(str(resources.files("csr_vlm.evaluation"))) / "assets" / "coco_synonyms.txt")

    @property
    def sha256(self) -> str:
        return digest({"objects": dict(self.objects), "pairs": dict(self.pairs)})


@dataclass(frozen=True)
class ObjectMentions:
    """Hold the objects that a text mentions."""

    tokens: tuple[str, ...]
    """All words of the text, word pairs merged."""
    words: tuple[str, ...]
    """The tokens that name an object, in order, repetitions included."""
    objects: tuple[str, ...]
    """The object that each entry of ``words`` names."""
    positions: tuple[int, ...]
    """Index of each mention among the words before merging, as CHAIR counts: see :func:`find_objects`."""


def find_objects(words: list[str], table: ObjectTable) -> ObjectMentions:
    """Merge word pairs from left to right, then keep the tokens that name objects.

    Where a COCO caption has both toilet and seat, CHAIR drops every seat but not its position,
    so positions after it are one too small. This function reproduces that.
    """
    tokens: list[str] = []
    positions: list[int] = []
    index = 0
    while index < len(words):
        positions.append(index)
        merged = table.pairs.get(" ".join(words[index : index + 2]))
        tokens.append(words[index] if merged is None else merged)
        index += 1 if merged is None else 2
    kept = tokens
    if table.of_coco and "toilet" in tokens and "seat" in tokens:
        kept = [word for word in tokens if word != "seat"]
    mentions = [(token, positions[index]) for index, token in enumerate(kept) if token in table.objects]
    return ObjectMentions(
        tokens=tuple(tokens),
        words=tuple(token for token, _ in mentions),
        objects=tuple(table.objects[token] for token, _ in mentions),
        positions=tuple(position for _, position in mentions),
    )
