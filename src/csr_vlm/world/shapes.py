"""Define the silhouettes of the worlds' objects."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageDraw

_SUPERSAMPLE = 4

RGB = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 96, 214),
    "yellow": (240, 196, 25),
    "purple": (140, 60, 190),
    "black": (35, 35, 40),
    "orange": (238, 122, 24),
    "pink": (240, 130, 185),
    "brown": (122, 74, 40),
}


@lru_cache(maxsize=4096)
def sprite(kind: str, color: str, side: int) -> Image.Image:
    """Draw a kind of object in a color: RGBA, ``side`` x ``side`` pixels, transparent background."""
    canvas = Image.new("RGBA", (side * _SUPERSAMPLE,) * 2, (*RGB[color], 0))
    pen = _Pen(ImageDraw.Draw(canvas), side * _SUPERSAMPLE / 100, RGB[color])
    (SHAPES.get(kind) or MORE_SHAPES[kind])(pen)
    return canvas.resize((side, side), Image.Resampling.BOX)


class _Pen:
    """Draw shapes in coordinates of 0..100, whatever the size of the sprite in pixels."""

    def __init__(self, draw: ImageDraw.ImageDraw, unit: float, ink: tuple[int, int, int]) -> None:
        self._draw = draw
        self._unit = unit
        self._ink = ink

    def _fill(self, erase: bool = False) -> tuple[int, int, int, int]:
        return (*self._ink, 0 if erase else 255)

    def polygon(self, *points: tuple[float, float]) -> None:
        self._draw.polygon([(x * self._unit, y * self._unit) for x, y in points], fill=self._fill())

    def box(self, left: float, top: float, right: float, bottom: float) -> None:
        self._draw.rectangle([v * self._unit for v in (left, top, right, bottom)], fill=self._fill())

    def oval(self, left: float, top: float, right: float, bottom: float, erase: bool = False) -> None:
        self._draw.ellipse([v * self._unit for v in (left, top, right, bottom)], fill=self._fill(erase))

    def hole(self, left: float, top: float, right: float, bottom: float) -> None:
        self._draw.rectangle([v * self._unit for v in (left, top, right, bottom)], fill=self._fill(erase=True))

    def line(self, width: float, *points: tuple[float, float], erase: bool = False) -> None:
        scaled = [(x * self._unit, y * self._unit) for x, y in points]
        self._draw.line(scaled, fill=self._fill(erase), width=round(width * self._unit), joint="curve")


def _boat(pen: _Pen) -> None:
    pen.polygon((4, 64), (96, 64), (78, 92), (22, 92))
    pen.box(46, 6, 53, 64)
    pen.polygon((56, 10), (90, 56), (56, 56))


def _fish(pen: _Pen) -> None:
    pen.oval(2, 26, 72, 76)
    pen.polygon((62, 51), (98, 22), (98, 80))
    pen.oval(16, 40, 27, 51, erase=True)


def _lighthouse(pen: _Pen) -> None:
    pen.polygon((36, 30), (64, 30), (76, 98), (24, 98))
    pen.box(28, 18, 72, 28)
    pen.polygon((50, 0), (68, 16), (32, 16))
    pen.hole(30, 50, 70, 57)
    pen.hole(26, 72, 74, 79)


def _shell(pen: _Pen) -> None:
    pen.polygon((50, 96), (2, 44), (14, 20), (38, 8), (62, 8), (86, 20), (98, 44))
    for x in (26, 50, 74):
        pen.line(5, (x, 6), (50, 80), erase=True)


def _tree(pen: _Pen) -> None:
    pen.polygon((50, 0), (90, 40), (10, 40))
    pen.polygon((50, 22), (98, 74), (2, 74))
    pen.box(42, 74, 58, 100)


def _bird(pen: _Pen) -> None:
    pen.polygon((2, 44), (52, 40), (74, 70), (40, 84))
    pen.oval(30, 38, 80, 82)
    pen.oval(58, 16, 86, 46)
    pen.polygon((82, 24), (100, 32), (82, 40))
    pen.oval(70, 24, 77, 31, erase=True)
    pen.box(44, 78, 50, 98)
    pen.box(60, 78, 66, 98)


def _flower(pen: _Pen) -> None:
    for x, y in ((50, 18), (28, 34), (72, 34), (36, 58), (64, 58)):
        pen.oval(x - 17, y - 17, x + 17, y + 17)
    pen.oval(40, 30, 60, 50, erase=True)
    pen.box(46, 66, 54, 100)


def _butterfly(pen: _Pen) -> None:
    pen.polygon((50, 50), (4, 6), (4, 58))
    pen.polygon((50, 50), (96, 6), (96, 58))
    pen.polygon((50, 50), (14, 62), (28, 96))
    pen.polygon((50, 50), (86, 62), (72, 96))
    pen.box(46, 14, 54, 92)


def _lamp(pen: _Pen) -> None:
    pen.polygon((30, 4), (70, 4), (92, 50), (8, 50))
    pen.box(46, 50, 54, 88)
    pen.box(26, 86, 74, 98)


def _book(pen: _Pen) -> None:
    pen.polygon((2, 18), (46, 30), (46, 92), (2, 80))
    pen.polygon((98, 18), (54, 30), (54, 92), (98, 80))


def _teapot(pen: _Pen) -> None:
    pen.oval(20, 34, 78, 94)
    pen.polygon((2, 36), (14, 32), (34, 66), (24, 76))
    pen.oval(66, 42, 99, 80)
    pen.oval(76, 51, 91, 71, erase=True)
    pen.oval(42, 20, 56, 34)


def _cup(pen: _Pen) -> None:
    pen.polygon((10, 16), (68, 16), (62, 74), (16, 74))
    pen.oval(58, 22, 94, 62)
    pen.oval(68, 32, 84, 52, erase=True)
    pen.box(4, 84, 76, 94)


def _car(pen: _Pen) -> None:
    pen.polygon((20, 48), (32, 24), (68, 24), (82, 48))
    pen.box(2, 46, 98, 72)
    for x in (24, 76):
        pen.oval(x - 18, 56, x + 18, 92, erase=True)
        pen.oval(x - 13, 61, x + 13, 87)


def _sign(pen: _Pen) -> None:
    pen.polygon((34, 2), (66, 2), (88, 24), (88, 46), (66, 66), (34, 66), (12, 46), (12, 24))
    pen.hole(26, 29, 74, 39)
    pen.box(46, 66, 54, 100)


def _house(pen: _Pen) -> None:
    pen.polygon((50, 2), (100, 46), (0, 46))
    pen.box(12, 46, 88, 98)
    pen.hole(40, 62, 60, 98)


def _ball(pen: _Pen) -> None:
    pen.oval(8, 8, 92, 92)
    pen.hole(8, 45, 92, 54)
    pen.hole(46, 8, 54, 92)


def _star(pen: _Pen) -> None:
    points = ((50, 2), (62, 37), (98, 38), (69, 60), (80, 96), (50, 74), (20, 96), (31, 60), (2, 38), (38, 37))
    pen.polygon(*points)


def _moon(pen: _Pen) -> None:
    pen.oval(6, 4, 96, 96)
    pen.oval(36, -8, 118, 84, erase=True)


def _cloud(pen: _Pen) -> None:
    pen.oval(2, 44, 42, 84)
    pen.oval(22, 20, 72, 74)
    pen.oval(56, 38, 98, 84)
    pen.box(20, 60, 80, 84)


def _kite(pen: _Pen) -> None:
    pen.polygon((40, 0), (76, 34), (40, 74), (6, 34))
    pen.line(6, (40, 72), (58, 84), (46, 92), (70, 100))
    pen.line(5, (40, 2), (40, 72), erase=True)


def _apple(pen: _Pen) -> None:
    pen.oval(4, 26, 62, 96)
    pen.oval(38, 26, 96, 96)
    pen.polygon((46, 30), (54, 30), (66, 2), (58, 0))


def _carrot(pen: _Pen) -> None:
    pen.polygon((28, 28), (72, 28), (50, 100))
    for x in (24, 50, 76):
        pen.polygon((50, 28), (x - 8, 2), (x + 8, 2))


def _mushroom(pen: _Pen) -> None:
    pen.oval(2, 6, 98, 88)
    pen.hole(0, 50, 100, 100)
    pen.box(36, 50, 64, 98)


def _leaf(pen: _Pen) -> None:
    pen.polygon((4, 96), (10, 40), (46, 8), (98, 2), (90, 52), (58, 88), (18, 90))
    pen.line(6, (14, 88), (80, 20), erase=True)


def _key(pen: _Pen) -> None:
    pen.oval(2, 28, 46, 72)
    pen.oval(14, 40, 34, 60, erase=True)
    pen.box(42, 45, 98, 56)
    pen.box(70, 56, 78, 74)
    pen.box(88, 56, 96, 78)


def _bell(pen: _Pen) -> None:
    pen.oval(22, 8, 78, 66)
    pen.polygon((22, 38), (78, 38), (96, 80), (4, 80))
    pen.oval(40, 76, 60, 98)


def _hammer(pen: _Pen) -> None:
    pen.box(8, 6, 84, 36)
    pen.polygon((84, 6), (98, 36), (84, 36))
    pen.box(38, 36, 52, 100)


def _umbrella(pen: _Pen) -> None:
    pen.oval(2, 4, 98, 100)
    pen.hole(0, 52, 100, 102)
    pen.box(47, 50, 54, 90)
    pen.line(7, (50, 88), (58, 97), (68, 90))


def _hat(pen: _Pen) -> None:
    pen.box(26, 12, 74, 70)
    pen.box(2, 70, 98, 86)
    pen.hole(26, 54, 74, 60)


def _candle(pen: _Pen) -> None:
    pen.box(36, 40, 64, 98)
    pen.polygon((50, 0), (62, 22), (50, 34), (38, 22))


def _chair(pen: _Pen) -> None:
    pen.box(14, 2, 28, 98)
    pen.box(14, 50, 86, 64)
    pen.box(74, 50, 86, 98)


def _ladder(pen: _Pen) -> None:
    pen.box(16, 0, 28, 100)
    pen.box(72, 0, 84, 100)
    for y in (14, 38, 62, 86):
        pen.box(16, y - 4, 84, y + 4)


def _person(pen: _Pen) -> None:
    pen.oval(36, 0, 64, 28)
    pen.polygon((28, 32), (72, 32), (66, 66), (34, 66))
    pen.line(9, (32, 36), (14, 62))
    pen.line(9, (68, 36), (86, 62))
    pen.box(34, 64, 46, 100)
    pen.box(54, 64, 66, 100)


def _dog(pen: _Pen) -> None:
    pen.box(16, 44, 70, 72)
    pen.oval(60, 22, 98, 56)
    pen.polygon((62, 28), (56, 6), (76, 22))
    pen.line(8, (18, 48), (4, 22))
    for x in (18, 32, 52, 62):
        pen.box(x, 70, x + 8, 98)


def _cat(pen: _Pen) -> None:
    pen.oval(26, 42, 76, 100)
    pen.oval(28, 14, 72, 52)
    pen.polygon((30, 28), (28, 0), (48, 18))
    pen.polygon((70, 28), (72, 0), (52, 18))
    pen.line(8, (72, 90), (96, 80), (92, 52))
    pen.oval(38, 28, 44, 36, erase=True)
    pen.oval(56, 28, 62, 36, erase=True)


def _bench(pen: _Pen) -> None:
    pen.box(4, 26, 96, 38)
    pen.box(4, 44, 96, 50)
    pen.box(0, 58, 100, 70)
    pen.box(10, 26, 18, 98)
    pen.box(82, 26, 90, 98)


def _table(pen: _Pen) -> None:
    pen.polygon((16, 20), (84, 20), (100, 42), (0, 42))
    pen.box(8, 42, 18, 98)
    pen.box(82, 42, 92, 98)


def _clock(pen: _Pen) -> None:
    pen.oval(4, 4, 96, 96)
    pen.oval(18, 18, 82, 82, erase=True)
    pen.line(9, (50, 26), (50, 52), (70, 60))


SHAPES = {
    "boat": _boat,
    "fish": _fish,
    "lighthouse": _lighthouse,
    "shell": _shell,
    "tree": _tree,
    "bird": _bird,
    "flower": _flower,
    "butterfly": _butterfly,
    "lamp": _lamp,
    "book": _book,
    "teapot": _teapot,
    "cup": _cup,
    "car": _car,
    "sign": _sign,
    "house": _house,
    "ball": _ball,
    "star": _star,
    "moon": _moon,
    "cloud": _cloud,
    "kite": _kite,
    "apple": _apple,
    "carrot": _carrot,
    "mushroom": _mushroom,
    "leaf": _leaf,
    "key": _key,
    "bell": _bell,
    "hammer": _hammer,
    "umbrella": _umbrella,
    "hat": _hat,
    "candle": _candle,
    "chair": _chair,
    "ladder": _ladder,
}
MORE_SHAPES = {
    "person": _person,
    "dog": _dog,
    "cat": _cat,
    "bench": _bench,
    "table": _table,
    "clock": _clock,
}
"""Shapes that only the world prose has."""
