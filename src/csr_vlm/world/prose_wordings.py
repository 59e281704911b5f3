"""Define the words of ``prose``: wordings of every kind of sentence, nouns and their plurals.

In a wording ``{a}`` stands for things named for the first time, ``{the}`` for a thing named
before, ``{it}``, ``{its}`` for a pronoun; verbs agree with what is named first in the wording. A
capital letter in the braces begins the sentence.
"""

from __future__ import annotations

LEAD = (
    "The image shows {a} {place}.",
    "The image depicts a {scene} scene with {a}.",
    "The picture features {a} {place}.",
    "This is a picture of {a} {place}.",
    "In this image, {a} can be seen {place}.",
    "The photo captures {a_mood} {scene} scene that includes {a}.",
    "The scene takes place {place} and shows {a}.",
    "We can see {a} {place} in this picture.",
    "The main focus of the image is {a} {place}.",
    "{A} {is} the main subject of this picture taken {place}.",
    "The image presents a {scene} scene where {a} {is} clearly visible.",
    "In the picture, there {is} {a} {place}.",
)
DETAIL = (
    "There {is} also {a} {side}.",
    "{A} can be seen {side}.",
    "{Side}, there {is} {a}.",
    "The image also includes {a} {side}.",
    "Additionally, {a} {is} visible {side}.",
    "{A} {is} placed {side}.",
    "A closer look reveals {a} {side}.",
    "Apart from that, {a} can be found {side}.",
    "You can also spot {a} {side}.",
    "Another element of the scene is {a} {side}.",
    "{A} {stands} out {side}.",
    "The viewer can also notice {a} {side}.",
    "Furthermore, {a} {appears} {side}.",
)
TAIL = (
    ", with {a} next to {it}.",
    ", with {a} close by.",
    ", accompanied by {a}.",
    ", along with {a}.",
    ", together with {a}.",
    ", and {a} nearby.",
    ", next to {a}.",
    ", while {a} can be seen beside {it}.",
    ", with {a} not far away.",
    ", as well as {a}.",
)
"""Ways to add a companion to a detail; the comma comes first in all, so that going on is one decision."""
RELATION = (
    "The {the} {is} {relation} {a}.",
    "The {the} {is} positioned {relation} {a}.",
    "The {the} {appears} to be {relation} {a}.",
    "The {the} {shares} this part of the scene with {a}.",
    "Not far from the {the}, {a} can be noticed.",
    "Close to the {the}, we can see {a} as well.",
    "Next to the {the}, one can find {a}.",
    "Right beside the {the}, the picture shows {a}.",
    "Near the {the}, there is space for {a}.",
    "The {the} can be found {relation} {a}.",
    "The space around the {the} also holds {a}.",
)
ATTRIBUTE = (
    "{It} {looks} rather {size} compared to everything else.",
    "{It} {takes} up a {size} part of the picture.",
    "{Its} {size} size makes the viewer look twice.",
    "{It} {seems} {size} at first glance.",
    "{It} {appears} {size} from this angle.",
    "{It} {has} a {size} outline with clear edges.",
    "One can tell that {it} {is} quite {size}.",
    "{It} {looks} {size} and well shaped.",
    "{It} {is} {size} but easy to recognize.",
    "In size, {it} {appears} rather {size}.",
)
BACKGROUND = (
    "In the background, there {is} {a}.",
    "In the background, there {is} {a} to be seen.",
    "In the distance, there {is} {a} as well.",
    "In the background, {a} can be seen.",
    "In the distance, {a} {is} visible.",
    "In the background, {a} {completes} the scene.",
    "Further back, there {is} {a}.",
    "Behind all of this, there {is} {a}.",
    "Far behind, there {is} {a} that can be made out.",
    "In the back, there {is} also {a}.",
)
EMPTY_BACKGROUND = (
    "In the background, the {sky} is plain and bright.",
    "In the background, the {sky} and the {ground} meet in a straight line.",
    "In the distance, the {sky} looks smooth and even.",
    "In the background, nothing but the {sky} is visible.",
    "In the distance, only the {sky} can be seen.",
    "In the background, the {ground} is empty.",
    "Further back, the {sky} fills the rest of the picture.",
    "Behind all of this, the {sky} looks clean.",
    "Far behind, the {ground} ends at the {sky}.",
    "In the back, the {sky} is free of any pattern.",
)
MOOD = (
    "The overall atmosphere is {mood} and {other_mood}.",
    "Overall, the picture has {a_mood} and {other_mood} mood.",
    "The whole scene feels {mood}, as if time had slowed down.",
    "It is {a_mood} moment that invites the viewer to pause.",
    "The combination of colors gives the image {a_mood} feeling.",
    "Everything together creates {a_mood} impression.",
    "The image evokes {a_mood} feeling in the viewer.",
    "The general mood of the scene is {mood}.",
    "All in all, this has {a_mood} and {other_mood} feeling.",
    "The composition suggests {a_mood} and {other_mood} moment.",
    "The scene conveys {a_mood} atmosphere without any hurry.",
    "The mood seems {mood}, which suits the place well.",
)
LIST_OPENING = (
    "Here is a list of what the image shows:",
    "The image includes the following elements:",
    "These things can be seen {place}:",
    "The main elements of the picture are:",
)
ITEM = (
    "- {A} {side}.",
    "- {A} that {is} visible {side}.",
    "- {A} that can be found {side}.",
    "- {A}, which {appears} {size}, {side}.",
    "- {A} placed {side}.",
    "- {A}, rather {size}, {side}.",
    "- {A} of {size} size {side}.",
    "- {A} standing out {side}.",
    "- {A} located {side}.",
    "- {A} that one can notice {side}.",
)
REASON = (
    ("Why might someone take this picture?", "Someone might take this picture because of {a} {place}."),
    ("What makes this scene interesting?", "The scene is interesting because there {is} {a} {place}."),
    ("Why does this place look {mood}?", "It looks {mood} because {a} can be seen {place}."),
    ("What could happen next in this scene?", "Since there {is} {a} {place}, somebody may come closer soon."),
    ("Why would a visitor stop here?", "A visitor would stop here to look at {a} {place}."),
)
"""Questions that ask for a reason, and how their answers begin."""

LEFT, RIGHT, TOP, BOTTOM, MIDDLE = "left", "right", "top", "bottom", "middle"
SIDES = {
    LEFT: ("on the left side", "to the left", "on the left side of the picture"),
    RIGHT: ("on the right side", "to the right", "on the right side of the picture"),
    TOP: ("near the top", "in the upper part", "in the upper part of the picture"),
    BOTTOM: ("near the bottom", "in the lower part", "in the lower part of the picture"),
    MIDDLE: ("in the middle", "near the center", "in the middle of the picture"),
}
ANYWHERE = ("in the scene", "in the picture", "in this view")
"""In place of a side when several things are named at once."""
RELATIONS = {
    LEFT: ("to the left of",),
    RIGHT: ("to the right of",),
    TOP: ("above",),
    BOTTOM: ("below",),
    MIDDLE: ("next to", "close to", "beside", "near"),
}
SIZES = {"small": ("small", "tiny"), "medium": ("average",), "large": ("large", "big")}
OUTDOORS = frozenset({"beach", "street", "park", "field", "night"})
"""Settings with a sky and the ground; the others have a wall and a floor."""

PLURALS = {
    "fish": "fish", "leaf": "leaves", "person": "people", "man": "men", "woman": "women", "butterfly": "butterflies",
    "puppy": "puppies", "bench": "benches",
}  # fmt: skip
"""Plurals that are not the word and an s."""
NUMBERS = {2: ("two", "two", "a pair of"), 3: ("three", "three", "several")}
VERBS = {
    "is": ("is", "are"), "has": ("has", "have"), "stands": ("stands", "stand"), "appears": ("appears", "appear"),
    "shares": ("shares", "share"), "looks": ("looks", "look"), "takes": ("takes", "take"), "seems": ("seems", "seem"),
    "completes": ("completes", "complete"), "it": ("it", "them"), "its": ("its", "their"),
}  # fmt: skip
"""Form for one and form for several."""


def plural(word: str) -> str:
    """Return the plural of a noun; of two words, that of the last.

    Example:
        >>> plural("bench"), plural("street sign")
        ('benches', 'street signs')
    """
    before, _, last = word.rpartition(" ")
    return f"{before} {PLURALS.get(last, last + 's')}".strip()
