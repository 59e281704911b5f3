"""Draw pictures, a policy and scorers from a profile file; no model is involved.

A picture has objects, absent companions that habits suggest, and sizes. The policy proposes
sentences with claims about them in the ways captions are written; a scorer gives cosines
whose contrasts follow the profile. Everything is a pure function of (seed, picture, text,
path), so the product's own search, pairs, questions and audit run on it unchanged.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist

from csr_vlm.core.records import Candidate, Expansion, Finish, Prompt
from csr_vlm.evaluation.scorer_profile import JudgeProfile, Profile, Truth

_NORMAL = NormalDist()

NOUNS: dict[str, tuple[str, ...]] = {
    # kind: singular wordings; the first one names it
    "person": ("person", "man", "woman"),
    "child": ("child", "kid"),
    "bicycle": ("bicycle", "bike"),
    "car": ("car", "sedan"),
    "motorcycle": ("motorcycle", "motorbike"),
    "airplane": ("airplane", "plane"),
    "bus": ("bus",),
    "train": ("train",),
    "truck": ("truck", "pickup"),
    "boat": ("boat", "sailboat"),
    "traffic light": ("traffic light", "stoplight"),
    "fire hydrant": ("fire hydrant", "hydrant"),
    "bench": ("bench",),
    "bird": ("bird", "seagull"),
    "cat": ("cat", "kitten"),
    "dog": ("dog", "puppy"),
    "horse": ("horse", "pony"),
    "cow": ("cow",),
    "backpack": ("backpack",),
    "umbrella": ("umbrella", "parasol"),
    "handbag": ("handbag", "purse"),
    "suitcase": ("suitcase",),
    "kite": ("kite",),
    "skateboard": ("skateboard",),
    "surfboard": ("surfboard",),
    "bottle": ("bottle",),
    "cup": ("cup", "mug"),
    "fork": ("fork",),
    "spoon": ("spoon",),
    "bowl": ("bowl",),
    "banana": ("banana",),
    "apple": ("apple",),
    "sandwich": ("sandwich",),
    "carrot": ("carrot",),
    "pizza": ("pizza",),
    "cake": ("cake",),
    "chair": ("chair", "stool"),
    "couch": ("couch", "sofa"),
    "potted plant": ("potted plant", "houseplant"),
    "bed": ("bed",),
    "dining table": ("dining table",),
    "tv": ("television",),
    "laptop": ("laptop",),
    "keyboard": ("keyboard",),
    "cell phone": ("cell phone", "smartphone"),
    "microwave": ("microwave",),
    "oven": ("oven",),
    "sink": ("sink",),
    "refrigerator": ("refrigerator", "fridge"),
    "book": ("book",),
    "clock": ("clock",),
    "vase": ("vase",),
    "lamp": ("lamp",),
    "tree": ("tree",),
    "fence": ("fence",),
    "hat": ("hat",),
    "basket": ("basket",),
    "pillow": ("pillow", "cushion"),
    "candle": ("candle",),
    "ladder": ("ladder",),
}
_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children", "knife": "knives"}
SETTINGS = ("a busy street", "a quiet beach", "a cozy living room", "an open field", "a small kitchen", "a city park")
_SIZES = ("small", "medium", "large")

LEADS = (
    "The image depicts {setting} with {0}.",
    "The image features {0} in {setting}.",
    "In the image, {0} can be seen in {setting}.",
    "This photo captures a moment in {setting}, with {0} in view.",
    "The scene shows {0} in what appears to be {setting}.",
)
DETAILS = (
    "There is {0} in the middle of the scene.",
    "To the left, {0} can be seen.",
    "Nearby, there is {0}.",
    "{0} is visible on the right side of the image.",
    "In addition, {0} is placed towards the front.",
    "Among other things, the scene includes {0}.",
    "{0} adds interest to the picture.",
    "Closer to the viewer, there is {0}.",
    "{0} can also be noticed, standing out clearly.",
    "Towards the edge of the frame, {0} is partly visible.",
)
RELATIONS = (
    "{0} is positioned next to {1}.",
    "Behind {1}, there is {0}.",
    "{0} is located in front of {1}.",
    "Close to {1}, {0} can be observed.",
    "{0} and {1} are situated close to each other.",
)
BACKGROUNDS = (
    "In the background, there is {0}.",
    "{0} can be seen in the background.",
    "Further back, {0} is visible.",
    "The background includes {0}, giving the scene depth.",
)
MOODS = (
    "The overall atmosphere is calm and inviting.",
    "The scene conveys a sense of relaxation and joy.",
    "It seems to be a pleasant way to spend the day.",
    "The lighting creates a warm feeling, as a result of the late hour.",
    "Overall, it is a moment full of life and energy.",
    "Everything comes together in a harmonious setting.",
    "The mood is lively, making it an enjoyable sight.",
)
LIST_ITEMS = ("- {0}.", "* {0}.", "- **{0}**: clearly visible.", "1. {0}.")
ANSWERS = ("{0}.", "It is {0}.", "There is {0}.")
REASONS = (
    "This suggests that {0} plays a role here.",
    "Because {0} is present, someone probably uses this place often.",
    "The presence of {0} supports this idea.",
    "It follows that the place serves a purpose related to {0}.",
)


def plural(noun: str) -> str:
    """Return the plural of a noun of the list."""
    head, _, last = noun.rpartition(" ")
    word = _IRREGULAR.get(last) or (
        last + "es"
        if last.endswith(("s", "x", "ch", "sh"))
        else last[:-1] + "ies"
        if last.endswith("ty")
        else last + "s"
    )
    return f"{head} {word}".strip()


@lru_cache(maxsize=1)
def kind_of_wording() -> Mapping[str, str]:
    """Map each wording, singular or plural, to its kind."""
    return {form: kind for kind, words in NOUNS.items() for word in words for form in (word, plural(word))}


def uniform(*key: object) -> float:
    """Return a number in 0..1 that depends on the key alone."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**64


def normal(*key: object) -> float:
    """Return a standard normal number that depends on the key alone."""
    return _NORMAL.inv_cdf(uniform(*key))


def pick(options: Sequence[str], *key: object) -> str:
    """Choose one of several by the key."""
    return options[int(uniform(*key) * len(options))]


def weighted(weights: Sequence[float], *key: object) -> int:
    """Choose an index with probability in proportion to its weight."""
    at, total = uniform(*key) * sum(weights), 0.0
    for index, weight in enumerate(weights):
        total += weight
        if at < total:
            return index
    return len(weights) - 1


NUM_NEIGHBORS = 8


@dataclass(frozen=True)
class Picture:
    """Hold what is in a picture, what habits expect in it, and the sizes of its objects."""

    picture_id: str
    setting: str
    objects: tuple[str, ...]
    habits: tuple[str, ...]
    sizes: Mapping[str, str]

    def truth(self, kind: str) -> Truth:
        """Return the truth of the claim that the picture shows a kind, or a place."""
        if kind in self.objects or kind == place_of(self.setting):
            return "grounded"
        return "habit" if kind in self.habits else "random"


@dataclass(frozen=True)
class Sentence:
    """Hold a sentence that the policy wrote: its kind, text, and the kinds of object that it claims."""

    kind: str
    text: str
    claims: tuple[str, ...]

    def truth(self, picture: Picture) -> Truth:
        """Return ``grounded``, or the truth of a false claim, the habitual ones first."""
        found = {picture.truth(claim) for claim in self.claims}
        return "habit" if "habit" in found else "random" if "random" in found else "grounded"


@dataclass
class ProfileWorld:
    """Draw the pictures of a profile, and write and score sentences about them.

    Example:
        >>> world = ProfileWorld(profile, seed=0, num_pictures=100)
        >>> trees = search(world.prompts, world.propose, group.score, method, iteration=1, seed=0, scorer="clip")
    """

    profile: Profile
    seed: int
    num_pictures: int
    pictures: dict[str, Picture] = field(init=False)
    prompts: list[Prompt] = field(init=False)
    neighbors: list[Prompt] = field(init=False)
    """Prompts about pictures of similar scenes, ``NUM_NEIGHBORS`` for each picture."""
    sentences: dict[str, Sentence] = field(init=False, default_factory=dict)
    """Every sentence that was written, by its text."""
    owners: dict[str, set[str]] = field(init=False, default_factory=lambda: defaultdict(set))
    """Pictures that a sentence was written about, by its text."""
    _ids: dict[str, int] = field(init=False, default_factory=dict)
    _texts: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        names = [f"picture-{number:05d}" for number in range(self.num_pictures)]
        self.pictures = {name: self._picture(name) for name in names}
        similar = {
            f"{name}~{number}": self._neighbor(f"{name}~{number}", self.pictures[name])
            for name in names
            for number in range(NUM_NEIGHBORS)
        }
        self.pictures |= similar
        self.prompts, self.neighbors = (
            [Prompt(name, f"{name}.png", "Describe this image in detail.") for name in group]
            for group in (names, similar)
        )

    def _neighbor(self, name: str, picture: Picture) -> Picture:
        """Draw a picture of a similar scene: what one shows or habits expect there is in the other half the time."""
        expected = [*picture.objects, *picture.habits]
        there = [kind for kind in expected if uniform(self.seed, name, kind) < 0.5]
        absent = tuple(kind for kind in expected if kind not in there)
        sizes = {kind: pick(_SIZES, self.seed, name, kind, "size") for kind in there}
        return Picture(name, picture.setting, tuple(there), absent, sizes)

    def picture_of(self, prompt: Prompt) -> Picture:
        """Return the picture that a prompt asks about."""
        return self.pictures[prompt.image.removesuffix(".png")]

    def _picture(self, name: str) -> Picture:
        config, kinds = self.profile.pictures, list(NOUNS)
        low, high = config.num_objects
        number = low + int(uniform(self.seed, name, "number") * (high - low + 1))
        # A few kinds are common, so that a picture's claims are true elsewhere with the wanted probability.
        common = max(1, round(config.true_elsewhere * len(kinds)))
        ranked = sorted(
            kinds,
            key=lambda kind: uniform(self.seed, name, kind) ** (2.0 if kinds.index(kind) < common else 1.0),
        )
        return Picture(
            name,
            pick(SETTINGS, self.seed, name, "setting"),
            tuple(ranked[:number]),
            tuple(ranked[number : number + config.num_habits]),
            {kind: pick(_SIZES, self.seed, name, kind, "size") for kind in ranked[:number]},
        )

    # The policy -------------------------------------------------------------------------------------------------

    def propose(self, requests: Sequence[Expansion]) -> list[list[Candidate]]:
        """Continue partial responses by one sentence: the search's protocol."""
        return [[self._candidate(request, index) for index in range(request.num_candidates)] for request in requests]

    def _candidate(self, request: Expansion, index: int) -> Candidate:
        picture = self.picture_of(request.prompt)
        written = [self.sentences[self._texts[token]] for token in request.prefix_ids if token < len(self._texts)]
        key = (self.seed, *request.seed, index)
        policy = self.profile.policy
        fewest, most = policy.num_sentences
        length = fewest + int(uniform(self.seed, picture.picture_id, "length") * (most - fewest + 1))
        ends = len(written) >= length or (len(written) > 0 and uniform(*key, "end") < policy.early_end)
        if ends and uniform(*key, "goes on") > (0.25 if len(written) == length else 0.05):
            return Candidate((0,), (-0.3 + 0.1 * min(normal(*key, "end"), 2.0),), "", Finish.EOS)
        sentence = self._sentence(picture, written, key)
        self.sentences.setdefault(sentence.text, sentence)
        self.owners[sentence.text].add(picture.picture_id)
        truth = sentence.truth(picture) if sentence.claims else "grounded"
        law = policy.logprob.of(truth)
        logprob = min(law.mean + law.sd * normal(*key, "logprob"), -0.05)
        number = max(len(sentence.text.split()), 1)
        return Candidate(
            (self._token(sentence.text), *[_FILLER] * (number - 1)),
            (logprob,) * number,
            f" {sentence.text}",
            Finish.DELIMITER,
        )

    def _token(self, text: str) -> int:
        if text not in self._ids:
            self._ids[text] = len(self._texts)
            self._texts.append(text)
        return self._ids[text]

    def _sentence(self, picture: Picture, written: Sequence[Sentence], key: tuple[object, ...]) -> Sentence:
        policy = self.profile.policy
        kind = self._kind(written, key)
        if kind == "mood":
            return Sentence("mood", pick(MOODS, *key, "mood"), ())
        said = [claim for sentence in written for claim in sentence.claims]
        number = {"relation": 2, "lead": 1 + (uniform(*key, "two") < 0.5)}.get(kind) or 1 + weighted(
            policy.num_claims, *key, "number"
        )
        if said and uniform(*key, "repeat") < policy.repeats:
            claims = [pick(said, *key, "again")]
            kind = "detail" if kind == "relation" else kind
        else:
            claims = self._claims(picture, said, len(written), number if kind != "item" else 1, key)
        if kind == "relation" and len(claims) < 2:
            kind = "detail"
        templates = ANSWERS if (kind, policy.style) == ("lead", "reasoning") else _TEMPLATES[kind]
        template = pick(templates, *key, "template")
        phrases = [self._phrase(claim, (*key, claim)) for claim in claims]
        parts = phrases if kind == "relation" else [_joined(phrases)]
        text = template.format(*parts, setting=picture.setting)
        start = next(i for i, char in enumerate(text) if char.isalpha())
        return Sentence(kind, text[:start] + text[start].upper() + text[start + 1 :], tuple(claims))

    def _kind(self, written: Sequence[Sentence], key: tuple[object, ...]) -> str:
        style = self.profile.policy.style
        if not written and style != "short_answer":
            return "lead"
        if style != "caption":
            return {"list": "item", "short_answer": "answer", "reasoning": "reason"}[style]
        weights = self.profile.policy.kinds
        return list(weights)[weighted(list(weights.values()), *key, "kind")]

    def _claims(
        self, picture: Picture, said: Sequence[str], position: int, number: int, key: tuple[object, ...]
    ) -> list[str]:
        """Choose what a sentence claims: mostly what was not said yet, and false more often further on."""
        policy = self.profile.policy
        along = min(max(position - 1, 0) / max(policy.num_sentences[1] - 2, 1), 1.0)
        false = policy.false_first + along * (policy.false_last - policy.false_first) if position else 0.0
        claims: list[str] = []
        for slot in range(number):
            taken = {*said, *claims}
            pools: dict[str, list[str]] = {
                "grounded": [kind for kind in picture.objects if kind not in taken],
                "habit": [kind for kind in picture.habits if kind not in taken],
                "random": [kind for kind in NOUNS if picture.truth(kind) == "random" and kind not in taken],
            }
            wanted = "grounded"
            if uniform(*key, slot, "false") < false:
                wanted = "habit" if uniform(*key, slot, "habit") < policy.habit else "random"
            pool = pools[wanted] or pools["habit"] or pools["random"]
            claims.append(pick(pool, *key, slot, "claim"))
        return claims

    def _phrase(self, kind: str, key: tuple[object, ...]) -> str:
        noun = pick(NOUNS[kind], *key, "wording")
        form = uniform(*key, "form")
        if form < 0.25:
            return f"{pick(('two', 'several', 'a few', 'some'), *key, 'count')} {plural(noun)}"
        color = pick(("red ", "white ", "black ", "small ", "large ", "", "", "", ""), *key, "color")
        return f"{'an' if (color or noun)[0] in 'aeiou' else 'a'} {color}{noun}"

    # The scorers ------------------------------------------------------------------------------------------------

    def judge(self, name: str, second: bool = False) -> ProfileScorer:
        """Return one of the profile's scorers.

        Raises:
            ValueError: The profile has no second scorer.
        """
        profile = self.profile.second if second else self.profile.judge
        if profile is None:
            raise ValueError("the profile has no second scorer")
        return ProfileScorer(name, self, profile, second)

    def claims_in(self, text: str) -> tuple[str, ...]:
        """List the kinds that a text names: a sentence's own claims, or the nouns of any other text."""
        known = self.sentences.get(text)
        return known.claims if known is not None else nouns_in(text)

    def answer(self, prompt: Prompt, kind: str, *, with_picture: bool = True) -> float:
        """Return the policy's log P(yes) - log P(no) when it is asked about a kind, in nats."""
        answers = self.profile.answers
        if answers is None:
            raise ValueError("the profile has no answers")
        prior = answers.without_picture.mean + answers.without_picture.sd * normal(self.seed, kind, "prior")
        if not with_picture:
            return prior
        picture = self.picture_of(prompt)
        law = answers.with_picture.of(picture.truth(kind))
        return law.mean + law.sd * normal(self.seed, picture.picture_id, kind, "answer")


_FILLER = 1 << 30
_TEMPLATES = {
    "lead": LEADS,
    "detail": DETAILS,
    "relation": RELATIONS,
    "background": BACKGROUNDS,
    "item": LIST_ITEMS,
    "answer": ANSWERS,
    "reason": REASONS,
}


def _joined(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


@lru_cache(maxsize=1 << 14)
def nouns_in(text: str) -> tuple[str, ...]:
    """List the kinds that a text names, longest wordings first."""
    words = " ".join("".join(char if char.isalpha() else " " for char in text.lower()).split())
    padded, found = f" {words} ", []
    for wording in sorted(kind_of_wording(), key=len, reverse=True):
        if f" {wording} " in padded:
            padded = padded.replace(f" {wording} ", " . ")
            found.append(kind_of_wording()[wording])
    return tuple(dict.fromkeys(found))


def place_of(setting: str) -> str:
    """Return the noun of a setting.

    Example:
        >>> place_of("a busy street")
        'street'
    """
    return setting.split(maxsplit=2)[2]


def places_in(text: str) -> tuple[str, ...]:
    """List the places that a text names."""
    words = text.lower()
    return tuple(place for place in map(place_of, SETTINGS) if place in words)


@dataclass
class ProfileScorer:
    """Give cosines as a profile's scorer would: the product's ``Scorer`` protocol."""

    name: str
    world: ProfileWorld
    profile: JudgeProfile
    second: bool

    def score(self, items: Sequence[tuple[Prompt, str]]) -> list[dict[str, float]]:
        """Return ``{name: cosine}`` for each (prompt, text)."""
        return [{self.name: self._cosine(self.world.picture_of(prompt), text)} for prompt, text in items]

    def similarities(self, prompt: Prompt, others: Sequence[Prompt]) -> list[float]:
        """Return which pictures are neighbors of a prompt's: 1 or 0."""
        return [float(other.image.startswith(f"{prompt.image.removesuffix('.png')}~")) for other in others]

    def forget(self) -> None:
        """Keep nothing."""

    def _cosine(self, picture: Picture, text: str) -> float:
        value = self.profile.baseline + self._offset(text) + self._contrast(picture, text)
        return max(min(value, 1.0), -1.0)

    def _offset(self, text: str) -> float:
        """Shift every cosine of a text alike, as real texts do; a contrast does not see it."""
        return 0.02 * normal(self.world.seed, self.name, text, "offset")

    def _contrast(self, picture: Picture, text: str) -> float:
        sentence = self.world.sentences.get(text)
        if sentence is None:
            claims = nouns_in(text) or places_in(text)
            if not claims:
                return self._unrelated(picture, text)
            return sum(self._claim(picture, claim) for claim in claims) / len(claims)
        return self._sentence(picture, sentence)

    def _claim(self, picture: Picture, kind: str) -> float:
        truth = picture.truth(kind)
        if truth == "random":
            law = self.profile.claim.random
            return law.mean + max(law.sd, self.profile.spread) * self._error(picture, kind)
        law = self.profile.claim.of(truth)
        size = self.profile.size.get(picture.sizes.get(kind, "medium"), 1.0) if truth == "grounded" else 1.0  # type: ignore[call-overload]
        return law.mean * size + law.sd * self._error(picture, kind)

    def _error(self, picture: Picture, kind: str) -> float:
        own = normal(self.world.seed, "second" if self.second else "first", picture.picture_id, kind, "error")
        if not self.second:
            return own
        shared = self.world.profile.shared_error
        first = normal(self.world.seed, "first", picture.picture_id, kind, "error")
        return shared * first + (1 - shared**2) ** 0.5 * own

    def _sentence(self, picture: Picture, sentence: Sentence) -> float:
        laws, truth = self.profile.sentence, sentence.truth(picture)
        if picture.picture_id not in self.world.owners[sentence.text]:
            # About another picture: whatever it claims that is true here counts in part.
            true = sum(picture.truth(claim) == "grounded" for claim in sentence.claims)
            related = laws.grounded.mean * true / len(sentence.claims) if true else 0.0
            return related + self._unrelated(picture, sentence.text)
        if truth != "grounded":
            law = laws.of(truth)
        else:
            law = {
                "lead": laws.lead,
                "mood": laws.mood,
                "relation": laws.relation or laws.grounded,
                "background": laws.background or laws.grounded,
            }.get(sentence.kind, laws.grounded)
        own = normal(self.world.seed, self.name, picture.picture_id, sentence.text, "sentence")
        if not sentence.claims:
            return law.mean + law.sd * own
        share = self.profile.correlation
        common = sum(self._error(picture, claim) for claim in sentence.claims) / len(sentence.claims) ** 0.5
        return law.mean + law.sd * (share * common + (1 - share**2) ** 0.5 * own)

    def _unrelated(self, picture: Picture, text: str) -> float:
        return self.profile.spread * normal(self.world.seed, self.name, picture.picture_id, text, "unrelated")
