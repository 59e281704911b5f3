"""Compute what training costs from the shape of a model and of its trees: operations, memory, hours.

For one tree of T tokens with G distinct response tokens, through a language model of N parameters in L
layers of width d, with a frozen base, a LoRA of A parameters and checkpointed activations::

    linear maps     6 N T      forward 2 N T, again in the backward pass 2 N T, gradients of the activations 2 N T
    LoRA            8 A T      the same, and 2 A T for the gradients of its weights
    attention       16 L d T^2 QK and PV are 4 L d T^2 forward; again 4; their gradients 8
    output layer    6 d V G    forward 2, gradients of the hidden states 2, recomputed logits 2
    image           2 N_v T_v  forward only: the vision encoder is frozen

The mask is dense, so attention is counted without causality.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TreeShape:
    """Hold the tokens of one prompt's tree."""

    prompt: int
    """Tokens of image and question."""
    path: int
    """Tokens of the sentences that siblings continue."""
    pairs: int
    sentence: int
    """Tokens in which each side of a pair differs."""
    questions: int = 0
    question: int = 20
    """Tokens of a claim question after the image, with both answers."""

    @property
    def targets(self) -> int:
        """Return the number of distinct response tokens."""
        return self.path + 2 * self.pairs * self.sentence + 4 * self.questions

    @property
    def tokens(self) -> int:
        """Return the number of distinct tokens."""
        return self.prompt + self.path + 2 * self.pairs * self.sentence + self.questions * self.question

    @property
    def separate_tokens(self) -> int:
        """Return the number of tokens of one row per response, each with half of the path on average."""
        siblings = 2 * self.pairs * (self.prompt + self.path // 2 + self.sentence)
        return siblings + 2 * self.questions * (self.prompt + self.question)


@dataclass(frozen=True)
class TrainedModel:
    """Hold the dimensions of a model that determine its training costs."""

    parameters: float
    """Parameters of all layers of the language model, without embeddings and output layer."""
    total_parameters: float
    layers: int
    width: int
    vocabulary: int
    vision_parameters: float = 0.0
    vision_tokens: int = 0

    def tree_operations(self, tokens: int, targets: int, lora_parameters: float) -> float:
        """Return the floating-point operations of one tree's forward and backward pass."""
        linear = (6.0 * self.parameters + 8.0 * lora_parameters) * tokens
        attention = 16.0 * self.layers * self.width * tokens**2
        output = 6.0 * self.width * self.vocabulary * targets
        return linear + attention + output + 2.0 * self.vision_parameters * self.vision_tokens

    def memory_bytes(
        self, max_tokens: int, lora_parameters: float, bytes_per_weight: float, bytes_per_value: float = 2.0
    ) -> float:
        """Return the memory of training, an approximation.

        It holds the weights; adapter, gradient and the two moments of Adam in float32; the inputs of all
        layers and all activations of one layer (about 34 values of the model's width a token).
        """
        activations = max_tokens * self.width * (self.layers + 34) * bytes_per_value
        return self.total_parameters * bytes_per_weight + 16 * lora_parameters + activations
