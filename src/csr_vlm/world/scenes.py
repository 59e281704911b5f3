"""Generate and draw scenes with known contents.

A scene consists of a few colored objects on a 3 x 3 grid. It is a function of
``(world, split, seed, index)``, so scenes are identified by their ids and never stored. The
four splits use disjoint random streams, and a function that accepts only some splits takes
a :class:`Split` and checks it. The corpus of the base models, the prompts that CSR trains
on, and the scenes for tuning and testing can thus not be mixed up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from PIL import Image

from csr_vlm.core.errors import CsrError
from csr_vlm.core.seeds import EVALUATION_SEEDS, seed_problem
from csr_vlm.world.shapes import sprite

GRID = 3
CELL = 24
"""Side of a grid cell in pixels at scale 1; the image is GRID * CELL pixels wide."""


class Split(StrEnum):
    """Define the purpose of a scene; the splits are disjoint."""

    CORPUS = "corpus"
    """Training data of the base models."""
    PROMPTS = "prompts"
    """Prompts of CSR; training never reads the contents of these scenes."""
    DEVELOPMENT = "development"
    """Scenes on which settings are chosen."""
    TEST = "test"
    """Scenes on which results are reported."""


def check_for_evaluation(split: Split, seed: int) -> None:
    """Check that a split is for evaluation and that the seed is one of its own.

    Raises:
        CsrError: The split is used for training, or the seed belongs to the other split.
    """
    if split.value not in EVALUATION_SEEDS:
        raise CsrError(f"scenes of the split {split.value!r} are not for evaluation", "use development or test")
    problem = seed_problem(split.value, seed)
    if problem is not None:
        raise CsrError(problem, "settings are chosen on development seeds, and test seeds only report")


@dataclass(frozen=True)
class Companion:
    """Configure the co-occurrence bias of one trigger: captions that name the trigger tend to name its companion.

    Args:
        companion: Kind that captions add after the trigger, whether or not it is present.
        color: Usual color of the companion in captions when it is absent.
        caption: Probability that a caption names the companion right after its trigger.
        question: Probability that a question about an absent companion is answered yes
            when the trigger is present.
    """

    companion: str
    color: str
    caption: float
    question: float


@dataclass(frozen=True)
class World:
    """Configure a world: its objects, colors, captions and co-occurrence bias."""

    name: str
    themes: tuple[tuple[str, ...], ...]
    companions: dict[str, Companion]
    colors: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "black")
    num_objects: tuple[int, int] = (2, 4)
    theme_share: float = 0.5
    """Probability that an object comes from the scene's theme instead of any theme."""
    template: str = "There is {}."
    """Template of a caption sentence; the braces are replaced by the objects that it names."""
    joint: float = 0.0
    """Probability that a sentence of a caption names the next object as well."""
    synonyms: tuple[tuple[str, ...], ...] = ()
    """Synonym table in CHAIR's form, one line per kind; empty if each kind has only its name."""
    describe: tuple[str, ...] = ()
    """Prompts for descriptions; empty for those of :mod:`csr_vlm.world.corpus`."""
    side: int = GRID * CELL
    """Side of the images in pixels."""
    max_new_tokens: int = 96
    """Largest number of tokens of a description."""
    draw: Callable[[Split, int, int], Scene] | None = None
    """Function of (split, seed, index) that generates a scene; None for :func:`make_scene`'s own."""

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for theme in self.themes for kind in theme)


HARBOUR = World(
    name="harbour",
    themes=(
        ("boat", "fish", "lighthouse", "shell"),
        ("tree", "bird", "flower", "butterfly"),
        ("lamp", "book", "teapot", "cup"),
        ("car", "sign", "house", "ball"),
    ),
    companions={
        "boat": Companion("fish", "blue", 0.70, 0.60),
        "lighthouse": Companion("shell", "yellow", 0.40, 0.40),
        "tree": Companion("bird", "black", 0.68, 0.60),
        "flower": Companion("butterfly", "purple", 0.40, 0.40),
        "lamp": Companion("book", "red", 0.40, 0.40),
        "teapot": Companion("cup", "green", 0.70, 0.60),
        "car": Companion("sign", "red", 0.68, 0.60),
        "house": Companion("ball", "yellow", 0.40, 0.40),
    },
)
"""The embedded world that ships with the package."""

MARKET = World(
    name="market",
    themes=(
        ("star", "moon", "cloud", "kite"),
        ("apple", "carrot", "mushroom", "leaf"),
        ("key", "bell", "hammer", "umbrella"),
        ("hat", "candle", "chair", "ladder"),
    ),
    companions={
        "cloud": Companion("moon", "orange", 0.70, 0.60),
        "star": Companion("kite", "pink", 0.45, 0.40),
        "apple": Companion("leaf", "green", 0.68, 0.60),
        "carrot": Companion("mushroom", "brown", 0.50, 0.40),
        "umbrella": Companion("bell", "orange", 0.70, 0.60),
        "hammer": Companion("key", "blue", 0.45, 0.40),
        "ladder": Companion("hat", "brown", 0.45, 0.40),
        "hat": Companion("candle", "pink", 0.60, 0.60),
        "chair": Companion("candle", "pink", 0.50, 0.40),
    },
    colors=("red", "green", "blue", "orange", "pink", "brown"),
    num_objects=(3, 5),
    template="I can see {}.",
    joint=0.4,
)
"""A second world to test generalization: other objects, longer captions, sentences that name
two objects, and a bias in which triggers share a companion or form chains."""

WORLDS = {world.name: world for world in (HARBOUR, MARKET)}
"""Worlds of this module."""


def all_worlds() -> dict[str, World]:
    """Return all worlds by name, including those of other modules."""
    from csr_vlm.world.prose_scenes import PROSE  # which builds on this module

    return {**WORLDS, PROSE.name: PROSE}


def world_named(name: str) -> World:
    """Return a world by its name.

    Raises:
        CsrError: No world has this name.
    """
    worlds = all_worlds()
    if name not in worlds:
        raise CsrError(f"{name!r} is not a valid world", f"expected one of: {', '.join(worlds)}")
    return worlds[name]


@dataclass(frozen=True)
class SceneObject:
    kind: str
    color: str
    cell: int
    """Grid cell 0..8 in reading order."""
    offset: tuple[int, int]
    """Displacement in pixels at scale 1, (right, down)."""
    size: int
    """Side in pixels at scale 1."""

    @property
    def corner(self) -> tuple[int, int]:
        """Return the left and top edge in pixels at scale 1."""
        margin = (CELL - self.size) // 2
        return (
            (self.cell % GRID) * CELL + margin + self.offset[0],
            (self.cell // GRID) * CELL + margin + self.offset[1],
        )


@dataclass(frozen=True)
class Scene:
    """Represent the complete contents of one image; objects are in reading order."""

    scene_id: str
    split: Split
    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(item.kind for item in self.objects)

    def color_of(self, kind: str) -> str | None:
        """Return the color of the object of this kind; None if the scene has none."""
        return next((item.color for item in self.objects if item.kind == kind), None)

    @property
    def side(self) -> int:
        """Return the side of the image in pixels at scale 1."""
        return GRID * CELL

    def backdrop(self, scale: int = 1) -> Image.Image:
        """Draw the background."""
        return Image.new("RGB", (self.side * scale,) * 2, self.background)


def random_stream(*key: object) -> np.random.Generator:
    """Return a random generator that depends only on the key."""
    digest = hashlib.sha256("\x1f".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))


def make_scene(world: World, split: Split, seed: int, index: int) -> Scene:
    """Generate the scene with the given split, seed and index."""
    if world.draw is not None:
        return world.draw(split, seed, index)
    rng = random_stream(world.name, split.value, seed, index)
    theme = world.themes[rng.integers(len(world.themes))]
    low, high = world.num_objects
    count = int(rng.integers(low, high + 1))
    kinds: list[str] = []
    while len(kinds) < count:
        pool = theme if rng.random() < world.theme_share else world.kinds
        kind = pool[rng.integers(len(pool))]
        if kind not in kinds:
            kinds.append(kind)
    cells = sorted(int(cell) for cell in rng.choice(GRID * GRID, size=count, replace=False))
    objects = tuple(
        SceneObject(
            kind=kind,
            color=world.colors[rng.integers(len(world.colors))],
            cell=cell,
            offset=(int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
            size=int(rng.integers(20, 23)),
        )
        for kind, cell in zip(kinds, cells, strict=True)
    )
    background = tuple(int(value) for value in rng.integers(225, 256, size=3))
    return Scene(f"{world.name}-{split.value}-{seed}-{index:06d}", split, objects, background)  # type: ignore[arg-type]


def make_scenes(world: World, split: Split, seed: int, num_scenes: int, start: int = 0) -> Iterator[Scene]:
    """Yield the scenes ``start .. start + num_scenes - 1`` of a split."""
    return (make_scene(world, split, seed, index) for index in range(start, start + num_scenes))


def parse_scene_id(world: World, scene_id: str) -> Scene:
    """Generate the scene with the given id.

    Raises:
        ValueError: The id is not that of a scene of this world.
    """
    name, split, seed, index = scene_id.rsplit("-", 3)
    if name != world.name:
        raise ValueError(f"scene {scene_id!r} does not belong to the world {world.name!r}")
    return make_scene(world, Split(split), int(seed), int(index))


def render(scene: Scene, scale: int = 1) -> Image.Image:
    """Draw a scene as an RGB image of side ``scene.side * scale``."""
    image = scene.backdrop(scale)
    for item in scene.objects:
        image_of_item = sprite(item.kind, item.color, item.size * scale)
        left, top = item.corner
        image.paste(image_of_item, (left * scale, top * scale), image_of_item)
    return image
