"""Describe how well a scorer separates true from false claims: the profile file.

A profile holds means and standard deviations of contrasts, where

    contrast(picture, text) = cos(F_I(picture), F_T(text)) - mean over other pictures of the same cosine

It is what ``csr validate-scorer`` measures on labeled pictures and what ``benchmarks/profiles.py``
draws pictures, responses and cosines from. Every value is dimensionless; cosines lie in -1..1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from csr_vlm.config.yaml import read_yaml
from csr_vlm.core.errors import CsrError

Truth = Literal["grounded", "habit", "random"]
"""Of a claim: grounded in the picture; false and expected by the policy's habits; false for any other reason."""


Size = Literal["small", "medium", "large"]
Kind = Literal["detail", "relation", "background", "mood"]
_SIZES: dict[Size, float] = {"small": 1.0, "medium": 1.0, "large": 1.0}
_KINDS: dict[Kind, float] = {"detail": 0.55, "relation": 0.2, "background": 0.12, "mood": 0.13}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Normal(_Section):
    """Represent a normal distribution."""

    mean: float
    sd: float = Field(ge=0)


class ByTruth(_Section):
    """Hold one distribution for each truth of a claim."""

    grounded: Normal
    habit: Normal
    random: Normal

    def of(self, truth: Truth) -> Normal:
        """Return the distribution for a truth."""
        found: Normal = getattr(self, truth)
        return found


class SentenceContrasts(ByTruth):
    """Describe the contrasts of whole sentences; a sentence with a false claim counts as false."""

    lead: Normal
    """The opening summary."""
    mood: Normal
    """A sentence without a claim."""
    relation: Normal | None = None
    """A sentence that relates two things; as details by default."""
    background: Normal | None = None
    """A sentence about the background; as details by default."""


class JudgeProfile(_Section):
    """Represent one scorer."""

    sentence: SentenceContrasts
    claim: ByTruth
    """Contrasts of a claim alone, as "a photo of a fork"."""
    size: dict[Size, float] = Field(default_factory=_SIZES.copy)
    """Factor on the mean contrast of a true claim, by the size of the object."""
    baseline: float = 0.2
    """Mean cosine of a text and an unrelated picture."""
    spread: float = Field(default=0.015, ge=0)
    """Standard deviation of the cosine over unrelated pictures."""
    correlation: float = Field(default=0.5, ge=0, le=1)
    """Of the error of a sentence with the mean error of its claims."""


class AnswerProfile(_Section):
    """Represent the policy's own answers to "Is there a X in the image?"."""

    with_picture: ByTruth
    """log P(yes) - log P(no) with the picture, in nats."""
    without_picture: Normal = Normal(mean=0.0, sd=0.5)
    """The same with another picture in its place: the policy's prior."""


class PolicyProfile(_Section):
    """Represent how a policy writes."""

    style: Literal["caption", "list", "short_answer", "reasoning"] = "caption"
    num_sentences: tuple[int, int] = (4, 7)
    """Fewest and most sentences that the policy usually writes."""
    early_end: float = Field(default=0.15, ge=0, le=1)
    """Probability that a candidate ends before the usual number of sentences."""
    kinds: dict[Kind, float] = Field(default_factory=_KINDS.copy)
    """Relative frequency of the kinds of sentence after the first one."""
    num_claims: tuple[float, ...] = (0.6, 0.3, 0.1)
    """Relative frequency of sentences with 1, 2, 3... claims."""
    false_first: float = Field(default=0.1, ge=0, le=1)
    """Probability that a claim of the second sentence is false."""
    false_last: float = Field(default=0.35, ge=0, le=1)
    """The same of the last sentence; linear in between."""
    habit: float = Field(default=0.7, ge=0, le=1)
    """Share of false claims that the policy's habits suggest."""
    repeats: float = Field(default=0.05, ge=0, le=1)
    """Probability that a sentence says again, in other words, what the response has said."""
    logprob: ByTruth = ByTruth(
        grounded=Normal(mean=-0.9, sd=0.25), habit=Normal(mean=-0.85, sd=0.25), random=Normal(mean=-1.3, sd=0.3)
    )
    """Mean log-probability a token of a sentence, in nats, by its truth."""


class PictureProfile(_Section):
    """Represent the pictures."""

    num_objects: tuple[int, int] = (3, 8)
    num_habits: int = Field(default=3, ge=1)
    """Absent kinds of object that the policy's habits expect in a picture."""
    true_elsewhere: float = Field(default=0.1, ge=0, le=1)
    """Probability that a kind of object of one picture is in another picture as well."""


class Profile(_Section):
    """Represent everything that ``benchmarks/profiles.py`` draws from."""

    name: str
    description: str = ""
    source: str = ""
    """Where the numbers come from."""
    pictures: PictureProfile = PictureProfile()
    policy: PolicyProfile = PolicyProfile()
    judge: JudgeProfile
    second: JudgeProfile | None = None
    """Another scorer, whose errors are partly those of the first."""
    shared_error: float = Field(default=0.3, ge=0, le=1)
    """Correlation of the two scorers' errors."""
    answers: AnswerProfile | None = None


def read_profile(path: Path) -> Profile:
    """Read a profile from a YAML file.

    Raises:
        CsrError: The file cannot be read, or is not a profile.
    """
    content = read_yaml(path, "see benchmarks/profiles/ for the form")
    try:
        return Profile.model_validate({"name": path.stem, **content})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CsrError(f"{path} is not a profile: {where}: {first['msg']}", "see benchmarks/profiles/") from None
