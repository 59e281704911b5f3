"""Propose a recipe for a model, its pictures and a GPU, with the reason for every setting.

The values are those of the shipped recipes, chosen by the size of the model, its vision encoder and the
memory of the GPU. Nothing is downloaded but the model's configuration, and no weight is read.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from csr_vlm.config.load import merged, resolve
from csr_vlm.config.schema import ModelConfig, RunConfig, presets, size_class
from csr_vlm.core.errors import CsrError, suggestion
from csr_vlm.core.installing import install_command, is_installed
from csr_vlm.data.sources import detect_format
from csr_vlm.models.architecture import Architecture, local_directory, read_architecture
from csr_vlm.models.devices import resolve_device
from csr_vlm.models.load_errors import load_error
from csr_vlm.pipeline import assumptions
from csr_vlm.pipeline.hardware import GPUS, Hardware
from csr_vlm.pipeline.memory_costs import memory_bytes
from csr_vlm.pipeline.stage_costs import StageCosts

CLIP = "openai/clip-vit-large-patch14-336"
"""Scorer of the paper, which is the vision encoder of LLaVA-1.5."""
_CLIP_TOWERS = {(1024, 14, 336): CLIP, (1024, 14, 224): "openai/clip-vit-large-patch14"}
"""Checkpoint with text encoder by width, patch size and image size of a CLIP vision encoder."""
_MULTILINGUAL = "google/siglip2-so400m-patch14-384"
_DEFAULT_QUESTIONS = {"en": "Describe this image in detail.", "zh": "请详细描述这张图片。"}
_CLAIM_QUESTIONS = {"zh": {"wordings": ["图片中有{0}吗？", "能看到{0}吗？"], "yes": "有。", "no": "没有。"}}
"""Wording of ``method.pairs.questions`` in languages other than English, whose wording is the default."""

GPU_MEMORY = {
    "t4": 16, "v100": 32, "l4": 24, "a10": 24, "3090": 24, "5090": 32, "a40": 48, "l40": 48, "l40s": 48,
    "a6000": 48, "a100-40": 40, "a100": 80, "b200": 180, **{name: gpu.memory / 1e9 for name, gpu in GPUS.items()},
}  # fmt: skip
"""Memory of GPUs in GB, by name."""
_RATE_REASONS = {
    "small": "The preset's rate, measured on models of 2 to 5 million parameters.",
    "medium": "Between the rates for small and for large models; it has not been measured.",
    "large": "The usual LoRA learning rate for DPO at this size; it has not been tuned on this model.",
}
"""Where the learning rate of each class of ``sizes.yaml`` comes from."""
_ROWS_PER_PROMPT = 3
"""Rows of the budget for each prompt of a work item, so that few rows idle at its end."""
_TEXT_TOKENS = 45
"""Tokens of a chat template and a question."""
_MAX_TOKENS = (8192, 4096, 2048, 1024)
_USABLE = 0.95
"""Share of the memory that the costly case of a stage may fill."""
_QUANTIZED_ABOVE = 0.5
"""Share of the memory above which half-precision weights leave too little for search and training."""
_MANY_PROMPTS = 13_000
"""Number of prompts that the paper trains on; more are sampled."""
_NUM_GB = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb)?")
_WIDTH = 100


@dataclass(frozen=True)
class Wishes:
    """Hold what a user says about a run before it has a recipe."""

    model: ModelConfig
    prompts: str
    """Folder of images, or any source of ``data.prompts``."""
    num_prompts: int
    """0 if counting would require reading everything."""
    gpu_gb: float | None
    """Memory of the GPU; None for a CPU."""
    language: str = "en"
    """``en``, ``zh``, or the path of a lexicon."""
    questions: Sequence[str] = ()
    scorer: str | None = None
    engine: Literal["transformers", "vllm"] | None = None
    offline: bool = False
    """Take the size of the model from its name instead of its configuration."""


@dataclass(frozen=True)
class Setting:
    """Hold one setting of a recipe and the reason for its value."""

    key: str
    value: Any
    reason: str = ""


@dataclass(frozen=True)
class ModelFacts:
    """Hold what a recipe depends on in a model."""

    shape: Architecture
    model_type: str = ""
    """Empty if the configuration was not read."""
    vision: Mapping[str, Any] = field(default_factory=dict)
    """Configuration of its vision encoder."""

    @property
    def size(self) -> str:
        """Return the name of its class in ``sizes.yaml``."""
        return str(size_class(self.shape.parameters)["name"])


@dataclass(frozen=True)
class Proposal:
    """Hold the settings of a proposed recipe."""

    settings: Sequence[Setting]
    facts: ModelFacts
    notes: Sequence[str]
    """What the user has to know or do."""

    @property
    def config(self) -> RunConfig:
        """Return the resolved configuration."""
        return resolve(_nested(self.settings))


def gpu_memory(name: str) -> float | None:
    """Return the memory of a GPU in GB; None for ``cpu``.

    Args:
        name: ``auto`` for the GPU of this machine, ``cpu``, a name such as ``a100`` or ``rtx4090``, or a number of GB.

    Raises:
        CsrError: The name is not known.

    Example:
        >>> gpu_memory("RTX 4090"), gpu_memory("A100-40GB"), gpu_memory("24GB"), gpu_memory("cpu")
        (24.0, 40.0, 24.0, None)
    """
    plain = re.sub(r"^(nvidia|geforce|rtx)+-?", "", re.sub(r"[\s_]+", "-", name.strip().lower()).replace("rtx-", "rtx"))
    if plain in ("cpu", "none"):
        return None
    if plain == "auto":
        return _own_memory()
    if plain.removesuffix("gb") in GPU_MEMORY:
        return float(GPU_MEMORY[plain.removesuffix("gb")])
    base, _, size = plain.rpartition("-")
    if match := _NUM_GB.fullmatch(size if base in GPU_MEMORY else plain):
        return float(match[1])
    raise CsrError(
        f"{name!r} is not a known GPU", f"give its memory, such as 24gb, or cpu; {suggestion(plain, GPU_MEMORY)}"
    )


def hardware_of(memory_gb: float | None) -> Hardware | None:
    """Return a GPU with known rates by its memory, to estimate times for; None if there is none."""
    return next((gpu for gpu in GPUS.values() if memory_gb is not None and gpu.memory == memory_gb * 1e9), None)


def _own_memory() -> float | None:
    import torch

    device = resolve_device("auto")
    return None if device == "cpu" else torch.cuda.get_device_properties(device).total_memory / 1e9


def propose_recipe(wishes: Wishes) -> Proposal:
    """Choose the settings of a run.

    Raises:
        CsrError: The model does not exist or is not an image-text-to-text model, its size is not known, or
            it does not fit the GPU.
    """
    facts = read_facts(wishes.model, offline=wishes.offline)
    notes: list[str] = []
    settings = [
        Setting("preset", "calibrated", "The default method. docs/presets.md compares the presets."),
        Setting("seed", 0),
        Setting("iterations", 3, "As in the paper. Try one iteration on few pictures first, as above."),
        *_model(wishes, facts),
        *_scorer(wishes, facts),
        *_data(wishes),
        *_method(wishes),
    ]
    settings += _training(facts, settings, wishes)
    settings += _generation(wishes, facts, settings, notes)
    settings += _memory(wishes, facts, settings)
    if wishes.num_prompts and wishes.num_prompts < 50:
        notes.append(
            f"{wishes.num_prompts} prompts are enough to try the method, not to improve a model: use 1,000 or more"
        )
    if wishes.gpu_gb is None and facts.shape.parameters > 3e8:
        notes.append("a model of this size takes days on a CPU; name a GPU with --gpu")
    order = {key: index for index, key in enumerate(RunConfig.model_fields)}
    ordered = sorted(settings, key=lambda setting: order[setting.key.partition(".")[0]])
    return Proposal(ordered, facts, notes)


def read_facts(model: ModelConfig, *, offline: bool = False) -> ModelFacts:
    """Read a model's architecture, and the vision encoder from its configuration unless offline.

    Raises:
        CsrError: The configuration cannot be read, or the name has no size.
    """
    shape = read_architecture(model, offline=offline)
    if shape is None:
        raise CsrError(f"the size of {model.path} is not in its name", "leave out --offline")
    if offline and local_directory(model) is None:
        return ModelFacts(shape)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        ).to_dict()
    except (OSError, ValueError) as error:
        raise load_error("model", model.path, error) from None
    vision = config.get("vision_config")
    return ModelFacts(shape, config["model_type"], vision if isinstance(vision, dict) else {})


def _model(wishes: Wishes, facts: ModelFacts) -> Iterator[Setting]:
    for name, value in wishes.model.model_dump(exclude_defaults=True).items():
        yield Setting(f"model.{name}", value)
    if facts.shape.model_type.startswith("qwen") and wishes.model.max_image_tokens is None:
        yield Setting(
            "model.max_image_tokens", 1024, "Larger pictures are scaled down; 12 megapixels are 15,000 tokens."
        )
    if wishes.gpu_gb is None or wishes.model.quantization is not None:
        return
    if 2 * facts.shape.parameters / 1e9 > _QUANTIZED_ABOVE * wishes.gpu_gb:
        yield Setting(
            "model.quantization",
            "nf4",
            f"4 bits (pip install bitsandbytes): in half precision the weights alone take "
            f"{2 * facts.shape.parameters / 1e9:.0f} of {wishes.gpu_gb:.0f} GB.",
        )


def _scorer(wishes: Wishes, facts: ModelFacts) -> Iterator[Setting]:
    if wishes.scorer is not None:
        yield Setting("scorer.path", wishes.scorer, "Chosen by you; csr validate-scorer measures it on your pictures.")
        return
    if wishes.language != "en":
        yield Setting("scorer.path", _MULTILINGUAL, "Reads many languages; CLIP reads English only.")
        return
    vision = facts.vision
    own = _CLIP_TOWERS.get((vision.get("hidden_size", 0), vision.get("patch_size", 0), vision.get("image_size", 0)))
    if own is not None and vision.get("model_type") == "clip_vision_model":
        yield Setting("scorer.path", own, "The model's own vision encoder (section 3.2.1 of the paper).")
        return
    why = "the model's vision encoder has no text encoder" if vision else "the paper's scorer"
    yield Setting("scorer.path", CLIP, f"Image-text relevance from CLIP: {why}. docs/scorers.md lists others.")


def _data(wishes: Wishes) -> Iterator[Setting]:
    yield Setting("data.prompts", wishes.prompts, "A folder of images, or prompts in a format of docs/data.md.")
    questions = list(wishes.questions)
    if not questions and detect_format(wishes.prompts) == "images":
        questions = [_DEFAULT_QUESTIONS.get(wishes.language, _DEFAULT_QUESTIONS["en"])]
    if questions:
        yield Setting("data.questions", questions, "Asked about every picture; several questions make several prompts.")
    if wishes.num_prompts > _MANY_PROMPTS:
        yield Setting(
            "data.sample",
            _MANY_PROMPTS,
            f"Of {wishes.num_prompts:,} prompts; the paper uses {_MANY_PROMPTS:,}. The sample follows from the seed.",
        )


def _method(wishes: Wishes) -> Iterator[Setting]:
    if wishes.language != "en":
        yield Setting("method.claims.lexicon", wishes.language, "The things that a sentence can claim.")
    for name, value in _CLAIM_QUESTIONS.get(wishes.language, {}).items():
        yield Setting(f"method.pairs.questions.{name}", value)


def _training(facts: ModelFacts, settings: Sequence[Setting], wishes: Wishes) -> Iterator[Setting]:
    """Write out what ``sizes.yaml`` and the preset say for this size, and the rank that goes with it."""
    parameters = facts.shape.parameters
    trl = merged(presets()["calibrated"], size_class(parameters)["settings"])["training"]["trl"]
    rate = Setting("training.trl.learning_rate", trl["learning_rate"], _RATE_REASONS[facts.size])
    if facts.size == "small":
        yield rate
        return
    is_quantized = any(setting.key == "model.quantization" for setting in settings)
    rank = 16 if parameters < 1e9 else 64 if parameters < 6e9 or is_quantized else 128
    lora = {"r": rank, "alpha": 2 * rank, "dropout": 0.05}
    yield Setting("training.lora", lora, "Rank by size; alpha is twice it.")
    yield rate
    total = trl["per_device_train_batch_size"]
    batch = 2 if (wishes.gpu_gb or 0) >= 40 and parameters < 1e10 else 1
    steps = f"{batch} x {total // batch} = {total} prompts in one training step, {batch} at once."
    yield Setting("training.trl.per_device_train_batch_size", batch, steps)
    yield Setting("training.trl.gradient_accumulation_steps", total // batch)
    yield Setting("training.trl.num_train_epochs", trl["num_train_epochs"])


def _generation(wishes: Wishes, facts: ModelFacts, settings: Sequence[Setting], notes: list[str]) -> Iterator[Setting]:
    is_quantized = any(setting.key == "model.quantization" for setting in settings)
    has_vllm = is_installed("vllm")
    engine = wishes.engine
    if engine is None and has_vllm and wishes.gpu_gb is not None and not is_quantized:
        engine = "vllm"
    if engine == "transformers":
        yield Setting("generation.engine", engine)
    if engine == "vllm":
        yield Setting("generation.engine", engine, "Set auto to fall back to transformers.")
        yield Setting("generation.prompts_per_part", 512, "vLLM does its own batching; give it much at once.")
        if not has_vllm:
            notes.append(f"vLLM is not installed here: {install_command('vllm')}")


def _memory(wishes: Wishes, facts: ModelFacts, settings: Sequence[Setting]) -> Iterator[Setting]:
    """Choose work items that fill the rows of the memory, and the most tokens of a pass that fit it."""
    if wishes.gpu_gb is None:
        return
    usable = _USABLE * wishes.gpu_gb * 1e9
    plain = _nested(settings)

    def costs(**changes: Mapping[str, Any]) -> StageCosts:
        # On a GPU auto is bfloat16; the machine that writes the recipe may have none.
        half = {"model": {"dtype": "bfloat16"}} if wishes.model.dtype == "auto" else {}
        config = resolve(merged(merged(plain, changes), half))
        image = config.model.max_image_tokens or facts.shape.image_tokens
        gpu = Hardware("", 1.0, 1.0, 1.0, usable)
        *_, costly = assumptions.cases()
        prompt = image + _TEXT_TOKENS
        return StageCosts(config, facts.shape, gpu, costly, wishes.num_prompts or 1000, prompt, image, prompt)

    weights = facts.shape.weight_bytes(costs().bytes_per_value, nf4=costs().config.model.quantization is not None)
    if weights > usable:
        raise CsrError(
            f"{wishes.model.path} does not fit {wishes.gpu_gb:.0f} GB, even in 4 bits: its weights take "
            f"{weights / 1e9:.0f} GB",
            "use a smaller model or a larger GPU; docs/scaling.md shards a model over several GPUs",
        )
    if plain.get("generation", {}).get("engine") != "vllm" and facts.size != "small":
        rows = costs().max_rows
        part = max(rows // _ROWS_PER_PROMPT, 16)
        reason = f"Prompts in a work item, for about {rows} sequences at once in {wishes.gpu_gb:.0f} GB."
        yield Setting("generation.prompts_per_part", part, reason)
    budgets = (
        number for number in _MAX_TOKENS if memory_bytes(costs(training={"max_tokens": number}))["training"] <= usable
    )
    tokens = next(budgets, _MAX_TOKENS[-1])
    if tokens != _MAX_TOKENS[0]:
        yield Setting("training.max_tokens", tokens, "Memory of training; the result is the same.")


def _nested(settings: Sequence[Setting]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for setting in settings:
        *parents, name = setting.key.split(".")
        block = plain
        for parent in parents:
            block = block.setdefault(parent, {})
        block[name] = setting.value
    return plain


def render_recipe(proposal: Proposal, heading: Sequence[str]) -> str:
    """Write the settings as YAML, each below its reason.

    Args:
        proposal: Settings in the order of the schema.
        heading: Lines of the comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in heading]
    above: list[str] = []
    for setting in _grouped(proposal.settings):
        *parents, name = setting.key.split(".")
        common = next((i for i, (a, b) in enumerate(zip(above, parents, strict=False)) if a != b), None)
        start = min(len(above), len(parents)) if common is None else common
        lines += [f"{'  ' * depth}{parents[depth]}:" for depth in range(start, len(parents))]
        above, margin = parents, "  " * len(parents)
        lines += [f"{margin}# {line}" for line in textwrap.wrap(setting.reason, _WIDTH - len(margin))]
        # Dumped with its name, which may be a word of YAML such as yes.
        pair = yaml.safe_dump(
            {name: setting.value}, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10**6
        )
        lines.append(margin + pair.strip()[1:-1])
    return "\n".join(lines) + "\n"


def _grouped(settings: Sequence[Setting]) -> list[Setting]:
    """Order settings so that every block is written once: by the first appearance of each of its prefixes."""
    first: dict[str, int] = {}
    for index, setting in enumerate(settings):
        parts = setting.key.split(".")
        for end in range(1, len(parts) + 1):
            first.setdefault(".".join(parts[:end]), index)

    def place(setting: Setting) -> list[int]:
        parts = setting.key.split(".")
        return [first[".".join(parts[:end])] for end in range(1, len(parts) + 1)]

    return sorted(settings, key=place)
