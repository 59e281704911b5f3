"""Write the training corpus of ``prose``: LLaVA-like descriptions and answers with a co-occurrence bias.

A description opens with a summary, names the groups in reading order, one to three per sentence,
and ends with background and mood. After a trigger it may add the trigger's companion, and the
background sentence may add what the setting usually has, whether or not the object is there. The
probability of adding an absent object is

    min(0.92, habit x strength x GROWTH[position of the sentence])

so that hallucination grows along a response.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from csr_vlm.core.formatting import article
from csr_vlm.world import prose_wordings as words
from csr_vlm.world.corpus import Turn, questions
from csr_vlm.world.prose_scenes import COLORS, COMPANIONS, LARGE, PROSE, SETTINGS, SMALL, SYNONYMS, Group, ProseScene
from csr_vlm.world.scenes import random_stream

GROWTH = (0.0, 0.5, 0.8, 1.05, 1.25, 1.4, 1.5)
"""Factor of the bias by position of the sentence; a lead adds nothing absent."""
_MOST = 0.92
_KEPT_BACK = 0.4
"""Probability that one of three or more groups is left to the sentence about the background."""
_LATE = 4
"""Position from which a sentence names all that is left, so that no response has more than seven."""
_NUM_SENTENCES = (4, 7)
_NUM_WORDS = (45, 90)
_TRIES = 30
"""Drafts after which a response may be shorter or longer than that."""
_WORDS_OF = {line[0]: line for line in SYNONYMS}
_SIDE_EDGE = 0.36
"""Share of the picture up to which the left and the upper side reach."""
_PREFERRED = 0.45
"""Probability of the wording that a setting prefers; the rest is uniform. Greedy responses so differ by setting."""
_LIST_PROMPT = PROSE.describe[-1]


@dataclass(frozen=True)
class ProseStyle:
    """Configure how a phase of the corpus is written.

    Args:
        mention: Probability that a description names a group that is present.
        habit: Factor of every strength of the bias; 0 for truthful descriptions.
        usual_color: Probability that an absent object gets its usual color rather than a random one.
        captions: Share of descriptions.
        reasons: Share of answers to why-questions; the rest are short answers.
    """

    mention: float = 0.97
    habit: float = 1.2
    usual_color: float = 0.85
    captions: float = 0.7
    reasons: float = 0.08


@dataclass(frozen=True)
class Sentence:
    """Hold a sentence of the corpus with its kind: lead, detail, relation, background, mood or item."""

    text: str
    kind: str


@dataclass(frozen=True)
class Thing:
    """Hold the content of a noun phrase: kind, color and number."""

    kind: str
    color: str
    count: int
    group: Group | None
    """The group of the scene that it describes; None for an absent object."""

    @classmethod
    def of(cls, group: Group) -> Thing:
        """Return the content of a truthful noun phrase about a group."""
        return cls(group.kind, group.color, group.count, group)

    @property
    def size_class(self) -> str:
        """Return small, medium or large; for an absent object the usual size of its kind."""
        if self.group is None:
            return "large" if self.kind in LARGE else "small" if self.kind in SMALL else "medium"
        return "large" if self.group.size > 30 else "small" if self.group.size < 19 else "medium"


@dataclass
class _Writer:
    """Write one response about a scene."""

    scene: ProseScene
    style: ProseStyle
    rng: np.random.Generator
    named: dict[str, Thing] = field(default_factory=dict)
    left: list[Group] = field(default_factory=list)
    """Groups not named yet, in reading order."""
    kept_back: Group | None = None
    """A present group reserved for the sentence about the background."""
    words_used: dict[str, str] = field(default_factory=dict)
    sentences: list[Sentence] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = list(self.scene.groups)
        main = max(groups, key=lambda group: (group.size > 30, group.size * group.count**0.5))
        rest = [group for group in groups if group is not main and self.rng.random() < self.style.mention]
        self.left = [main, *rest]
        if len(rest) > 1 and self.rng.random() < _KEPT_BACK:
            self.kept_back = self.left.pop()

    @property
    def position(self) -> int:
        """Return the number of sentences written so far."""
        return len(self.sentences)

    def pick(self, options: Sequence[str], *key: str) -> str:
        """Draw a wording; each setting (and ``key``) prefers one of the options."""
        if self.rng.random() < _PREFERRED:
            return options[zlib.crc32("/".join((self.scene.setting, *key, options[0])).encode()) % len(options)]
        return options[int(self.rng.integers(len(options)))]

    def next_groups(self, most: int) -> list[Thing]:
        """Remove the next groups from the list and return them."""
        taken = [Thing.of(group) for group in self.left[:most]]
        del self.left[:most]
        self.named |= {thing.kind: thing for thing in taken}
        return taken

    def habit(self, kind: str, color: str, strength: float) -> Thing | None:
        """Name a companion that is present, or by the bias one that is absent; return None for no companion."""
        if kind in self.named:
            return None
        group = self.scene.group_of(kind)
        if group is None:
            chance = min(_MOST, self.style.habit * strength * GROWTH[min(self.position, len(GROWTH) - 1)])
            if self.rng.random() >= chance:
                return None
            if self.rng.random() >= self.style.usual_color:
                color = COLORS[self.rng.integers(len(COLORS))]
            thing = Thing(kind, color, 1 if self.rng.random() < 0.85 else 2, None)
        else:
            thing = Thing.of(group)
            self.left = [other for other in self.left if other.kind != kind]
        self.named[kind] = thing
        return thing

    def companion(self, triggers: Sequence[Thing]) -> Thing | None:
        """Name the companion of the last thing that has one."""
        for thing in reversed(triggers):
            pair = COMPANIONS.get(thing.kind)
            if pair is not None:
                return self.habit(pair.companion, pair.color, pair.caption)
        return None

    def noun(self, thing: Thing, definite: bool = False) -> str:
        """Return a noun phrase: "a red boat", "two ships", "shells"; the noun alone if ``definite``."""
        if thing.kind not in self.words_used:
            self.words_used[thing.kind] = self.pick(_WORDS_OF[thing.kind], "noun")
        word = self.words_used[thing.kind]
        word = word if thing.count == 1 else words.plural(word)
        if definite:
            return word
        with_color = f"{thing.color} {word}" if self.rng.random() < 0.7 else word
        if thing.count == 1:
            return f"{article(with_color)} {with_color}"
        bare = self.rng.random() < 0.08
        return with_color if bare else f"{self.pick(words.NUMBERS[thing.count], 'number')} {with_color}"

    def nouns(self, things: Sequence[Thing]) -> str:
        """Join noun phrases: "a and b", "a, b and c"."""
        phrases = [self.noun(thing) for thing in things]
        return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))

    def side(self, things: Sequence[Thing]) -> str:
        """Return a phrase about where one present thing is; of others only that they are in the picture."""
        if len(things) > 1 or things[0].group is None:
            return self.pick(words.ANYWHERE, "side")
        return self.pick(words.SIDES[side_of(*things[0].group.center)], "side")

    def relation(self, thing: Thing, other: Thing) -> str:
        """Return where a thing is relative to another; of an absent one only that it is near."""
        where = words.MIDDLE
        if thing.group is not None and other.group is not None and self.rng.random() < 0.6:
            (x, y), (other_x, other_y) = thing.group.center, other.group.center
            where = side_of(0.5 + x - other_x, 0.5 + y - other_y)
        return self.pick(words.RELATIONS[where], "relation")

    def add(self, kind: str, wording: str, things: Sequence[Thing] = (), known: Thing | None = None) -> None:
        """Fill in a wording and append the sentence."""
        setting = SETTINGS[self.scene.setting]
        mood, other_mood, *_ = self.rng.permutation(np.array(setting.moods)).tolist()
        outdoors = self.scene.setting in words.OUTDOORS
        subject = [known] if known is not None and "{the}" in wording else things
        several = len(subject) > 1 or any(thing.count > 1 for thing in subject)
        values = {name: forms[several] for name, forms in words.VERBS.items()}
        values |= {
            "place": setting.place,
            "scene": setting.scene,
            "mood": mood,
            "other_mood": other_mood,
            "a_mood": f"{article(mood)} {mood}",
            "sky": "sky" if outdoors else "wall",
            "ground": "ground" if outdoors else "floor",
        }
        if kind == "attribute":
            values["It"] = "They" if several else "It"
            values["it"] = "they" if several else "it"
            values["Its"] = "Their" if several else "Its"
        if things:
            values |= {"a": self.nouns(things), "side": self.side(things)}
            values["size"] = self.pick(words.SIZES[things[0].size_class], "size")
            values["A"] = values["a"][0].upper() + values["a"][1:]
            values["Side"] = values["side"][0].upper() + values["side"][1:]
        if known is not None:
            values["the"] = self.noun(known, definite=True)
            if things:
                values["relation"] = self.relation(known, things[0])
        self.sentences.append(Sentence(wording.format(**values), "detail" if kind == "attribute" else kind))

    def extend(self, tail: str, thing: Thing, several: bool) -> None:
        """Append a companion to the last sentence."""
        last = self.sentences.pop()
        it = words.VERBS["it"][several]
        self.sentences.append(Sentence(last.text[:-1] + tail.format(a=self.noun(thing), it=it), last.kind))

    def lead(self) -> None:
        """Write the summary, which names one or two groups."""
        things = self.next_groups(2 if self.rng.random() < 0.45 else 1)
        self.add("lead", self.pick(words.LEAD, "lead"), things)

    def body(self) -> None:
        """Name the next one to three groups, in relation to one named before or by themselves."""
        late = self.position >= _LATE
        if not late and self.rng.random() < 0.28:
            known = list(self.named.values())[-1]
            pair = COMPANIONS.get(known.kind)
            new = self.habit(pair.companion, pair.color, pair.caption) if pair is not None else None
            things = [new] if new is not None else self.next_groups(1)
            self.add("relation", self.pick(words.RELATION, "relation", str(self.position)), things, known)
            return
        things = self.next_groups(3 if late else 1 + int(self.rng.choice(3, p=(0.5, 0.4, 0.1))))
        self.add("detail", self.pick(words.DETAIL, "detail", str(self.position)), things)
        new = self.companion(things)
        if new is not None:
            several = len(things) > 1 or things[0].count > 1
            self.extend(self.pick(words.TAIL, "tail", new.kind), new, several)
        elif len(things) == 1 and self.position + len(self.left) < 5 and self.rng.random() < 0.35:
            self.attribute(things[0])

    def attribute(self, thing: Thing) -> None:
        """Write a sentence about the size of a thing, with a pronoun."""
        self.add("attribute", self.pick(words.ATTRIBUTE, "attribute"), [thing])

    def background(self) -> None:
        """Write a sentence about the background."""
        setting = SETTINGS[self.scene.setting]
        color = COLORS[zlib.crc32(self.scene.setting.encode()) % len(COLORS)]
        if self.kept_back is not None and self.kept_back.kind not in self.named:
            thing: Thing | None = Thing.of(self.kept_back)
            self.named[self.kept_back.kind] = Thing.of(self.kept_back)
        else:
            thing = self.habit(setting.habit, color, setting.strength)
        if thing is None:
            self.add("background", self.pick(words.EMPTY_BACKGROUND, "background"))
        else:
            self.add("background", self.pick(words.BACKGROUND, "background"), [thing])

    def prose(self) -> list[Sentence]:
        """Write four to seven sentences."""
        self.lead()
        while self.left:
            self.body()
        ends = int(self.rng.random() < 0.85) + 1
        while self.position + ends < 4:
            known = list(self.named.values())
            if len(known) > 1 and self.sentences[-1].kind != "relation":
                first, second = known[-1], known[-2]
                wording = self.pick(words.RELATION[:3], "known")
                relation = self.relation(first, second)
                self.add("relation", wording.replace("{relation} {a}", f"{relation} the {{a}}"), [second], first)
            else:
                self.attribute(known[-1])
        self.background()
        if ends > 1:
            self.add("mood", self.pick(words.MOOD, "mood"))
        return self.sentences

    def listing(self) -> list[Sentence]:
        """Write a Markdown list with one group per item."""
        opening = self.pick(words.LIST_OPENING, "opening").format(place=SETTINGS[self.scene.setting].place)
        while self.left:
            things = self.next_groups(1)
            self.add("item", self.pick(words.ITEM, "item", str(self.position)), things)
            new = self.companion(things)
            if new is not None:
                self.extend(self.pick(words.TAIL, "tail", new.kind), new, things[0].count > 1)
        self.background()
        self.add("mood", self.pick(words.MOOD, "mood"))
        items = [Sentence("- " + s.text.removeprefix("- "), s.kind) for s in self.sentences]
        first = Sentence(f"{opening}\n{items[0].text}", "lead")
        return [first, *items[1:]]


def side_of(x: float, y: float) -> str:
    """Return the side of the picture where a point is; left and right take precedence.

    Example:
        >>> side_of(0.2, 0.1), side_of(0.5, 0.1), side_of(0.5, 0.5)
        ('left', 'top', 'middle')
    """
    if min(x, 1 - x) < _SIDE_EDGE:
        return words.LEFT if x < 0.5 else words.RIGHT
    if min(y, 1 - y) < _SIDE_EDGE:
        return words.TOP if y < 0.5 else words.BOTTOM
    return words.MIDDLE


def write(scene: ProseScene, style: ProseStyle, rng: np.random.Generator, listed: bool = False) -> list[Sentence]:
    """Return the sentences of a description, as prose or as a list: the first draft of the right length."""
    for _ in range(_TRIES):
        writer = _Writer(scene, style, rng)
        written = writer.listing() if listed else writer.prose()
        num_words = len(joined(written).split())
        if _NUM_SENTENCES[0] <= len(written) <= _NUM_SENTENCES[1] and _NUM_WORDS[0] <= num_words <= _NUM_WORDS[1]:
            break
    return written


def joined(sentences: Sequence[Sentence]) -> str:
    """Join the sentences of a response; each list item begins on a new line."""
    text = ""
    for sentence in sentences:
        text += ("\n" if sentence.text.startswith("- ") else " " if text else "") + sentence.text
    return text


def answer_why(scene: ProseScene, style: ProseStyle, rng: np.random.Generator) -> Turn:
    """Return a why-question with an answer of one to three sentences, which has the bias too."""
    writer = _Writer(scene, style, rng)
    question, opening = words.REASON[rng.integers(len(words.REASON))]
    mood = str(rng.choice(np.array(SETTINGS[scene.setting].moods)))
    things = writer.next_groups(1 + int(rng.random() < 0.5))
    writer.add("lead", opening.replace("{mood}", mood), things)
    if writer.left:
        writer.body()
    if rng.random() < 0.5:
        writer.add("mood", writer.pick(words.MOOD, "mood"))
    return Turn(question.format(mood=mood), joined(writer.sentences))


def short_questions(scene: ProseScene, rng: np.random.Generator, num_questions: int) -> list[Turn]:
    """Return questions about colors, numbers and the place with truthful short answers."""
    turns = []
    for _ in range(num_questions):
        group = scene.groups[rng.integers(len(scene.groups))]
        name = group.kind if group.count == 1 else words.plural(group.kind)
        draw = rng.random()
        if draw < 0.45:
            verb = words.VERBS["is"][group.count > 1]
            turns.append(Turn(f"What color {verb} the {name}?", f"{group.color.capitalize()}."))
        elif draw < 0.85:
            number = ("One", "Two", "Three")[group.count - 1]
            turns.append(Turn(f"How many {words.plural(group.kind)} are there?", f"{number}."))
        else:
            place = SETTINGS[scene.setting].place
            turns.append(Turn("Where was this picture taken?", f"{place[0].upper()}{place[1:]}."))
    return turns


def dialogue(scene: ProseScene, style: ProseStyle, epoch: int) -> list[Turn]:
    """Return one training example: a description, a reason, or six short questions."""
    rng = random_stream("prose dialogue", scene.scene_id, epoch)
    draw = rng.random()
    if draw < style.captions:
        question = PROSE.describe[rng.integers(len(PROSE.describe))]
        return [Turn(question, joined(write(scene, style, rng, listed=question == _LIST_PROMPT)))]
    if draw < style.captions + style.reasons:
        return [answer_why(scene, style, rng)]
    turns = questions(PROSE, scene, rng, 3) + short_questions(scene, rng, 3)
    return [turns[index] for index in rng.permutation(len(turns))]


@cache
def vocabulary_texts(num_scenes: int = 3000) -> tuple[str, ...]:
    """Return texts that hold every word of the corpus often enough to make it one token."""
    from csr_vlm.world.scenes import Split, make_scenes

    texts = []
    for scene in make_scenes(PROSE, Split.CORPUS, 1, num_scenes):
        assert isinstance(scene, ProseScene)
        for epoch in range(2):
            turns = dialogue(scene, ProseStyle(captions=0.6, reasons=0.2), epoch)
            texts += [f"USER: \n{turn.question} ASSISTANT: {turn.answer}" for turn in turns]
    for line in SYNONYMS:
        for word in line:
            for color in COLORS:
                texts.append(f" {article(color)} {color} {word}. Two {color} {words.plural(word)}, {word} A {word}")
                texts.append(f"Is there {article(word)} {word} in the image? a photo of {article(word)} {word}")
    return tuple(texts)
