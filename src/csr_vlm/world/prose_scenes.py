"""Draw the scenes of ``prose``: settings, groups of one to three objects, sizes that differ by a factor of 3.

A picture of 96 x 96 pixels has a grid of 4 x 4 cells. A group is one to three objects of one kind
and color; a large object fills a block of 2 x 2 cells, every other object one cell. What is
likely depends on the setting (a street, a beach, a room), which also decides the backdrop.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from csr_vlm.world.scenes import CELL, Companion, Scene, SceneObject, Split, World, random_stream

NUM_CELLS = 4
"""Cells along a side of the picture."""
SIDE = NUM_CELLS * CELL
"""Pixels along a side of the picture at scale 1."""
_NUM_GROUPS = (3, 5)
_NUM_OBJECTS = (3, 8)
_COUNTS = (0.58, 0.28, 0.14)
"""Probabilities of one, two and three objects in a group."""
_TYPICAL = 0.85
"""Probability that a group is of a kind that the setting likes."""
_PIXELS = {"small": (14, 16), "medium": (21, 23), "large": (42, 45)}
"""Least and greatest side of an object by size class."""

LARGE = frozenset("boat lighthouse tree car house person table bench ladder umbrella".split())
SMALL = frozenset("shell cup key leaf butterfly mushroom apple candle flower bell".split())


@dataclass(frozen=True)
class Setting:
    """Define a kind of place.

    Args:
        kinds: Kinds that are often there.
        place: Where the picture was taken, as captions say it.
        scene: The same as an adjective.
        habit: Kind that captions add in the background, present or not.
        strength: Probability of adding it when absent, before the factor of the sentence's position.
        sky: Color of the upper part of the backdrop.
        ground: Color of the lower part.
        horizon: Height of the border between the two, as a share of the picture.
        moods: Adjectives of the mood.
    """

    kinds: tuple[str, ...]
    place: str
    scene: str
    habit: str
    strength: float
    sky: tuple[int, int, int]
    ground: tuple[int, int, int]
    horizon: float
    moods: tuple[str, ...]


SETTINGS = {
    "beach": Setting(
        tuple("boat fish lighthouse shell umbrella ball bird kite person cloud dog hat".split()),
        "on a sandy beach", "beach", "boat", 0.66, (196, 226, 246), (244, 226, 178), 0.5,
        ("relaxing", "sunny", "carefree"),
    ),
    "street": Setting(
        tuple("car sign house lamp person bench tree dog clock bird umbrella bell".split()),
        "on a city street", "street", "car", 0.62, (222, 228, 234), (186, 188, 194), 0.45,
        ("busy", "lively", "urban"),
    ),
    "park": Setting(
        tuple("tree bird flower butterfly bench kite person dog ball leaf cloud".split()),
        "in a green park", "park", "person", 0.64, (206, 234, 250), (190, 228, 172), 0.4,
        ("peaceful", "cheerful", "fresh"),
    ),
    "field": Setting(
        tuple("house mushroom carrot apple leaf flower butterfly tree bird cat ladder cloud".split()),
        "in an open field", "countryside", "tree", 0.35, (236, 240, 232), (228, 222, 150), 0.35,
        ("quiet", "rural", "calm"),
    ),
    "room": Setting(
        tuple("lamp book chair table cat clock candle cup ball dog hat".split()),
        "in a living room", "living room", "lamp", 0.64, (246, 226, 206), (218, 190, 166), 0.6,
        ("cozy", "warm", "comfortable"),
    ),
    "kitchen": Setting(
        tuple("teapot cup apple carrot mushroom table chair clock candle fish cat".split()),
        "in a kitchen", "kitchen", "cup", 0.35, (240, 246, 246), (196, 216, 222), 0.65,
        ("homely", "tidy", "inviting"),
    ),
    "workshop": Setting(
        tuple("hammer key ladder bell table lamp chair hat clock book umbrella".split()),
        "in a workshop", "workshop", "hammer", 0.35, (226, 218, 226), (196, 184, 190), 0.55,
        ("orderly", "practical", "serious"),
    ),
    "night": Setting(
        tuple("star moon cloud house lighthouse tree lamp cat bell kite".split()),
        "outdoors at night", "night", "moon", 0.62, (172, 172, 214), (160, 168, 190), 0.7,
        ("mysterious", "dreamy", "silent"),
    ),
}  # fmt: skip
"""Every setting by its name."""

SYNONYMS = tuple(
    tuple(line.split(", "))
    for line in """boat, sailboat, ship, sailing boat
fish
lighthouse, beacon
shell, seashell
tree, pine
bird, sparrow
flower, blossom
butterfly
lamp, lantern
book, novel
teapot, kettle
cup, mug
car, automobile, sedan
sign, signpost, street sign
house, cottage
ball, beach ball
star
moon, crescent
cloud
kite
apple
carrot
mushroom, toadstool
leaf
key
bell
hammer, mallet
umbrella, parasol
hat, cap
candle
chair, armchair
ladder, stepladder
person, man, woman
dog, puppy
cat, kitten
bench
table, desk
clock, timepiece""".splitlines()
)
"""A line a kind in the form of CHAIR's synonym file, the kind's own word first."""

COLORS = ("red", "green", "blue", "yellow", "purple", "black", "orange", "brown")

COMPANIONS = {
    "boat": Companion("fish", "blue", 0.66, 0.60),
    "lighthouse": Companion("boat", "red", 0.40, 0.40),
    "umbrella": Companion("chair", "blue", 0.62, 0.60),
    "shell": Companion("ball", "red", 0.42, 0.40),
    "tree": Companion("bird", "black", 0.64, 0.60),
    "flower": Companion("butterfly", "purple", 0.62, 0.60),
    "leaf": Companion("mushroom", "brown", 0.38, 0.40),
    "person": Companion("dog", "brown", 0.60, 0.60),
    "kite": Companion("cloud", "blue", 0.40, 0.40),
    "car": Companion("sign", "red", 0.64, 0.60),
    "house": Companion("tree", "green", 0.58, 0.60),
    "bench": Companion("person", "black", 0.62, 0.60),
    "lamp": Companion("book", "red", 0.42, 0.40),
    "table": Companion("cup", "yellow", 0.66, 0.60),
    "teapot": Companion("cup", "green", 0.60, 0.60),
    "chair": Companion("cat", "black", 0.58, 0.40),
    "candle": Companion("clock", "yellow", 0.38, 0.40),
    "hammer": Companion("key", "black", 0.60, 0.60),
    "ladder": Companion("hat", "yellow", 0.42, 0.40),
    "moon": Companion("star", "yellow", 0.66, 0.60),
    "carrot": Companion("apple", "green", 0.40, 0.40),
}
"""The co-occurrence bias: the kind that captions add after a kind, and its usual color when absent."""


@dataclass(frozen=True)
class PlacedObject(SceneObject):
    """Define an object by the first cell of its block, 0..15 in reading order."""

    @property
    def span(self) -> int:
        """Return the number of cells along a side of its block."""
        return 2 if self.size > CELL else 1

    @property
    def corner(self) -> tuple[int, int]:
        """Return the pixels (left, top) of its upper left corner."""
        margin = (self.span * CELL - self.size) // 2
        row, column = divmod(self.cell, NUM_CELLS)
        left, top = column * CELL + margin + self.offset[0], row * CELL + margin + self.offset[1]
        return min(max(left, 0), SIDE - self.size), min(max(top, 0), SIDE - self.size)

    @property
    def center(self) -> tuple[float, float]:
        """Return its center (right, down) as fractions of the picture."""
        left, top = self.corner
        return (left + self.size / 2) / SIDE, (top + self.size / 2) / SIDE


@dataclass(frozen=True)
class Group:
    """Hold one to three objects of one kind and color."""

    kind: str
    color: str
    objects: tuple[PlacedObject, ...]

    @property
    def count(self) -> int:
        """Return the number of objects."""
        return len(self.objects)

    @property
    def size(self) -> int:
        """Return the side of its first object in pixels."""
        return self.objects[0].size

    @property
    def center(self) -> tuple[float, float]:
        """Return the mean center of its objects as fractions of the picture."""
        points = np.array([item.center for item in self.objects]).mean(0)
        return float(points[0]), float(points[1])


@dataclass(frozen=True)
class ProseScene(Scene):
    """Define a picture in a setting, with its groups in reading order of their first objects."""

    setting: str = "beach"

    @property
    def side(self) -> int:
        """Return the side of the picture in pixels."""
        return SIDE

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Return the groups in reading order of their first objects."""
        kinds = dict.fromkeys(item.kind for item in self.objects)
        return tuple(self._group(kind) for kind in kinds)

    def _group(self, kind: str) -> Group:
        items = tuple(item for item in self.objects if item.kind == kind)
        return Group(kind, items[0].color, items)  # type: ignore[arg-type]

    def group_of(self, kind: str) -> Group | None:
        """Return the group of a kind, or None where there is none."""
        return next((group for group in self.groups if group.kind == kind), None)

    def backdrop(self, scale: int = 1) -> Image.Image:
        """Draw the sky or wall, and the ground or floor below it, tinted by ``background``."""
        setting = SETTINGS[self.setting]
        tint = tuple(value - 247 for value in self.background)
        sky, ground = (
            tuple(c + t for c, t in zip(color, tint, strict=True)) for color in (setting.sky, setting.ground)
        )
        image = Image.new("RGB", (SIDE * scale,) * 2, sky)
        horizon = round(SIDE * setting.horizon)
        ImageDraw.Draw(image).rectangle((0, horizon * scale, SIDE * scale, SIDE * scale), fill=ground)
        return image


def draw_scene(split: Split, seed: int, index: int) -> ProseScene:
    """Draw the scene named by (split, seed, index)."""
    rng = random_stream(PROSE.name, split.value, seed, index)
    setting = tuple(SETTINGS)[rng.integers(len(SETTINGS))]
    objects: list[PlacedObject] = []
    free = np.ones((NUM_CELLS, NUM_CELLS), dtype=bool)
    kinds: list[str] = []
    wanted = int(rng.integers(_NUM_GROUPS[0], _NUM_GROUPS[1] + 1))
    while len(kinds) < wanted:
        pool = SETTINGS[setting].kinds if rng.random() < _TYPICAL else PROSE.kinds
        kind = pool[rng.integers(len(pool))]
        if kind not in kinds:
            kinds.append(kind)
    # Large kinds first, while there is room; every group keeps at least one cell for its first object.
    kinds.sort(key=lambda kind: _size_class(kind) != "large")
    for number, kind in enumerate(kinds):
        objects += _place_group(kind, free, _NUM_OBJECTS[1] - len(objects) - (wanted - 1 - number), rng)
    objects.sort(key=lambda item: item.cell)
    tint = tuple(int(value) for value in rng.integers(239, 256, size=3))
    name = f"{PROSE.name}-{split.value}-{seed}-{index:06d}"
    return ProseScene(name, split, tuple(objects), tint, setting)  # type: ignore[arg-type]


def _size_class(kind: str) -> str:
    return "large" if kind in LARGE else "small" if kind in SMALL else "medium"


def _place_group(kind: str, free: np.ndarray, most: int, rng: np.random.Generator) -> list[PlacedObject]:
    """Place one to three objects of a kind in free cells, and mark the cells as taken."""
    color = COLORS[rng.integers(len(COLORS))]
    count = min(1 + int(rng.choice(len(_COUNTS), p=_COUNTS)), most)
    placed = []
    for _ in range(count):
        size_class = _size_class(kind)
        blocks = _free_blocks(free, 2) if size_class == "large" and free.sum() >= _KEPT_FREE + 4 else []
        span = 2 if blocks else 1
        blocks = blocks or _free_blocks(free, 1)
        row, column = blocks[rng.integers(len(blocks))]
        free[row : row + span, column : column + span] = False
        low, high = _PIXELS[size_class if span == 2 or size_class == "small" else "medium"]
        size = int(rng.integers(low, high + 1))
        offset = (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
        placed.append(PlacedObject(kind, color, row * NUM_CELLS + column, offset, size))
    return placed


_KEPT_FREE = 5
"""Number of cells that large objects leave free."""


def _free_blocks(free: np.ndarray, span: int) -> list[tuple[int, int]]:
    """List the upper left cells of the free blocks of ``span`` x ``span`` cells."""
    places = range(NUM_CELLS - span + 1)
    return [
        (row, column) for row in places for column in places if free[row : row + span, column : column + span].all()
    ]


PROSE = World(
    name="prose",
    themes=(tuple(line[0] for line in SYNONYMS),),
    companions=COMPANIONS,
    colors=COLORS,
    num_objects=_NUM_OBJECTS,
    synonyms=SYNONYMS,
    describe=(
        "Describe the image.",
        "What is in the image?",
        "Describe this image in detail.",
        "What can you see in this picture?",
        "Please describe this picture.",
        "What is happening in this scene?",
        "Write a detailed description of the given image.",
        "Can you tell me what is shown here?",
        "Explain the visual content of the image.",
        "List what you can see in the image.",
    ),
    side=SIDE,
    max_new_tokens=160,
    draw=draw_scene,
)
"""A world whose captions resemble LLaVA's descriptions of photographs."""
