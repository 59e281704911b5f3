"""Test the configuration: precedence, presets, and helpful errors."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest
import yaml

from csr_vlm.config.load import load_config, merged, resolve
from csr_vlm.config.model_size import guess_parameters
from csr_vlm.config.schema import RunConfig, preset_date, presets
from csr_vlm.config.shipped import shipped_recipes
from csr_vlm.core.errors import CsrError
from tests.unit.builders import REQUIRED, config

RECIPES = sorted(shipped_recipes().values())


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    actual: dict[str, Any] = {}
    for key, inner in value.items():
        actual |= flat(inner, f"{prefix}.{key}".lstrip("."))
    return actual


def differing(left: RunConfig, right: RunConfig) -> dict[str, tuple[Any, Any]]:
    a, b = flat(left.dump()), flat(right.dump())
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


def overridden(*overrides: str) -> RunConfig:
    return load_config(None, overrides, REQUIRED)


def refusal(*overrides: str) -> CsrError:
    with pytest.raises(CsrError) as caught:
        overridden(*overrides)
    return caught.value


def test_all_documented_presets_exist():
    assert set(presets()) >= {"paper", "official", "calibrated", "only_rt", "only_ri", "random_pairs"}


def config_of(preset: str) -> RunConfig:
    """Load the configuration of a preset with the required values."""
    needed = {"data": {"prompts": "prompts.jsonl", "pairs": "pairs.json"}} if preset == "external" else {}
    return config(preset=preset, **needed)


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_resolves_to_itself(name):
    actual = config_of(name)
    assert actual.preset == name
    assert resolve(actual.dump()) == actual


@pytest.mark.parametrize("name", presets())
def test_every_setting_of_a_preset_takes_effect(name):
    needed = {"data": {"prompts": "prompts.jsonl", "pairs": "pairs.json"}} if name == "external" else {}
    resolved = flat(config(preset=name, model={"path": "small-2m"}, **needed).dump())
    assert flat(presets()[name]).items() <= resolved.items()


def test_a_recipe_of_model_scorer_and_prompts_is_safe_for_its_model(tmp_path):
    def training(path: str, **changes):
        found = config(model={"path": path}, **changes)
        return found.training.trl["learning_rate"], found.method.pairs.per_prompt

    assert training("llava-hf/llava-1.5-7b-hf") == (5e-6, 4)
    assert training("org/no-size-in-the-name") == (5e-6, 4), "an unknown size may be a large one"
    assert training("org/model-0.5b") == (2e-5, 4)
    assert training("org/model-3m") == (3e-4, 12)
    assert training("org/model-7b", preset="random_pairs") == (5e-6, 4)
    assert training("org/model-7b", training={"trl": {"learning_rate": 1e-6}}) == (1e-6, 4)
    assert training("org/model-3m", preset="paper") == training("org/model-7b", preset="paper") == (1e-7, 1)


def test_the_size_of_a_model_on_disk_counts_whatever_its_name(tmp_path):
    model = tmp_path / "my-7b"
    model.mkdir()
    # A layer of width 64 with feed-forward width 256 has 4 * 64^2 + 3 * 64 * 256 = 65,536 parameters.
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 1000}
    (model / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": sizes}))
    assert guess_parameters(str(model)) == 2 * 65_536 + 64_000
    assert config(model={"path": str(model)}).training.trl["learning_rate"] == 3e-4
    (model / "config.json").write_text('{"text_config": {"hidden_size": "wide"}}')
    assert guess_parameters(str(model)) == 7_000_000_000


def test_every_preset_has_the_day_of_its_last_change():
    for name in presets():
        dt.date.fromisoformat(preset_date(name))


def test_preset_external_requires_pairs():
    with pytest.raises(CsrError, match=r"set data\.pairs"):
        config(preset="external")
    actual = differing(config(preset="calibrated"), config_of("external"))
    assert set(actual) == {"preset", "iterations", "data.pairs"}
    assert actual["iterations"][1] == 1


def test_the_default_preset_is_calibrated():
    assert config() == config(preset="calibrated")
    assert differing(config(), config(preset="paper"))


def test_preset_paper_is_the_published_method():
    actual = flat(config(preset="paper").dump())
    assert (
        actual.items()
        >= {
            "iterations": 3,
            "method.lambda": 0.9,
            "method.search.delimiters": ".",
            "method.search.decoding": "sample",
            "method.search.steer_by": "sentence",
            "method.reward.text_score": "product",
            "method.reward.text_scale": 1.0,
            "method.reward.fusion": "weighted",
            "method.reward.response": "sum",
            "method.reward.repeat_penalty": 0.0,
            "method.pairs.selection": "extremes",
            "method.pairs.min_margin": 0.0,
            "training.projector_learning_rate": None,
        }.items()
    )
    assert actual["method.search.keep_top"] == actual["method.search.keep_bottom"], "the same k at both ends"


def test_preset_official_is_the_released_code():
    actual = flat(config(preset="official").dump())
    assert (
        actual.items()
        >= {
            "method.lambda": 0.9,
            "method.search.delimiters": ".",
            "method.search.steer_by": "sentence_logprobs",
            "method.search.keep_all_below": 5,
            "method.search.continue_cut": True,
            "method.pairs.require_complete": False,
            "method.search.num_candidates": 5,
            "method.search.keep_top": 1,
            "method.search.keep_bottom": 2,
            "method.search.decoding": "diverse",
            "method.search.diversity_penalty": 3.0,
            "method.search.max_sentence_tokens": 70,
            "method.search.max_response_chars": 1024,
            "method.search.filters.min_chars": 4,
            "method.search.filters.max_newlines": 5,
            "method.search.filters.loops": True,
            "method.search.filters.other_scripts": True,
            "method.reward.text_score": "mean_logprob",
            "method.reward.fusion": "sibling_rank",
            "method.reward.response": "mean_plus_one",
            "training.lora.r": 128,
            "training.lora.alpha": 256,
            "training.lora.dropout": 0.05,
            "training.projector_learning_rate": None,
            "training.trl.learning_rate": 1e-7,
            "training.trl.lr_scheduler_type": "cosine",
            "training.trl.warmup_steps": 0.03,
            "training.trl.per_device_train_batch_size": 1,
            "training.trl.num_train_epochs": 1,
            "training.trl.beta": 0.1,
        }.items()
    )


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("only_rt", "method.lambda", 0.0),
        ("only_ri", "method.lambda", 1.0),
        ("random_pairs", "method.pairs.selection", "random"),
    ],
)
def test_an_ablation_differs_in_one_setting(name, key, value):
    whole = "sentences" if name == "only_rt" else "calibrated"
    actual = differing(config(preset=whole), config(preset=name))
    assert actual.pop("preset") == (whole, name)
    # What is meant to fail is let run.
    assert actual.pop("evaluation.audit", None) == (None if name == "only_ri" else ("stop", "warn"))
    # Questions are answered by relevance, which two of them are to do without.
    assert actual.pop("method.pairs.questions.per_prompt", (0, 0))[1] == 0
    assert list(actual) == [key]
    assert actual[key][1] == value


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(recipe):
    load_config(recipe)


@pytest.mark.parametrize(
    ("override", "key", "near"),
    [
        ("sed=1", "sed", "seed"),
        ("method.lamda=0.7", "method.lamda", "method.lambda"),
        ("method.lambda_=0.7", "method.lambda_", "method.lambda"),
        ("method.serch.top_p=0.9", "method.serch", "method.search"),
        ("method.search.topp=0.9", "method.search.topp", "method.search.top_p"),
        ("method.search.filters.min_char=3", "method.search.filters.min_char", "method.search.filters.min_chars"),
        ("evaluation.world.num_scene=3", "evaluation.world.num_scene", "evaluation.world.num_scenes"),
        ("training.lora.alhpa=3", "training.lora.alhpa", "training.lora.alpha"),
        ("lambda=0.7", "lambda", "method.lambda"),
    ],
)
def test_the_error_for_an_unknown_option_suggests_the_closest_one(override, key, near):
    error = refusal(override)
    assert key in error.message
    assert f"did you mean {near}?" in error.hint


def test_the_error_for_an_unknown_option_lists_all_options_if_none_is_close():
    error = refusal("method.pairs.zzzzzz=1")
    assert "method.pairs.zzzzzz" in error.message
    assert all(name in error.hint for name in ("selection", "min_margin", "require_complete"))


@pytest.mark.parametrize(
    "override",
    [
        "method.lambda=1.01",
        "method.lambda=-0.1",
        "method.lambda=.nan",
        "method.search.keep_top=0",
        "method.search.num_candidates=0",
        "method.search.num_candidates=2.5",
        "method.search.temperature=0",
        "method.search.top_p=0",
        "method.search.top_p=1.5",
        "method.search.steer_by=luck",
        "method.search.delimiters=''",
        "method.reward.repeat_penalty=-1",
        "method.reward.text_scale=0",
        "method.pairs.min_margin=-1",
        "training.lora.dropout=1",
        "iterations=0",
        "seed=-1",
        "scorer.name=a b",
        "data.limit=0",
        "method=3",
    ],
)
def test_values_out_of_bounds_are_rejected_by_name(override):
    key, _, value = override.partition("=")
    error = refusal(override)
    assert key in error.message
    assert value.strip("'.") in error.hint


@pytest.mark.parametrize(
    "bound", ["method.lambda=0", "method.lambda=1", "method.search.top_p=1", "method.search.keep_bottom=0"]
)
def test_the_bounds_themselves_are_allowed(bound):
    overridden(bound)


@pytest.mark.parametrize("missing", ["model", "scorer", "data"])
def test_missing_required_options_are_named(missing):
    with pytest.raises(CsrError, match=f"{missing} is missing"):
        resolve({key: value for key, value in REQUIRED.items() if key != missing})


def test_the_error_for_an_unknown_preset_suggests_a_preset():
    error = refusal("preset=papr")
    assert "papr" in error.message
    assert "paper" in error.message


@pytest.mark.parametrize(
    "override", ["method.lamda=1", "method.lambda=7", "preset=papr", "method.search.steer_by=x", "seed=[1]", "nonsense"]
)
def test_error_messages_contain_no_technical_noise(override):
    error = refusal(override)
    for noise in ("Traceback", "pydantic", "http", "ValidationError", "type=", "\n"):
        assert noise not in str(error)
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize("override", ["method", "=3", "method..lambda=1", ".method=1", "method.=1"])
def test_invalid_overrides_are_rejected(override):
    error = refusal(override)
    assert override in error.message
    assert "key=value" in error.hint


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("True", True),
        ("off", "off"),
        ("Yes", "Yes"),
        ("n", "n"),
        ("cosine", "cosine"),
        ("'1e-4'", "1e-4"),
        ("[1, 2]", [1, 2]),
        ("{a: 1}", {"a": 1}),
        ("a=b", "a=b"),
        ("", None),
    ],
)
def test_override_values(text, value):
    actual = overridden(f"training.trl.option={text}").training.trl["option"]
    assert actual == value
    assert type(actual) is type(value)


def test_overrides_reach_every_depth():
    actual = overridden(
        "seed=5",
        "method.lambda=1e-4",
        "method.search.max_response_chars=null",
        "training.merge=true",
        "training.trl.learning_rate=2e-5",
        "evaluation.world.num_scenes=7",
    )
    assert actual.seed == 5
    assert actual.method.lambda_ == 1e-4
    assert actual.method.search.max_response_chars is None
    assert actual.training.merge is True
    assert actual.training.trl["learning_rate"] == 2e-5
    assert actual.training.trl["beta"] == 0.1, "the other values of the preset are kept"
    assert actual.evaluation.world is not None
    assert actual.evaluation.world.num_scenes == 7


def test_off_is_a_string_and_yes_is_true_for_boolean_options():
    assert overridden("training.packing=off").training.packing == "off"
    assert overridden("training.merge=yes").training.merge is True
    assert overridden("method.pairs.questions.no=No").method.pairs.questions.no == "No"
    assert yaml.safe_load("off") is False, "other readers are left alone"


def test_questions_can_be_disabled_and_the_pattern_is_gone():
    assert overridden().method.pairs.questions.per_prompt == 4
    assert overridden("method.pairs.questions.per_prompt=0").method.pairs.questions.per_prompt == 0
    with pytest.raises(CsrError, match="is an option of version 0") as error:
        overridden("method.pairs.questions.pattern=")
    assert "per_prompt" in error.value.hint


def test_preset_then_recipe_then_overrides(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    settings = {"preset": "official", "method": {"lambda": 0.3, "search": {"keep_top": 3, "keep_bottom": 4}}}
    recipe.write_text(yaml.safe_dump(REQUIRED | settings))
    actual = load_config(recipe, ["method.search.keep_top=5", "method.search.keep_top=6"]).method
    assert actual.search.num_candidates == 5, "from the preset"
    assert actual.search.decoding == "diverse", "from the preset"
    assert actual.lambda_ == 0.3, "from the recipe, above the preset"
    assert actual.search.keep_bottom == 4, "from the recipe"
    assert actual.search.keep_top == 6, "from the last override"
    assert actual.search.top_p == 1.0, "a default"


def test_an_override_can_change_the_preset_below_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(REQUIRED | {"preset": "paper", "method": {"lambda": 0.3}}))
    actual = load_config(recipe, ["preset=official"])
    assert actual.method.reward.fusion == "sibling_rank"
    assert actual.method.lambda_ == 0.3


@pytest.mark.parametrize("content", ["", "- 1\n", "a: [1\n", "just text"])
def test_a_recipe_without_a_configuration_is_rejected(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(CsrError, match=r"recipe\.yaml"):
        load_config(recipe)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(CsrError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_dump_and_resolve_round_trip_through_yaml():
    actual = overridden(
        "preset=official",
        "method.lambda=1e-4",
        "training.trl.learning_rate=1e-7",
        "model.path='Ünïcode: # path'",
        "method.search.delimiters='.!?\"'",
        "evaluation.world.num_scenes=3",
    )
    again = resolve(yaml.safe_load(yaml.safe_dump(actual.dump(), sort_keys=False, allow_unicode=True)))
    assert again == actual
    assert "lambda" in actual.dump()["method"], "options are written by the names that users give them"


def test_the_presets_are_not_changed_by_use():
    before = yaml.safe_dump({name: dict(block) for name, block in presets().items()})
    overridden("preset=official", "method.lambda=0.1", "training.trl.beta=0.9")
    assert yaml.safe_dump({name: dict(block) for name, block in presets().items()}) == before


def test_merged_overlays_mapping_by_mapping():
    below = {"a": {"x": 1, "y": 2}, "b": [1], "c": 3}
    above = {"a": {"y": 5}, "b": [2], "c": {"z": 1}}
    assert merged(below, above) == {"a": {"x": 1, "y": 5}, "b": [2], "c": {"z": 1}}
    assert below["a"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        (["training.learning_rate=1e-4"], "did you mean training.trl.learning_rate?"),
        (["learning_rate=1e-4"], "did you mean training.trl.learning_rate?"),
        (["training.beta=0.1"], "did you mean training.trl.beta?"),
        (["data.questions=What", "is", "it?"], "put that in quotes: 'data.questions=[\"What is it?\"]'"),
        (["data.questions=[What", "is", "it?]"], "put texts, and the whole, in quotes: 'data.questions=[\"What is"),
        (["data.questions=[What is it?]"], "put texts, and the whole, in quotes: 'data.questions=[\"What is it?\"]'"),
        (["data.questions=What"], "write 'data.questions=[\"What is it?\"]'"),
        (["data.questions=[{a: b}]"], 'the value was {"a": "b"}; put the text in quotes'),
        (["data.questions=[a: true]"], 'the value was {"a": true}; put the text in quotes'),
        (["data.image_root=[a]"], 'the value was ["a"]; put the text in quotes'),
    ],
)
def test_hints_say_where_an_option_is_and_what_to_quote(overrides, hint):
    with pytest.raises(CsrError) as raised:
        load_config(None, overrides, base=REQUIRED)
    assert hint in raised.value.hint
