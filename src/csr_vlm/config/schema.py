"""Define every option of a run: its default, its bounds and its effect.

This module imports no machine-learning library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from string import Formatter
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from csr_vlm.core.errors import suggestion
from csr_vlm.core.formatting import article
from csr_vlm.core.seeds import EVALUATION_SEEDS, seed_problem

STOP_RULE = (
    r"(?P<name>\w[^<>=\n]{0,99}?)(?:\.(?P<field>low|high))?"
    r"\s*(?P<operator><=|>=|<|>)\s*(?P<bound>[-+]?(?:[0-9]*\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?)"
)
"""Condition on the change of a metric: ``recall < -0.01``, ``world/chair_s.low > 0``, ``Colors right < 0``."""


class _Section(BaseModel):
    """Reject unknown keys and non-finite numbers in a block of options."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Configure the policy: any Hugging Face image-text-to-text model."""

    path: str = Field(description="Directory or Hub ID of the model to align.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the weights; auto is bfloat16 on a GPU and float32 on a CPU."
    )
    device: str = Field(default="auto", description="Torch device; auto is cuda if available, else cpu.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that ships with the model.")
    adapter: str | None = Field(
        default=None,
        description="Directory of a LoRA adapter of this model to start from and continue training: your own, or "
        "adapter/ of an earlier run.",
    )
    quantization: Literal["nf4"] | None = Field(
        default=None, description="Quantize the language model to 4 bits (QLoRA); requires a GPU and bitsandbytes."
    )
    max_image_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of tokens of a picture, for model families in which large pictures have more; "
        "larger ones are scaled down by the processor, alike in generation, scoring and training.",
    )


class FilterConfig(_Section):
    """Configure which candidate sentences are rejected before they compete."""

    min_chars: int = Field(default=1, ge=1, description="Minimum number of characters of a sentence.")
    max_newlines: int | None = Field(default=None, ge=0, description="Maximum number of line breaks in a sentence.")
    loops: bool = Field(
        default=False,
        description="Reject a sentence in which a word occurs 6 times in a row, or a character 11 times.",
    )
    other_scripts: bool = Field(
        default=False, description="Reject Hangul, kana, Cyrillic letters, emoji, and repeated &nbsp;."
    )


DEFAULT_DELIMITERS = ".!?。！？\n"
"""Ends of sentences in Latin and full-width punctuation, and the line breaks between list items."""


class SearchConfig(_Section):
    """Configure the sentence-level search (section 3.2.1)."""

    num_candidates: int = Field(
        default=4, ge=1, le=256, description="Candidate sentences sampled for each partial response."
    )
    keep_top: int = Field(default=2, ge=1, description="Best partial responses kept in each round (top-k).")
    keep_bottom: int = Field(default=2, ge=0, description="Worst partial responses kept in each round (bottom-k).")
    keep_all_below: int = Field(
        default=0, ge=0, description="Keep every partial response while fewer than this many can go on."
    )
    steer_by: Literal["sentence", "response", "logprob", "sentence_logprobs"] = Field(
        default="response",
        description="Score that ranks partial responses: the reward of the new sentence, the reward of the response "
        "so far, the mean log-probability per token of the response, or the sum of that mean over its sentences.",
    )
    decoding: Literal["sample", "diverse"] = Field(
        default="sample", description="Independent samples, or diverse siblings that avoid each other's tokens."
    )
    greedy_first: bool = Field(
        default=False,
        description="Decode the first candidate of each partial response greedily, so that the mistakes of greedy "
        "decoding are always among the candidates (decoding: sample).",
    )
    temperature: float = Field(default=1.0, gt=0, le=10, description="Sampling temperature (decoding: sample).")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Probability mass of nucleus sampling (decoding: sample)."
    )
    diversity_penalty: float = Field(
        default=3.0,
        ge=0,
        description="Penalty subtracted from a token's log-probability for each earlier sibling that chose it at the "
        "same step (decoding: diverse).",
    )
    delimiters: str = Field(
        default=DEFAULT_DELIMITERS,
        min_length=1,
        description="Characters that end a sentence; with a line break among them, so does each line or list item.",
    )
    max_sentences: int = Field(default=8, ge=1, description="Maximum number of sentences of a response.")
    max_sentence_tokens: int = Field(default=70, ge=2, description="Maximum number of tokens of a sentence.")
    continue_cut: bool = Field(
        default=False,
        description="Go on after a sentence that max_sentence_tokens cut off, instead of ending the response there.",
    )
    max_response_chars: int | None = Field(
        default=None, ge=1, description="Maximum number of characters of a response."
    )
    filters: FilterConfig = FilterConfig()


class RewardConfig(_Section):
    """Configure how R(s) and R(y) are computed from the measurements of each sentence."""

    unit: Literal["sentence", "claim"] = Field(
        default="sentence",
        description="What R_I rates: the sentence as a whole (image_score), or each of its claims alone, in nats of "
        "evidence; docs/method.md has the formulas.",
    )
    false_cost: float = Field(
        default=2.0,
        ge=0,
        description="Cost of a claim with evidence against it, relative to the worth of one with as much evidence for "
        "it (unit: claim).",
    )
    max_evidence: float = Field(
        default=8.0, gt=0, description="Largest evidence for or against one claim that counts, in nats (unit: claim)."
    )
    consistency: float = Field(
        default=2.0,
        ge=0,
        description="Nats for a claim that the policy makes e times as often as its average claim about the image "
        "(unit: claim).",
    )
    text_score: Literal["product", "geometric_mean", "mean_logprob"] = Field(
        default="geometric_mean",
        description="R_T: product of the token probabilities (eq. 2), their geometric mean, or the mean "
        "log-probability per token.",
    )
    text_scale: float = Field(default=100.0, gt=0, description="Factor of R_T; R_I is in 0..100.")
    image_score: Literal["cosine", "contrast"] = Field(
        default="cosine",
        description="R_I: max(100 cos, 0) (eq. 3), or the contrast 100 (cos - mean cos with negative images), which is "
        "about 0 for what the image does not show.",
    )
    fusion: Literal["weighted", "sibling_rank"] = Field(
        default="weighted",
        description="Fusion of R_I and R_T: weighted sum (eq. 4), or weighted sum of their ranks among siblings.",
    )
    response: Literal["sum", "mean", "mean_plus_one"] = Field(
        default="mean", description="R(y): sum of R(s), mean of R(s), or sum divided by (number of sentences + 1)."
    )
    baseline: Literal["none", "half_best"] = Field(
        default="none",
        description="Value subtracted from every R(s), so that only good sentences increase a sum: nothing, or "
        "lambda max(R_I) / 2 + (1 - lambda) mean(R_T) over the prompt's sentences (fusion: weighted, image_score: "
        "contrast).",
    )
    repeat_penalty: float = Field(
        default=0.0,
        ge=0,
        description="Penalty for a sentence that repeats an earlier one of the response, in units of the spread of "
        "the prompt's sentence rewards; with unit: claim, for one whose claims an earlier sentence made, in nats.",
    )

    @model_validator(mode="after")
    def _check_baseline(self) -> RewardConfig:
        if self.baseline == "half_best" and (self.fusion, self.image_score) != ("weighted", "contrast"):
            raise ValueError("baseline half_best requires fusion weighted and image_score contrast")
        if self.unit == "claim" and (self.fusion, self.baseline) != ("weighted", "none"):
            raise ValueError("unit claim has a zero line of its own; it requires fusion weighted and baseline none")
        return self


def _check_template(text: str) -> None:
    """Raise ValueError unless a text has a place {0} for a claim and at most {a} beside it."""
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"{text!r} is not valid: {error}") from None
    if ("0", "", None) not in fields or set(fields) - {("0", "", None), ("a", "", None)}:
        raise ValueError(f"{text!r} is not valid: write {{0}} for the claim, and {{a}} for its article")


class ClaimsConfig(_Section):
    """Configure how the claims of a sentence are found."""

    lexicon: str = Field(
        default="en",
        min_length=1,
        description="Lexicon of the things that a sentence can claim: en, zh, or the path of a file of your own; "
        "docs/method.md describes its format.",
    )
    caption: str = Field(
        default="a photo of {a} {0}",
        description="Text that the scorer compares with images for a claim; {0} is the claim, {a} its article (a or "
        "an).",
    )

    @field_validator("caption")
    @classmethod
    def _check_caption(cls, caption: str) -> str:
        _check_template(caption)
        return caption

    def caption_of(self, words: str) -> str:
        """Return the caption of a claim, such as "red boat"."""
        return self.caption.format(words, a=article(words))


class QuestionsConfig(_Section):
    """Configure pairs of yes-or-no answers about claims that the policy makes."""

    per_prompt: int = Field(default=0, ge=0, description="Maximum number of questions per prompt; 0 for none.")
    wordings: tuple[str, ...] = Field(
        default=(
            "Is there {a} {0} in this picture?",
            "Can you see {a} {0} in this picture?",
            "Does this picture show {a} {0}?",
            "Is there {a} {0} here?",
        ),
        min_length=1,
        description="Questions about a claim, of which each claim gets one; {0} is the claim, {a} its article (a or "
        "an). Those that the policy does not answer by yes or no are left out.",
    )
    min_log_odds: float = Field(
        default=4.5, ge=0, description="Log odds, in nats, from which an answer is clear and the question is asked."
    )
    min_probability: float = Field(
        default=0.02,
        gt=0,
        lt=1,
        description="Probability that the policy must give one of the two answers, or the question is left out.",
    )
    yes: str = Field(default="Yes.", min_length=1, description="Answer if the image supports the claim.")
    no: str = Field(default="No.", min_length=1, description="Answer if the image contradicts the claim.")
    sure: float = Field(
        default=3.0,
        description="Minimum log P(right answer) - log P(wrong answer), in nats, if the policy is sure of an answer. "
        "Questions about an image are dropped if it is sure of all answers.",
    )
    rehearsed: float = Field(
        default=0.25, ge=0.0, le=1.0, description="Fraction of those images whose questions are kept anyway."
    )
    min_auc: float = Field(
        default=0.6,
        ge=0.0,
        le=1.0,
        description="AUC of log P(yes) - log P(no), between the questions with yes and with no as the right answer, "
        "below which no question is trained: the policy does not look at the image to answer.",
    )

    @field_validator("wordings")
    @classmethod
    def _check_wordings(cls, wordings: tuple[str, ...]) -> tuple[str, ...]:
        for wording in wordings:
            _check_template(wording)
        return wordings

    def ask(self, thing: str, number: int) -> str:
        """Return the question about a thing in one of the wordings."""
        return self.wordings[number].format(thing, a=article(thing))


class PairsConfig(_Section):
    """Configure preference pairs (section 3.2.2)."""

    between: Literal["responses", "siblings"] = Field(
        default="responses",
        description="Compare whole responses, or sibling sentences that continue the same partial response.",
    )
    selection: Literal["extremes", "random"] = Field(
        default="extremes", description="Prefer higher rewards, or choose at random (a negative control)."
    )
    per_prompt: int = Field(
        default=1, ge=1, description="Maximum number of pairs per prompt, spread evenly over the margins."
    )
    per_node: int = Field(
        default=3,
        ge=1,
        description="Maximum number of pairs per partial response: its best continuation against so many siblings "
        "(between: siblings).",
    )
    look_ahead: bool = Field(
        default=True,
        description="Add to a sentence's reward the highest reward that the tree reaches after it "
        "(between: siblings, unit: sentence).",
    )
    min_margin: float = Field(
        default=0.0,
        ge=0,
        description="Reward difference that a pair must exceed, in units of the spread of the prompt's sentence "
        "rewards; with reward.unit: claim, in nats, times lambda.",
    )
    false_below: float = Field(
        default=-2.0,
        le=0,
        description="Evidence for a sentence's most doubtful claim, in nats, at which it is judged false; other "
        "sentences are not rejected (reward.unit: claim).",
    )
    true_above: float = Field(
        default=3.0,
        ge=0,
        description="Evidence for a sentence's most doubtful claim, in nats, from which ending instead is rejected "
        "(reward.unit: claim).",
    )
    require_complete: bool = Field(
        default=True, description="Use only responses, or sentences, that were not cut off by a limit."
    )
    questions: QuestionsConfig = QuestionsConfig()


class MethodConfig(_Section):
    """Configure the method; the presets override these defaults."""

    lambda_: float = Field(
        default=0.5,
        ge=0,
        le=1,
        alias="lambda",
        description="Weight of R_I in R(s) (eq. 4). With unit: claim it matters in the search alone, unless it is 0.",
    )
    search: SearchConfig = SearchConfig()
    claims: ClaimsConfig = ClaimsConfig()
    reward: RewardConfig = RewardConfig()
    pairs: PairsConfig = PairsConfig()

    @property
    def uses_claims(self) -> bool:
        """Return whether claims are found and scored: for the reward, or to ask about them."""
        return self.reward.unit == "claim" or self.pairs.questions.per_prompt > 0

    @property
    def compares_claims(self) -> bool:
        """Return whether a pair compares the most doubtful claims of its sides instead of their rewards."""
        by_claim = (self.reward.unit, self.pairs.between, self.pairs.selection) == ("claim", "siblings", "extremes")
        return by_claim and self.lambda_ > 0


class DataConfig(_Section):
    """Configure prompts, images and optional external preference pairs."""

    prompts: str | tuple[str, ...] = Field(
        description="File, folder, glob or Hub ID of prompts, or a list of them; docs/data.md describes the formats."
    )
    format: Literal["auto", "jsonl", "llava", "images", "imagefolder", "parquet", "huggingface", "webdataset"] = Field(
        default="auto", description="Format of all sources of prompts; auto detects it for each."
    )
    split: str = Field(default="train", min_length=1, description="Split of a Hugging Face dataset.")
    image_root: str | None = Field(
        default=None,
        description="Folder that image paths are relative to; by default, and always for a folder of images, the "
        "folder of each source.",
    )
    follow_links: bool = Field(
        default=True,
        description="Follow symbolic links out of the folder of the images, such as a link to a shared data set.",
    )
    questions: tuple[str, ...] = Field(
        default=(), description="Questions to ask about every image, in place of those of the rows."
    )
    sample: int | None = Field(
        default=None, ge=1, description="Number of prompts to sample at random; they keep their order."
    )
    sample_seed: int | None = Field(
        default=None, ge=0, description="Random seed of that sample; the run's seed by default."
    )
    limit: int | None = Field(default=None, ge=1, description="Number of prompts to use, from the first on.")
    pairs: str | None = Field(
        default=None,
        description="File with external preference pairs; iteration 1 trains on them instead of searching.",
    )
    pairs_format: Literal["auto", "trl", "llava", "llamafactory", "swift", "rlaifv", "sentinel", "hadpo"] = Field(
        default="auto", description="Format of data.pairs; auto detects it for each row."
    )
    on_bad_input: Literal["skip", "refuse"] = Field(
        default="skip", description="Skip and count invalid rows, or refuse to start."
    )
    max_failed_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Largest share of the prompts that may fail in a search before the run stops; three always may.",
    )
    max_image_pixels: int = Field(
        default=50_000_000,
        ge=1,
        le=170_000_000,
        description="Maximum number of pixels; larger images are rejected without decoding them.",
    )

    @field_validator("prompts")
    @classmethod
    def _check_prompts(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("does not name a source")
        return value

    @field_validator("questions")
    @classmethod
    def _check_questions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(question.replace("<image>", "").strip() for question in value):
            raise ValueError("contains an empty question")
        return value

    @property
    def sources(self) -> tuple[str, ...]:
        """Return the sources of prompts, in their order."""
        return (self.prompts,) if isinstance(self.prompts, str) else self.prompts

    @property
    def all_sources(self) -> tuple[str, ...]:
        """Return the sources of prompts, then that of external pairs if there is one."""
        return (*self.sources, *([] if self.pairs is None else [self.pairs]))


class JudgeConfig(_Section):
    """Configure the questions of a policy that judges itself (scorer.path: judge:policy)."""

    pattern: str = Field(default=".*", description="Regular expression; its groups fill {0}, {1}, ... of the question.")
    question: str = Field(
        default="{sentence} Is that true of the image? Answer yes or no.",
        description="Question about a sentence that matches the pattern.",
    )
    otherwise: str = Field(
        default="{sentence} Is that true of the image? Answer yes or no.",
        description="Question about any other sentence.",
    )

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a valid regular expression: {error}") from None
        return pattern


class OneScorerConfig(_Section):
    """Configure one measure of image-text relevance, which is a column of the ledger."""

    path: str = Field(
        description="Directory or Hub ID of a CLIP, SigLIP or SigLIP 2 model; open_clip:MODEL/PRETRAINED or "
        "open_clip:DIRECTORY; python:MODULE:CLASS for your own class; judge:policy for the policy itself."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub model.")
    name: str = Field(
        default="clip", pattern=r"^[A-Za-z0-9_-]+$", description="Name of the scorer's column in the ledger."
    )
    batch_size: int = Field(default=256, ge=1, description="Number of sentences or images encoded at once.")
    long_sentences: Literal["split", "cut"] = Field(
        default="split",
        description="Treatment of sentences over the text tower's limit: split them into clauses and take the mean "
        "cosine, or cut them at the limit.",
    )
    vision: Literal["own", "policy"] = Field(
        default="own",
        description="Image encoder: the scorer's own, or the vision tower of the policy with the scorer's projection "
        "and text tower; the two towers must have the same shape.",
    )
    judge: JudgeConfig = JudgeConfig()
    trust_import: bool = Field(default=False, description="Import and run the code that python:MODULE:CLASS names.")

    @model_validator(mode="after")
    def _check_trust(self) -> OneScorerConfig:
        if self.path.startswith("python:") and not self.trust_import:
            raise ValueError(f"{self.path} would run code; set trust_import: true beside it to allow that")
        return self


class ScorerConfig(OneScorerConfig):
    """Configure what measures image-text relevance, and which measure the reward uses."""

    extra: tuple[OneScorerConfig, ...] = Field(default=(), description="Further scorers, each with its own column.")
    others: int = Field(
        default=16,
        ge=0,
        description="Number of negative images (of other prompts of the work item) that every sentence is also scored "
        "against. image_score: contrast and the estimate of the scorer's quality require them; 0 for none.",
    )
    use: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]+(\+[A-Za-z0-9_-]+)*$",
        description="Column that the reward uses, or several as A+B for the mean of their R_I; by default that of the "
        "first scorer.",
    )

    @property
    def used(self) -> str:
        """Return the columns that the reward uses, in the form of :func:`csr_vlm.method.reward.image_score`."""
        return self.use or self.name

    @model_validator(mode="after")
    def _check_names(self) -> ScorerConfig:
        names = [self.name, *(scorer.name for scorer in self.extra)]
        if len(set(names)) < len(names):
            raise ValueError(f"scorer names must be distinct, not {', '.join(names)}")
        return self


class GenerationConfig(_Section):
    """Configure the engine.

    Apart from floating-point ties, only the choice between transformers and vLLM changes what is generated: they
    sample differently.
    """

    engine: Literal["auto", "transformers", "vllm", "server"] = Field(
        default="auto",
        description="Engine that generates: transformers, vLLM in this process, or a running vLLM server "
        "(docs/engines.md); auto is vLLM if it is installed, there is one process with a GPU, and vLLM supports the "
        "model and the settings, else transformers.",
    )
    vllm: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of vllm.EngineArgs, passed unchanged (engine: vllm or auto)."
    )
    server: str | None = Field(
        default=None, pattern=r"^https?://\S+$", description="Address of a vLLM server (engine: server)."
    )
    max_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Maximum number of sequences decoded at once; auto: as many as the free memory of the GPU holds "
        "with responses of the greatest length, 512 on a CPU. Halved when memory runs out.",
    )
    attention: Literal["auto", "shared", "plain"] = Field(
        default="auto",
        description="Store keys and values once for all candidates (shared) or copy them for each (plain); auto uses "
        "shared if it gives the same result as plain on the first prompt.",
    )
    prompts_per_part: int = Field(
        default=64, ge=1, description="Number of prompts in a work item, which is one ledger part."
    )
    across_items: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Decode prompts of several work items at once, so that no row idles at the end of an item; auto: "
        "on GPUs and with vLLM. It changes no token beyond floating-point ties, no log-probability beyond rounding.",
    )

    @model_validator(mode="after")
    def _check_engine_settings(self) -> GenerationConfig:
        if (self.engine == "server") != (self.server is not None):
            raise ValueError(
                "engine server and the server's address must be set together: generation.server=http://HOST:8000"
            )
        if self.vllm and self.engine not in ("vllm", "auto"):
            raise ValueError("the block vllm has no effect unless engine is vllm or auto")
        return self


class LoraConfig(_Section):
    """Configure the adapter that DPO trains."""

    r: int = Field(default=16, ge=1, description="Rank.")
    alpha: int = Field(default=32, ge=1, description="Numerator of the scale alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout of the adapter's input.")
    target_modules: str | None = Field(
        default=None, description="Regex of module names; the language model's linear layers by default."
    )


class TrainingConfig(_Section):
    """Configure DPO with LoRA (eq. 1 and 5), trained by TRL."""

    lora: LoraConfig = LoraConfig()
    projector_learning_rate: float | None = Field(
        default=None, gt=0, description="Also train the image projector, at this learning rate."
    )
    reference: Literal["ledger", "model"] = Field(
        default="ledger",
        description="Source of the reference log-probabilities: the ledger (verified on a sample), or a forward pass "
        "of the reference model.",
    )
    reference_tolerance: float = Field(
        default=0.05,
        gt=0,
        description="Largest accepted difference between the two in float32, in nats per response; half precision adds "
        "its rounding errors.",
    )
    packing: Literal["auto", "off"] = Field(
        default="auto",
        description="Compute what the pairs about an image share (image, question, first sentences) once if the model "
        "supports it; the results are the same.",
    )
    max_tokens: int = Field(
        default=8192,
        ge=1,
        description="Tokens of one pass through the model. A step with more is divided into several passes, which "
        "changes memory and speed, not the result.",
    )
    checkpoint_minutes: float = Field(
        default=10.0, ge=0, description="Interval of the checkpoints that a killed training resumes from."
    )
    trl: dict[str, Any] = Field(default_factory=dict, description="Arguments of trl.DPOConfig, passed unchanged.")
    merge: bool = Field(default=False, description="Also write the final merged model.")


class WorldEvaluationConfig(_Section):
    """Configure the evaluation on scenes of the embedded world, whose ground truth is known."""

    name: str = Field(default="harbour", description="Name of the world: harbour, market or prose.")
    split: Literal["development", "test"] = Field(
        default="test", description="Scenes for choosing settings (development), or for reporting results (test)."
    )
    num_scenes: int = Field(default=1000, ge=1, description="Number of scenes.")
    seed: int = Field(
        default=1,
        ge=0,
        description="Random seed of the scenes: 0 to 9999 for test, 10000 to 19999 for development (default 10001).",
    )

    @model_validator(mode="before")
    @classmethod
    def _development_seed(cls, data: Any) -> Any:
        """Use a development seed by default where the split is development."""
        if isinstance(data, dict) and data.get("split") == "development" and "seed" not in data:
            return data | {"seed": EVALUATION_SEEDS["development"][1]}
        return data

    @model_validator(mode="after")
    def _seed_of_split(self) -> WorldEvaluationConfig:
        problem = seed_problem(self.split, self.seed)
        if problem is not None:
            raise ValueError(problem)
        return self


class EvaluationConfig(_Section):
    """Configure what is measured for the base model and after every iteration."""

    heldout: int = Field(
        default=32,
        ge=0,
        description="Number of prompts held out from training (the last ones, at most an eighth of all). The policy's "
        "responses to them are checked without labels.",
    )
    audit: Literal["stop", "warn", "off"] = Field(
        default="stop", description="What a failed quality check does to the run; csr audit shows the checks."
    )
    world: WorldEvaluationConfig | None = Field(
        default=None, description="Evaluation on the embedded world, only for policies trained on it."
    )
    stop_if: list[str] = Field(
        default_factory=list,
        description="Conditions on the change of a metric, such as 'recall < -0.02'. An iteration that meets one stops "
        "the run, and the iteration before it is kept. METRIC is a key or a name as tables print it ('Colors right'); "
        "METRIC.low and METRIC.high are the bounds of the confidence interval of the change.",
    )
    stop_against: Literal["base", "last"] = Field(
        default="base", description="Policy that stop_if compares with: the base model or the previous iteration."
    )

    @field_validator("stop_if")
    @classmethod
    def _check_rules(cls, rules: list[str]) -> list[str]:
        for rule in rules:
            if not re.fullmatch(STOP_RULE, rule.strip()):
                raise ValueError(
                    f"{rule!r} is not a valid rule; write METRIC OPERATOR NUMBER, such as 'recall < -0.02'"
                )
        return rules

    @model_validator(mode="after")
    def _check_rules_apply(self) -> EvaluationConfig:
        if self.stop_if and self.world is None and not self.heldout:
            raise ValueError("stop_if requires an evaluation; set evaluation.heldout or evaluation.world")
        return self


class TrackingConfig(_Section):
    """Configure experiment trackers for the whole loop; ``training.trl.report_to`` is for the loss of each training."""

    to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        default=(), description="Trackers that get one run for the whole loop, with the iteration as step."
    )
    project: str = Field(default="csr-vlm", min_length=1, description="Project, or experiment, of the run.")
    examples: int = Field(
        default=8, ge=0, description="Number of held-out pictures with responses before and after, in a table."
    )


class RunConfig(_Section):
    """Configure one complete run."""

    preset: str = Field(default="calibrated", description="Named block of settings that all other settings override.")
    seed: int = Field(default=0, ge=0, description="Random seed.")
    iterations: int = Field(default=3, ge=1, description="Number of iterations (T).")
    model: ModelConfig
    scorer: ScorerConfig
    data: DataConfig
    method: MethodConfig = MethodConfig()
    generation: GenerationConfig = GenerationConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("preset")
    @classmethod
    def _check_preset(cls, preset: str) -> str:
        if preset not in presets():
            raise ValueError(f"{preset!r} is not a valid preset; {suggestion(preset, presets())}")
        return preset

    @property
    def vllm_obstacle(self) -> str | None:
        """Return a setting that vLLM is known not to support; None if there is none."""
        unsupported = {
            "diverse decoding (method.search.decoding=diverse)": self.method.search.decoding == "diverse",
            "the quantization of training (model.quantization)": self.model.quantization is not None,
            "a projector besides the LoRA (training.projector_learning_rate)": self.training.projector_learning_rate
            is not None,
        }
        return next((setting for setting, is_requested in unsupported.items() if is_requested), None)

    @model_validator(mode="after")
    def _check_engine(self) -> RunConfig:
        """Reject settings that vLLM does not support, before hours of work."""
        if self.vllm_obstacle is not None and self.generation.engine in ("vllm", "server"):
            raise ValueError(
                f"vLLM does not support {self.vllm_obstacle}; remove that setting, or set "
                "generation.engine=transformers"
            )
        return self

    @model_validator(mode="after")
    def _check_external_pairs(self) -> RunConfig:
        if self.preset == "external" and self.data.pairs is None:
            raise ValueError("preset external trains on external pairs: set data.pairs")
        return self

    @model_validator(mode="after")
    def _check_negative_images(self) -> RunConfig:
        requirements = {
            "method.reward.image_score=contrast": self.method.reward.image_score == "contrast",
            "method.reward.unit=claim": self.method.reward.unit == "claim",
            "method.pairs.questions": self.method.pairs.questions.per_prompt > 0,
        }
        unmet = [setting for setting, is_used in requirements.items() if is_used and not self.scorer.others]
        if unmet:
            raise ValueError(f"scorer.others=0, but {' and '.join(unmet)} requires negative images")
        return self

    def with_engine(self, name: str) -> RunConfig:
        """Return the settings with another engine, and without the options of vLLM unless it is that."""
        options = self.generation.vllm if name == "vllm" else {}
        generation = self.generation.model_copy(update={"engine": name, "vllm": options})
        return self.model_copy(update={"generation": generation})

    def dump(self) -> dict[str, Any]:
        """Return the resolved configuration as plain data, which resolves to an equal configuration."""
        return self.model_dump(mode="json", by_alias=True)


@cache
def _preset_file() -> Mapping[str, Mapping[str, Any]]:
    loaded: dict[str, Any] = yaml.safe_load(_package_data("presets.yaml"))
    return loaded


@cache
def presets() -> Mapping[str, Mapping[str, Any]]:
    """Return each preset's block of settings, by name."""
    return {name: {key: block[key] for key in block if key != "dated"} for name, block in _preset_file().items()}


def preset_date(name: str) -> str:
    """Return the day of a preset's last change, as ``YYYY-MM-DD``."""
    return str(_preset_file()[name]["dated"])


@cache
def size_classes() -> tuple[Mapping[str, Any], ...]:
    """Return the classes of ``sizes.yaml``, each with its name, limit and settings."""
    loaded: dict[str, Any] = yaml.safe_load(_package_data("sizes.yaml"))
    return tuple(loaded["classes"])


def size_class(parameters: int | None) -> Mapping[str, Any]:
    """Return the class of a model with so many parameters; a model of unknown size is in the last class.

    Example:
        >>> [size_class(parameters)["name"] for parameters in (2_000_000, 500_000_000, 7_000_000_000, None)]
        ['small', 'medium', 'large', 'large']
    """
    classes = size_classes()
    limits = (one for one in classes[:-1] if parameters is not None and parameters < one["below"])
    return next(limits, classes[-1])


@cache
def presets_of_any_size() -> frozenset[str]:
    """Return the names of the presets that ``sizes.yaml`` does not change."""
    loaded: dict[str, Any] = yaml.safe_load(_package_data("sizes.yaml"))
    return frozenset(loaded["except"])


def _package_data(name: str) -> str:
    return resources.files("csr_vlm.config").joinpath(name).read_text(encoding="utf-8")
