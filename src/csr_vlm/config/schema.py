"""Every option of a run: its default, its bounds and what it does.

This module imports no machine-learning library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from string import Formatter
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from csr_vlm.core.errors import nearest

RULE = (
    r"(?:(?P<evaluation>[a-z0-9_-]+)/)?(?P<metric>[A-Za-z_][A-Za-z0-9_]*)(?:\.(?P<field>low|high))?"
    r"\s*(?P<operator><=|>=|<|>)\s*(?P<bound>[-+]?(?:[0-9]*\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?)"
)
"""A condition on how a metric changed: ``recall < -0.01``, ``world/chair_s.low > 0``."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """The policy: any Hugging Face image-text-to-text model."""

    path: str = Field(description="Directory or hub id of the model to align.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Weights' type; auto takes bfloat16 on a GPU and float32 on a CPU."
    )
    device: str = Field(default="auto", description="Torch device; auto takes cuda where there is one.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that ships with the model.")
    adapter: str | None = Field(
        default=None,
        description="Directory of a LoRA on this model that the run starts from and goes on training: a user's own, or "
        "adapter/ of an earlier run.",
    )
    quantization: Literal["nf4"] | None = Field(
        default=None, description="Load the language model in 4 bits (QLoRA); needs a GPU and bitsandbytes."
    )


class FilterConfig(_Section):
    """Which candidate sentences are refused before they are scored."""

    min_chars: int = Field(default=1, ge=1, description="Fewest characters of a sentence.")
    max_newlines: int | None = Field(default=None, ge=0, description="Most line breaks in a sentence.")
    repeats: bool = Field(default=False, description="Refuse a sentence that the response already has.")
    non_latin: bool = Field(default=False, description="Refuse letters of a non-Latin script.")


class SearchConfig(_Section):
    """Sentence-level search (section 3.2.1)."""

    num_candidates: int = Field(default=4, ge=1, le=256, description="Sentences proposed for a partial response.")
    keep_top: int = Field(default=2, ge=1, description="Best partial responses kept a round.")
    keep_bottom: int = Field(default=2, ge=0, description="Worst partial responses kept a round.")
    steer_by: Literal["sentence", "response", "logprob"] = Field(
        default="response",
        description="What ranks partial responses: the new sentence's reward, the reward of the whole response so "
        "far, or the response's log-probability a token.",
    )
    decoding: Literal["sample", "diverse"] = Field(
        default="sample", description="Independent samples, or siblings that avoid each other's tokens."
    )
    greedy_first: bool = Field(
        default=False,
        description="The first candidate of a partial response is what greedy decoding would say next, so that its "
        "mistakes are always among what is compared (decoding: sample).",
    )
    temperature: float = Field(default=1.0, gt=0, le=10, description="Sampling temperature (decoding: sample).")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling mass (decoding: sample).")
    diversity_penalty: float = Field(
        default=3.0,
        ge=0,
        description="Subtracted from a token's log-probability for each earlier sibling that chose it at the same "
        "step (decoding: diverse).",
    )
    delimiters: str = Field(default=".", min_length=1, description="Characters that end a sentence.")
    max_sentences: int = Field(default=8, ge=1, description="Sentences a response may have.")
    max_sentence_tokens: int = Field(default=70, ge=2, description="Tokens a sentence may have.")
    max_response_chars: int | None = Field(default=None, ge=1, description="Characters a response may have.")
    filters: FilterConfig = FilterConfig()


class RewardConfig(_Section):
    """From what was measured about a sentence to R(s) and R(y)."""

    text_score: Literal["product", "geometric_mean", "mean_logprob"] = Field(
        default="geometric_mean",
        description="R_T: prod P (eq. 2), its geometric mean over tokens, or the mean log-probability.",
    )
    text_scale: float = Field(default=100.0, gt=0, description="Factor on R_T; R_I lives in 0..100.")
    image_score: Literal["cosine", "contrast"] = Field(
        default="cosine",
        description="R_I: max(100 cos, 0) (eq. 3), or 100 times what the cosine with the prompt's image is above the "
        "mean cosine with other images, so that what is not there lies about 0.",
    )
    fusion: Literal["weighted", "standardised", "sibling_rank"] = Field(
        default="weighted",
        description="Weighted sum (eq. 4); the same of scores standardised over the prompt's sentences; or of ranks "
        "among siblings.",
    )
    response: Literal["sum", "mean", "mean_plus_one"] = Field(
        default="mean", description="R(y): sum of R(s), its mean, or the sum over (number of sentences + 1)."
    )
    baseline: Literal["none", "mean", "midrange", "half_best"] = Field(
        default="none",
        description="Taken from every R(s), so that a sum grows with good sentences only: the mean, or the middle "
        "between best and worst, of the prompt's distinct sentences; or half of the best R_I, R_T against its mean "
        "(fusion: weighted, image_score: contrast).",
    )
    repeat_penalty: float = Field(
        default=0.0,
        ge=0,
        description="Taken from a sentence that says again what the response has said, in units of the spread of "
        "the prompt's sentence rewards.",
    )

    @model_validator(mode="after")
    def _half_of_a_contrast(self) -> RewardConfig:
        if self.baseline == "half_best" and (self.fusion, self.image_score) != ("weighted", "contrast"):
            raise ValueError("baseline half_best goes with fusion weighted and image_score contrast")
        return self


class QuestionsConfig(_Section):
    """Yes-or-no questions about claims of the policy's own, as further pairs."""

    pattern: str = Field(
        default="",
        description="Regular expression that finds a claim in a sentence; its groups fill the question. Empty asks "
        "nothing.",
    )
    question: str = Field(
        default="Is there {a} {0} in the image?",
        description="What is asked about a claim; {0} is the pattern's first group, {a} its article, a or an.",
    )
    yes: str = Field(default="Yes.", min_length=1, description="Answer where the claim suits the image.")
    no: str = Field(default="No.", min_length=1, description="Answer where it does not.")
    per_prompt: int = Field(default=4, ge=1, description="Most questions about one prompt's image.")
    sure: float = Field(
        default=3.0,
        description="Nats by which the right answers about an image are likelier than the wrong ones when the policy "
        "needs no questions about it.",
    )
    rehearsed: float = Field(
        default=0.25, ge=0.0, le=1.0, description="Share of the images about which it is asked all the same."
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _nothing_is_no_pattern(cls, pattern: object) -> object:
        return "" if pattern is None else pattern

    @model_validator(mode="after")
    def _fits_together(self) -> QuestionsConfig:
        try:
            groups = re.compile(self.pattern).groups
            if any(spec or conversion for _, _, spec, conversion in Formatter().parse(self.question)):
                raise ValueError("a question's {0} takes no format")
            self.ask(*["x"] * groups)
        except (re.error, IndexError, KeyError, ValueError) as error:
            if self.pattern:
                raise ValueError(f"pattern and question do not fit together: {error}") from None
        return self

    def ask(self, *groups: str) -> str:
        """Fill the question with what the pattern's groups found."""
        article = "an" if groups and groups[0][:1].lower() in tuple("aeiou") else "a"
        return self.question.format(*groups, a=article)


class PairsConfig(_Section):
    """What becomes a pair (section 3.2.2)."""

    between: Literal["responses", "siblings"] = Field(
        default="responses",
        description="Whole responses, or sentences that continue the same partial response, which both then share.",
    )
    selection: Literal["extremes", "random"] = Field(
        default="extremes", description="Highest against lower rewards, or any against any (a control)."
    )
    per_prompt: int = Field(default=1, ge=1, description="Most pairs of one prompt, spread evenly over the margins.")
    per_node: int = Field(
        default=3, ge=1, description="Most pairs of one partial response: its best sentence against so many others."
    )
    look_ahead: bool = Field(
        default=True,
        description="Between siblings: a sentence is worth its reward and the most that the tree earns after it.",
    )
    min_margin: float = Field(
        default=0.0,
        ge=0,
        description="Pairs whose rewards differ by no more are dropped; in units of the spread of the prompt's "
        "sentence rewards.",
    )
    require_complete: bool = Field(default=True, description="Only responses, or sentences, that ended by themselves.")
    questions: QuestionsConfig = QuestionsConfig()


class MethodConfig(_Section):
    """The method proper. The presets set what matters; the defaults here lie beneath them."""

    lambda_: float = Field(
        default=0.5, ge=0, le=1, alias="lambda", description="Weight of image relevance in R(s) (eq. 4)."
    )
    search: SearchConfig = SearchConfig()
    reward: RewardConfig = RewardConfig()
    pairs: PairsConfig = PairsConfig()


class DataConfig(_Section):
    """What is asked about which images, and pairs from outside."""

    prompts: str | tuple[str, ...] = Field(
        description="File, folder, glob or hub id of prompts, or a list of them; docs/data.md has the formats."
    )
    format: Literal["auto", "jsonl", "llava", "images", "imagefolder", "parquet", "huggingface", "webdataset"] = Field(
        default="auto", description="Format of every source of prompts; auto looks at each."
    )
    split: str = Field(default="train", min_length=1, description="Split of a Hugging Face data set.")
    image_root: str | None = Field(
        default=None,
        description="Folder that image paths are relative to; each source's own by default, and always for a folder "
        "of images.",
    )
    questions: tuple[str, ...] = Field(
        default=(), description="Asked about every image, in place of what the rows ask."
    )
    sample: int | None = Field(default=None, ge=1, description="Draw so many prompts at random; their order stays.")
    sample_seed: int | None = Field(default=None, ge=0, description="Of that draw; the run's seed by default.")
    limit: int | None = Field(default=None, ge=1, description="Use the first so many prompts.")
    pairs: str | None = Field(
        default=None, description="File with pairs from outside: iteration 1 trains on them instead of a search."
    )
    pairs_format: Literal["auto", "trl", "llava", "llamafactory", "swift", "rlaifv"] = Field(
        default="auto", description="Format of data.pairs; auto looks at each row."
    )
    on_bad_input: Literal["skip", "refuse"] = Field(
        default="skip", description="Skip and count a bad row, or refuse to start."
    )
    max_image_pixels: int = Field(
        default=50_000_000, ge=1, le=170_000_000, description="Larger images are refused undecoded."
    )

    @field_validator("prompts")
    @classmethod
    def _some_source(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("names no source")
        return value

    @field_validator("questions")
    @classmethod
    def _real_questions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(question.replace("<image>", "").strip() for question in value):
            raise ValueError("holds an empty question")
        return value

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of prompts, in their order."""
        return (self.prompts,) if isinstance(self.prompts, str) else self.prompts

    @property
    def all_sources(self) -> tuple[str, ...]:
        """The sources of prompts, and of pairs if there are any."""
        return (*self.sources, *([] if self.pairs is None else [self.pairs]))


class JudgeConfig(_Section):
    """How a policy that judges itself is asked (scorer.path: judge:policy)."""

    pattern: str = Field(default=".*", description="Regular expression; its groups fill the question's {0}, {1}, ...")
    question: str = Field(
        default="{sentence} Is that true of the image? Answer yes or no.",
        description="What is asked about a sentence in which the pattern is found.",
    )
    otherwise: str = Field(
        default="{sentence} Is that true of the image? Answer yes or no.",
        description="What is asked about any other sentence.",
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return pattern


class OneScorerConfig(_Section):
    """One measure of image-text relevance: a column of the ledger."""

    path: str = Field(
        description="Directory or hub id of a CLIP, SigLIP or SigLIP 2 model; open_clip:MODEL/PRETRAINED or "
        "open_clip:DIRECTORY; python:MODULE:CLASS for one of your own; judge:policy for the policy itself."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    name: str = Field(default="clip", pattern=r"^[A-Za-z0-9_-]+$", description="Name of its column in the ledger.")
    batch_size: int = Field(default=256, ge=1, description="Sentences or images encoded at once.")
    long_sentences: Literal["split", "cut"] = Field(
        default="split",
        description="Sentences longer than the text tower reads: the mean cosine of clauses that fit, or the "
        "sentence cut at the limit.",
    )
    vision: Literal["own", "policy"] = Field(
        default="own",
        description="Image encoder: the scorer's, or the policy's own vision tower under the scorer's projection "
        "and text tower; the two must have the same shape.",
    )
    judge: JudgeConfig = JudgeConfig()
    trust_import: bool = Field(default=False, description="Import and run the class that python:MODULE:CLASS names.")

    @model_validator(mode="after")
    def _asked_to_import(self) -> OneScorerConfig:
        if self.path.startswith("python:") and not self.trust_import:
            raise ValueError(f"{self.path} is code that would run here; set trust_import: true beside it to allow that")
        return self


class ScorerConfig(OneScorerConfig):
    """What measures image-text relevance, and which measure the reward uses."""

    extra: tuple[OneScorerConfig, ...] = Field(default=(), description="More scorers, each a column of its own.")
    others: int = Field(
        default=16,
        ge=0,
        description="Other images of the work item that every sentence is also scored against: what image_score "
        "contrast and the estimate of the scorer's quality need; 0 for none.",
    )
    use: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]+(\+[A-Za-z0-9_-]+)*$",
        description="Column that the reward uses, or several as A+B for the mean of their R_I; by default the "
        "scorer's own.",
    )

    @property
    def used(self) -> str:
        """Name what the reward uses, as :func:`csr_vlm.method.reward.image_score` reads it."""
        return self.use or self.name

    @model_validator(mode="after")
    def _distinct_names(self) -> ScorerConfig:
        names = [self.name, *(other.name for other in self.extra)]
        if len(set(names)) < len(names):
            raise ValueError(f"scorers need distinct names; these are {', '.join(names)}")
        return self


class GenerationConfig(_Section):
    """How the engine runs; no effect on what it generates beyond floating-point ties, but that vLLM draws otherwise."""

    engine: Literal["transformers", "vllm", "server"] = Field(
        default="transformers",
        description="What writes the sentences: transformers, vLLM in this process, or a running vLLM server; "
        "docs/engines.md.",
    )
    vllm: dict[str, Any] = Field(
        default_factory=dict, description="Passed to vllm.EngineArgs as it stands (engine: vllm)."
    )
    server: str | None = Field(
        default=None, pattern=r"^https?://\S+$", description="Address of a vLLM server (engine: server)."
    )
    max_rows: int = Field(default=512, ge=1, description="Sequences decoded at once.")
    attention: Literal["auto", "shared", "plain"] = Field(
        default="auto",
        description="Store keys and values once for all candidates (shared) or copy them to each (plain); auto shares "
        "where a trial on the first prompt gives what plain gives.",
    )
    prompts_per_part: int = Field(default=64, ge=1, description="Prompts in one work item, one ledger part.")

    @model_validator(mode="after")
    def _engine_has_what_it_needs(self) -> GenerationConfig:
        if (self.engine == "server") != (self.server is not None):
            raise ValueError("engine server and the server's address go together: generation.server=http://HOST:8000")
        if self.vllm and self.engine != "vllm":
            raise ValueError("the block vllm has no effect without engine: vllm")
        return self


class LoraConfig(_Section):
    """The adapter that DPO trains."""

    r: int = Field(default=16, ge=1, description="Rank.")
    alpha: int = Field(default=32, ge=1, description="Scale is alpha / r.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | None = Field(
        default=None, description="Regex of module names; the language model's linear layers by default."
    )


class TrainingConfig(_Section):
    """DPO with LoRA (eq. 1 and 5), by TRL."""

    lora: LoraConfig = LoraConfig()
    projector_learning_rate: float | None = Field(
        default=None, gt=0, description="Train the image projector as well, at this rate."
    )
    reference: Literal["ledger", "model"] = Field(
        default="ledger",
        description="Reference log-probabilities: those recorded at generation, checked on a sample, or computed "
        "again.",
    )
    reference_tolerance: float = Field(
        default=0.05, gt=0, description="Largest difference in nats a response before the ledger's are refused."
    )
    packing: Literal["auto", "off"] = Field(
        default="auto",
        description="Run what the two sides of a pair share (picture, question, first tokens) once, where the model "
        "allows it; the results are the same.",
    )
    trl: dict[str, Any] = Field(default_factory=dict, description="Passed to trl.DPOConfig as it stands.")
    merge: bool = Field(default=False, description="Also write the final merged model.")


class WorldEvaluationConfig(_Section):
    """Evaluation on the embedded world's scenes, whose truth is known."""

    name: str = Field(default="harbour", description="Which world: harbour or market.")
    split: Literal["development", "test"] = Field(
        default="test", description="Scenes to choose settings on, or scenes to make claims on."
    )
    num_scenes: int = Field(default=1000, ge=1, description="Test scenes.")
    seed: int = Field(default=1, ge=0, description="Which test scenes.")


class EvaluationConfig(_Section):
    """What is measured for the base model and after every iteration."""

    heldout: int = Field(
        default=32,
        ge=0,
        description="Prompts kept out of training, the last ones and at most an eighth: what the policy answers to "
        "them shows its health without any truth.",
    )
    audit: Literal["stop", "warn", "off"] = Field(
        default="stop", description="What a bad sign of health does to the run: csr audit shows the signs."
    )
    world: WorldEvaluationConfig | None = Field(default=None, description="For policies trained on the world only.")
    stop_if: list[str] = Field(
        default_factory=list,
        description="Stop the run after an iteration whose change meets one of these, such as 'recall < -0.02', and "
        "keep the iteration before it. METRIC.low and METRIC.high are the ends of the change's interval.",
    )
    stop_against: Literal["base", "last"] = Field(
        default="base", description="What stop_if compares with: the base model or the iteration before."
    )

    @field_validator("stop_if")
    @classmethod
    def _rules(cls, rules: list[str]) -> list[str]:
        for rule in rules:
            if not re.fullmatch(RULE, rule.strip()):
                raise ValueError(f"{rule!r} is not a rule; write METRIC OPERATOR NUMBER, such as 'recall < -0.02'")
        return rules

    @model_validator(mode="after")
    def _rules_have_something_to_judge(self) -> EvaluationConfig:
        if self.stop_if and self.world is None and not self.heldout:
            raise ValueError("stop_if needs an evaluation; set evaluation.heldout or evaluation.world")
        return self


class RunConfig(_Section):
    """One complete run."""

    preset: str = Field(default="calibrated", description="Named block of settings that the rest overrides.")
    seed: int = Field(default=0, ge=0, description="Everything random follows from it.")
    iterations: int = Field(default=3, ge=1, description="T: how often the method repeats.")
    model: ModelConfig
    scorer: ScorerConfig
    data: DataConfig
    method: MethodConfig = MethodConfig()
    generation: GenerationConfig = GenerationConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, preset: str) -> str:
        if preset not in presets():
            raise ValueError(f"unknown preset {preset!r}; {nearest(preset, presets())}")
        return preset

    @model_validator(mode="after")
    def _vllm_can(self) -> RunConfig:
        """What vLLM cannot do is known before hours of work; what it may not, it says when it starts."""
        cannot = {
            "make siblings avoid each other (method.search.decoding=diverse)": self.method.search.decoding == "diverse",
            "quantise as training does (model.quantization)": self.model.quantization is not None,
            "take a projector with a LoRA (training.projector_learning_rate)": self.training.projector_learning_rate
            is not None,
        }
        asked = [what for what, is_asked in cannot.items() if is_asked]
        if asked and self.generation.engine != "transformers":
            raise ValueError(f"vLLM cannot {asked[0]}; leave that out, or set generation.engine=transformers")
        return self

    @model_validator(mode="after")
    def _external_has_pairs(self) -> RunConfig:
        if self.preset == "external" and self.data.pairs is None:
            raise ValueError("preset external trains on pairs from outside: set data.pairs")
        return self

    @model_validator(mode="after")
    def _contrasts_have_others(self) -> RunConfig:
        needed = {
            "method.reward.image_score=contrast": self.method.reward.image_score == "contrast",
            "method.pairs.questions": bool(self.method.pairs.questions.pattern),
        }
        lacking = [name for name, used in needed.items() if used and not self.scorer.others]
        if lacking:
            raise ValueError(f"scorer.others=0, but {' and '.join(lacking)} compares with other images")
        return self

    def dump(self) -> dict[str, Any]:
        """Return the resolved configuration as plain data that loads to an equal one."""
        return self.model_dump(mode="json", by_alias=True)


@cache
def presets() -> Mapping[str, Mapping[str, Any]]:
    """Map each preset's name to its block."""
    text = resources.files("csr_vlm.config").joinpath("presets.yaml").read_text(encoding="utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded
