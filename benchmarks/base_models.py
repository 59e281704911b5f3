"""Train base models of other sizes and families for the embedded world, which only the evidence needs.

    python benchmarks/base_models.py larger --out build/evidence/models/larger
    python benchmarks/base_models.py idefics3 --out build/evidence/models/idefics3

Both keep the scorer that ships with the package. ``larger`` is the shipped LLaVA with a language
model three times as deep. ``idefics3`` is an ``Idefics3ForConditionalGeneration`` (the architecture
of SmolVLM) that starts from the shipped language model. Unlike LLaVA it has no class token and no
layer norm before the vision encoder, folds every 2 x 2 patches into one of 9 image tokens, and takes
the last layer of the vision encoder instead of the last but one.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPModel,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaForConditionalGeneration,
)

from csr_vlm.cli import console
from csr_vlm.world import base_models
from csr_vlm.world.build import (
    LEARN_TO_SEE,
    PICK_UP_HABITS,
    BuildPlan,
    Progress,
    pixels,
    train_policy,
    write_log,
)
from csr_vlm.world.demo import assets
from csr_vlm.world.scenes import HARBOUR, Scene, World

DEPTH = 3
"""Factor on the number of layers of the language model of ``larger``."""
PHASES = {
    # It starts as the same function as the shipped policy; only the new layers have to be fitted.
    "larger": (replace(LEARN_TO_SEE, steps=100, lr=5e-4), replace(PICK_UP_HABITS, steps=200)),
    # It has a trained language model, but a new connector.
    "idefics3": (replace(LEARN_TO_SEE, steps=1500), PICK_UP_HABITS),
}
_FOLD = 2
_MARKERS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def build_from_shipped(
    world: World, directory: Path, plan: BuildPlan, progress: Progress | None = None, depth: int = 1
) -> None:
    """Continue training the shipped policy on a world and write it as ``llava/``, with the shipped scorer as ``clip/``.

    Args:
        depth: Factor on the number of layers of the language model.
    """
    shipped = _copy_scorer(directory, plan)
    _, processor = base_models.new_llava(world, plan.sizes, shipped)
    policy = deepen(_shipped_policy(), depth)
    logs = train_policy(world, policy, processor, plan, directory / "llava", progress)
    write_log(world, directory, plan, policy=logs)


def build_idefics3(directory: Path, plan: BuildPlan, progress: Progress | None = None) -> None:
    """Train a policy of the Idefics3 family and write it as ``idefics3/``, with the shipped scorer beside it."""
    scorer = _copy_scorer(directory, plan)
    policy, processor = new_idefics3(HARBOUR, plan.sizes, scorer, _shipped_policy())
    logs = train_policy(HARBOUR, policy, processor, plan, directory / "idefics3", progress, _one_image_per_row)
    write_log(HARBOUR, directory, plan, policy=logs)


def _copy_scorer(directory: Path, plan: BuildPlan) -> CLIPModel:
    """Copy the shipped scorer and load it; seed PyTorch for what is new in the policy."""
    shutil.copytree(assets() / "clip", directory / "clip", dirs_exist_ok=True)
    scorer = CLIPModel.from_pretrained(directory / "clip", dtype=torch.float32)
    torch.manual_seed(plan.seed)
    return scorer


def _shipped_policy() -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(assets() / "llava", dtype=torch.float32)


def deepen(model: LlavaForConditionalGeneration, factor: int) -> LlavaForConditionalGeneration:
    """Return a policy with ``factor`` times as many language model layers that computes the same function.

    After each layer come ``factor - 1`` new ones whose output projections are zero, so they leave
    the residual stream unchanged until they are trained.
    """
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers *= factor
    deeper = LlavaForConditionalGeneration(config)
    deeper.generation_config = model.generation_config
    state = {k: v for k, v in model.state_dict().items() if ".language_model.layers." not in k}
    missing, unexpected = deeper.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(".language_model.layers." in name for name in missing)
    for number, layer in enumerate(deeper.model.language_model.layers):
        layer.load_state_dict(model.model.language_model.layers[number // factor].state_dict())
        if number % factor:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return deeper


def new_idefics3(
    world: World, sizes: base_models.Sizes, scorer: CLIPModel, llava: LlavaForConditionalGeneration
) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """Return a policy with the scorer's vision encoder layers and the LLaVA's language model.

    The connector, the final layer norm of the vision encoder and the embeddings of the new special
    tokens are untrained.
    """
    tokenizer = base_models.fast_tokenizer(
        base_models.train_tokenizer(world, lowercase=False),
        extra_special_tokens={"image_token": base_models.IMAGE},
        padding_side="left",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKERS)}, replace_extra_special_tokens=False)
    vision = base_models.vision_config(sizes).to_dict() | {"model_type": "idefics3_vision"}
    text = base_models.text_config(len(tokenizer), sizes)
    config = Idefics3Config(
        vision_config=vision,
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids(base_models.IMAGE),
        pad_token_id=text.pad_token_id,
        scale_factor=_FOLD,
        tie_word_embeddings=True,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**base_models.special_ids())
    _copy_vision(model, scorer)
    _copy_language_model(model, llava)
    return model, _processor(tokenizer)


def _processor(tokenizer: Any) -> Idefics3Processor:
    size = {"longest_edge": base_models.IMAGE_SIZE}
    clip = base_models.image_processor()
    image_processor = Idefics3ImageProcessor(
        size=size,
        max_image_size=size,
        do_image_splitting=False,
        image_mean=clip.image_mean,
        image_std=clip.image_std,
    )
    num_tokens = (base_models.IMAGE_SIZE // base_models.PATCH_SIZE // _FOLD) ** 2
    template = base_models.CHAT_TEMPLATE.replace(f"{base_models.IMAGE}\n", base_models.IMAGE)
    return Idefics3Processor(image_processor, tokenizer, image_seq_len=num_tokens, chat_template=template)


def _copy_vision(model: Idefics3ForConditionalGeneration, scorer: CLIPModel) -> None:
    target, source = model.model.vision_model, scorer.vision_model
    target.encoder.load_state_dict(source.encoder.state_dict())
    with torch.no_grad():
        target.embeddings.patch_embedding.weight.copy_(source.embeddings.patch_embedding.weight)
        # The first position is that of CLIP's class token.
        target.embeddings.position_embedding.weight.copy_(source.embeddings.position_embedding.weight[1:])


def _copy_language_model(model: Idefics3ForConditionalGeneration, llava: LlavaForConditionalGeneration) -> None:
    state = llava.model.language_model.state_dict()
    embedding = state.pop("embed_tokens.weight")
    text = model.model.text_model
    missing, unexpected = text.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["embed_tokens.weight"], [])
    with torch.no_grad():
        text.embed_tokens.weight[: len(embedding)] = embedding


def _one_image_per_row(scenes: list[Scene]) -> torch.Tensor:
    """Render scenes in Idefics3's shape (n, images per row, 3, side, side)."""
    return pixels(scenes)[:, None]


def main() -> None:
    """Build one of the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(PHASES))
    parser.add_argument("--out", type=Path, required=True, help="directory for clip/, the policy and build.json")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console.quiet_libraries()
    plan = BuildPlan(seed=arguments.seed, policy_phases=PHASES[arguments.model])
    with console.reporter().stage("training the policy", sum(phase.steps for phase in plan.policy_phases)) as progress:
        if arguments.model == "larger":
            build_from_shipped(HARBOUR, arguments.out, plan, lambda *_: progress.advance(1), depth=DEPTH)
        else:
            build_idefics3(arguments.out, plan, lambda *_: progress.advance(1))


if __name__ == "__main__":
    main()
