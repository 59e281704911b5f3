"""Compute how long each stage of a run takes, from the work to do, the hardware and the assumptions of one case.

A decoding step takes as long as the slower of the host, which launches its operations, and the GPU, which reads the
weights and the keys and values of the rows or, with many rows, computes. Vision, prefill, questions, reference and
training are bound by arithmetic::

    search       steps * max(host, bytes read / bandwidth, operations / peak)
    prefill      prompts * (2 N T + 4 L d T^2 + 2 N_v T_v) / peak
    claims       the same for the picture and the questions about it
    training     trees * operations of a tree (training_cost) / peak
    reference    trees * the forward part of them / peak
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from csr_vlm.config.schema import RunConfig
from csr_vlm.core.batching import PROMPTS_PER_FULL_BEAM
from csr_vlm.generation.row_budget import CPU_ROWS, RowShape, row_budget
from csr_vlm.models.architecture import Architecture, scorer_shape
from csr_vlm.pipeline.assumptions import Case
from csr_vlm.pipeline.hardware import Hardware
from csr_vlm.pipeline.live_rows import LiveRows, SearchShape, simulate
from csr_vlm.pipeline.training_cost import TrainedModel, TreeShape

STAGES = (
    "checking", "prefill", "search", "scoring", "claims", "pairs", "reference", "training", "evaluation", "loading",
)  # fmt: skip
_SIMULATED_PROMPTS = 1024
"""Prompts that are simulated at most; more keep the rows no busier."""
_QUESTION_TOKENS = 20
"""Tokens of a claim question and its answers."""
_CLAIM_SENTENCES = 64
"""Texts that the scorer embeds for the claims of a prompt."""
_SCORER_TOKENS = 25
"""Tokens of a sentence in the scorer's text tower."""
_JUDGE_TOKENS = 45
"""Tokens of a sentence with the question whether it is true (scorer: judge:policy)."""
_HELDOUT_STEPS = 1.6
"""Steps that answering held-out prompts takes, in mean lengths of a response: the longest response decides."""
_CONTEXT_BYTES = 1e9
"""Bytes of a GPU that CUDA itself takes."""
_NF4_TRAFFIC = 4.5
"""Bytes moved to use a 4-bit weight in a step: read, written in 16 bits, and read again."""


@dataclass(frozen=True)
class StageCosts:
    """Compute the seconds of every stage over all iterations.

    Args:
        config: Settings of the run.
        architecture: The policy.
        hardware: Where it runs.
        case: Values of the assumptions.
        num_prompts: Prompts that are trained on, and held out.
        prompt_tokens: Mean number of tokens of a prompt with its picture.
        image_tokens: Those of the picture.
        longest_prompt: Tokens of the longest prompt, whose length the stored keys and values of all are padded to.
    """

    config: RunConfig
    architecture: Architecture
    hardware: Hardware
    case: Case
    num_prompts: int
    prompt_tokens: float
    image_tokens: float
    longest_prompt: float

    def seconds(self) -> dict[str, float]:
        """Return the seconds of every stage of :data:`STAGES`, in order."""
        iterations = self.config.iterations
        later = [self.step_seconds(self.rows.rows, has_adapter=True)] * (iterations - 1)
        steps = [self.step_seconds(self.rows.rows, has_adapter=self.config.model.adapter is not None), *later]
        searching = self.rows.steps * self.num_prompts * sum(steps) * self._share_of_items()
        return {
            "checking": self.checking(),
            "prefill": iterations * self.prefill(),
            "search": searching,
            "scoring": iterations * self.scoring(),
            "claims": iterations * self.claims(),
            "pairs": iterations * self.num_prompts * self.case.pairs_milliseconds / 1e3,
            "reference": iterations * self.reference(),
            "training": iterations * self.training(),
            "evaluation": (iterations + 1) * self.evaluation(),
            "loading": (1 + self._stages_that_load() * iterations) * self.loading(),
        }

    def tokens(self) -> dict[str, float]:
        """Return the tokens that go through the policy in one iteration, by stage."""
        return {
            "prefill": self.num_prompts * self.prompt_tokens,
            "search": self.num_prompts * self.rows.tokens,
            "claims": self.num_prompts * self._claim_tokens() if self.num_questions else 0,
            "reference": self.trees * self.case.reference_passes * self.tree.tokens / self.epochs,
            "training": self.trees * self.tree.tokens,
            "evaluation": self.num_heldout * self.response_tokens,
        }

    @property
    def num_questions(self) -> int:
        """Return the claim questions of a prompt."""
        questions = self.config.method.pairs.questions
        return questions.per_prompt

    @property
    def num_heldout(self) -> int:
        """Return the number of held-out prompts."""
        return min(self.config.evaluation.heldout, self.num_prompts // 8)

    @property
    def epochs(self) -> float:
        """Return the number of epochs of a training."""
        return float(self.config.training.trl.get("num_train_epochs", 3))

    @property
    def trees(self) -> float:
        """Return the trees of one training, all epochs together."""
        return self.num_prompts * self.case.with_pairs * self.epochs

    @property
    def weight_bytes(self) -> float:
        """Return the bytes of the policy's weights."""
        return self.architecture.weight_bytes(self.bytes_per_value, nf4=self.config.model.quantization is not None)

    @property
    def loaded_bytes(self) -> float:
        """Return the bytes of what the search loads: the policy, its adapter and the scorers, these in float32."""
        config = self.config
        lora = self.architecture.lora_parameters(config.training.lora.r)
        is_judge = config.scorer.path.startswith("judge:")
        scorer = 0 if is_judge else scorer_shape(config.scorer.path).parameters * (1 + len(config.scorer.extra))
        return self.weight_bytes + 4.0 * (lora + scorer)

    @cached_property
    def max_rows(self) -> int:
        """Return the most rows that decode at once: those of the settings, or those that the engine would choose."""
        rows, hardware = self.config.generation.max_rows, self.hardware
        if rows != "auto":
            return rows
        if hardware.is_cpu or not hardware.memory:
            return CPU_ROWS
        free = hardware.memory - _CONTEXT_BYTES - self.loaded_bytes
        shape = RowShape.longest(self.config.method.search)
        return row_budget(free, shape, self.longest_prompt, self.architecture, self.bytes_per_value)

    @cached_property
    def rows(self) -> LiveRows:
        """Return what a prompt's search decodes."""
        search = self.config.method.search
        candidates, beam = search.num_candidates, search.keep_top + search.keep_bottom
        sentences = self._capped(self.case.min_sentences, self.case.max_sentences, search.max_sentences)
        tokens = self._capped(self.case.min_tokens, self.case.max_tokens, search.max_sentence_tokens)
        rows = self.max_rows
        prompts = min(self.prompts_together, self.num_prompts, _SIMULATED_PROMPTS)
        # vLLM admits single candidates, whatever prompt they belong to.
        active = prompts if self.uses_vllm else max(self.prompts_per_beam * rows // (candidates * beam), 1)
        return simulate(SearchShape(candidates, beam, prompts, rows, active, sentences, tokens))

    @property
    def uses_vllm(self) -> bool:
        """Return whether vLLM generates, in the run's process or behind a server."""
        return self.config.generation.engine in ("vllm", "server")

    @property
    def prompts_per_beam(self) -> int:
        """Return the prompts in progress for each full beam that the rows have room for."""
        return 1 if self.hardware.is_cpu else PROMPTS_PER_FULL_BEAM

    @property
    def prompts_together(self) -> int:
        """Return the prompts after which the rows run empty: those of a process, or of one work item."""
        across = self.config.generation.across_items
        if across == "off" or (across == "auto" and self.hardware.is_cpu):
            return self.config.generation.prompts_per_part
        return max(math.ceil(self.num_prompts * self._share_of_items()), 1)

    @property
    def sentence_tokens(self) -> float:
        """Return the mean tokens of a sentence."""
        return self.rows.tokens / self.rows.sentences

    @property
    def response_tokens(self) -> float:
        """Return the mean tokens of a response."""
        sentences = self._capped(
            self.case.min_sentences, self.case.max_sentences, self.config.method.search.max_sentences
        )
        return sum(sentences) / 2 * self.sentence_tokens

    @cached_property
    def tree(self) -> TreeShape:
        """Return the tree of one prompt's pairs and questions."""
        pairs, response = self.config.method.pairs, round(self.response_tokens)
        is_sibling = pairs.between == "siblings"
        return TreeShape(
            prompt=round(self.prompt_tokens),
            path=response // 2 if is_sibling else 0,
            pairs=pairs.per_prompt,
            sentence=round(self.sentence_tokens) if is_sibling else response,
            questions=self.num_questions,
            question=_QUESTION_TOKENS,
        )

    def step_seconds(self, rows: float, *, has_adapter: bool) -> float:
        """Return the duration of one decoding step: the host's or the GPU's, whichever is longer."""
        host, gpu = self.host_step_seconds(rows, has_adapter=has_adapter), self.gpu_step_seconds(rows)
        return host + gpu if self.hardware.is_cpu else max(host, gpu)

    def host_step_seconds(self, rows: float, *, has_adapter: bool) -> float:
        """Return the processor time that launches one step and handles its rows."""
        case = self.case
        if self.uses_vllm:
            return case.vllm_step / 1e3 + rows * case.vllm_row_microseconds / 1e6
        # In float32 the adapter is merged into the weights.
        launches = case.adapter_launches if has_adapter and not self.hardware.is_cpu else case.step_launches
        return (self.architecture.layers * launches * case.launch_microseconds + rows * case.row_microseconds) / 1e6

    def gpu_step_seconds(self, rows: float) -> float:
        """Return the time of one step on the GPU: reading, or arithmetic if that is longer."""
        shape, is_nf4 = self.architecture, self.config.model.quantization is not None
        value = self.bytes_per_value
        weights = shape.layer_parameters * (_NF4_TRAFFIC if is_nf4 else value) + shape.head_parameters * value
        cached = self._tokens_read(rows)
        reading = (weights + cached * shape.cache_bytes(value)) / (self.hardware.bandwidth * self._bandwidth_share())
        operations = 2.0 * rows * (shape.layer_parameters + shape.head_parameters)
        return max(reading, operations / self._rate(self.case.prefill_share))

    def _tokens_read(self, rows: float) -> float:
        """Return the tokens whose keys and values a step reads, with responses half done on average."""
        path, own = self.response_tokens / 2, self.sentence_tokens / 2
        if self.uses_vllm:
            return rows * (self.prompt_tokens + path + own)  # vLLM stores a prompt once, but reads it for each row.
        groups = rows / self.config.method.search.num_candidates
        return self.rows.prompts * self.prompt_tokens + groups * path + rows * own

    @property
    def bytes_per_value(self) -> float:
        """Return the bytes of a weight or an activation that is not quantized."""
        if self.config.model.dtype == "auto":
            return 4.0 if self.hardware.is_cpu else 2.0
        return 4.0 if self.config.model.dtype == "float32" else 2.0

    def checking(self) -> float:
        """Return the seconds in which one process checks every prompt and puts it through the processor, in threads."""
        per_prompt = (self.case.check_milliseconds + self.case.picture_milliseconds) / 1e3
        return self.num_prompts * per_prompt / self.case.check_threads

    def prefill(self) -> float:
        """Return the seconds of one iteration's vision and prefill."""
        operations = self.num_prompts * (self._vision_operations() + self._forward_operations(self.prompt_tokens))
        pictures = self.num_prompts * self.case.picture_milliseconds / 1e3
        return (operations / self._rate(self.case.prefill_share) + pictures) * self._share_of_items()

    def scoring(self) -> float:
        """Return the seconds in which the scorers embed one iteration's pictures and sentences."""
        per_sentence = 2.0 * scorer_shape(self.config.scorer.path).text_parameters * _SCORER_TOKENS
        seconds = self.num_prompts * self._scorer_seconds(self.rows.sentences, per_sentence)
        return seconds * self._share_of_items()

    def claims(self) -> float:
        """Return the seconds of one iteration's claim questions."""
        if not self.num_questions:
            return 0.0
        operations = self._vision_operations() + self._forward_operations(self._claim_tokens())
        per_sentence = 2.0 * scorer_shape(self.config.scorer.path).text_parameters * _SCORER_TOKENS
        seconds = operations / self._rate(self.case.prefill_share) + self.case.picture_milliseconds / 1e3
        seconds += self._scorer_seconds(_CLAIM_SENTENCES, per_sentence)
        return self.num_prompts * seconds * self._share_of_items()

    def reference(self) -> float:
        """Return the seconds of one iteration's reference log-probabilities."""
        trees = self.trees / self.epochs * self.case.reference_passes
        operations = self._vision_operations() + self._forward_operations(self.tree.tokens)
        return trees * operations / self._rate(self.case.prefill_share) / self._training_speedup()

    def training(self) -> float:
        """Return the seconds of one iteration's training, whose pictures two workers process meanwhile."""
        lora = self.architecture.lora_parameters(self.config.training.lora.r)
        operations = self.trained.tree_operations(self.tree.tokens, self.tree.targets, lora)
        workers = 1 if self.hardware.is_cpu else 2
        pictures = self.trees * self.case.picture_milliseconds / 1e3 / workers / self.hardware.count
        computing = self.trees * operations / self._rate(self.case.training_share) / self._training_speedup()
        return max(computing, pictures)

    def evaluation(self) -> float:
        """Return the seconds in which one policy answers the held-out prompts, and the scenes of a world."""
        world = self.config.evaluation.world
        answers = self.num_heldout + (0 if world is None else world.num_scenes)
        rows = min(max(answers, 1), self.max_rows)
        steps = math.ceil(answers / rows) * _HELDOUT_STEPS * self.response_tokens
        operations = answers * (self._vision_operations() + self._forward_operations(self.prompt_tokens))
        reading = operations / self._rate(self.case.prefill_share) + answers * self.case.picture_milliseconds / 1e3
        return steps * self.step_seconds(rows, has_adapter=True) + reading

    def loading(self) -> float:
        """Return the seconds in which a stage starts and reads the weights."""
        read = self.architecture.parameters * (2.0 if not self.hardware.is_cpu else 4.0) / self.case.disk_rate
        is_small = self.architecture.parameters < 1e8
        return read + (1.0 if is_small else self.case.start_seconds)

    @property
    def trained(self) -> TrainedModel:
        """Return the dimensions that the costs of training follow from."""
        shape = self.architecture
        return TrainedModel(
            shape.layer_parameters, shape.parameters, shape.layers, shape.heads * shape.head_width, shape.vocabulary,
            shape.vision_parameters, round(self._vision_tokens()),
        )  # fmt: skip

    def _stages_that_load(self) -> int:
        return 3 + (1 if self.num_questions else 0)

    def _claim_tokens(self) -> float:
        return self.prompt_tokens + self.num_questions * _QUESTION_TOKENS

    def _scorer_seconds(self, num_sentences: float, per_sentence: float) -> float:
        """Return the seconds in which the scorers embed the picture and so many sentences of one prompt."""
        shape, rate = scorer_shape(self.config.scorer.path), self.hardware.float32_flops
        share = 1.0 if self.hardware.measured else self.case.scorer_share
        if self.config.scorer.path.startswith("judge:"):
            operations = num_sentences * self._forward_operations(_JUDGE_TOKENS) + self._vision_operations()
            return operations / self._rate(self.case.prefill_share)
        picture = 2.0 * shape.vision_parameters * shape.vision_tokens
        seconds = (picture + num_sentences * per_sentence) / (rate * share) + self.case.picture_milliseconds / 1e3
        return seconds * (1 + len(self.config.scorer.extra))

    def _forward_operations(self, tokens: float) -> float:
        shape = self.architecture
        attention = 4.0 * shape.layers * shape.heads * shape.head_width * tokens**2
        return 2.0 * shape.layer_parameters * tokens + attention

    def _vision_operations(self) -> float:
        return 2.0 * self.architecture.vision_parameters * self._vision_tokens()

    def _vision_tokens(self) -> float:
        """Return the patches of a picture, scaled to its tokens where their number varies."""
        shape = self.architecture
        is_fixed = shape.max_image_tokens == shape.image_tokens or not shape.image_tokens
        return shape.vision_tokens * (1.0 if is_fixed else self.image_tokens / shape.image_tokens)

    def _rate(self, share: float) -> float:
        """Return the operations per second that are reached of the peak."""
        if self.config.model.quantization is not None:
            share *= self.case.nf4_share
        return self.hardware.flops * (1.0 if self.hardware.measured and self.hardware.is_cpu else share)

    def _bandwidth_share(self) -> float:
        return 1.0 if self.hardware.measured else self.case.bandwidth_share

    def _share_of_items(self) -> float:
        """Return the share of all work items that the process with most of them does."""
        items = math.ceil(self.num_prompts / self.config.generation.prompts_per_part)
        return math.ceil(items / self.hardware.count) / items

    def _training_speedup(self) -> float:
        return 1.0 if self.hardware.count == 1 else self.hardware.count * self.case.gpus_in_training

    @staticmethod
    def _capped(lowest: float, highest: float, limit: int) -> tuple[int, int]:
        return min(round(lowest), limit), min(round(highest), limit)
