"""LoRAConfig: PEFT's meanings, and one readable error for every bad field."""

from __future__ import annotations

import json
import math

import peft
import pytest

from lora import LoRAConfig, LoRAError
from lora.config import key_matches, layer_number, matches

BAD_FIELDS = [
    ({"r": 0}, ["r is 0", "integer >= 1"]),
    ({"r": -4}, ["r is -4", "integer >= 1"]),
    ({"r": 8.0}, ["r is 8.0", "integer"]),
    ({"r": True}, ["r is True", "integer"]),
    ({"r": "8"}, ["r is '8'", "integer"]),
    ({"lora_alpha": 0}, ["lora_alpha is 0", "> 0"]),
    ({"lora_alpha": -1}, ["lora_alpha is -1", "> 0"]),
    ({"lora_alpha": math.nan}, ["lora_alpha is nan", "finite"]),
    ({"lora_alpha": math.inf}, ["lora_alpha is inf", "finite"]),
    ({"lora_alpha": "16"}, ["lora_alpha is '16'", "number"]),
    ({"lora_dropout": 1.0}, ["lora_dropout is 1.0", "[0, 1)"]),
    ({"lora_dropout": -0.1}, ["lora_dropout is -0.1", "[0, 1)"]),
    ({"lora_dropout": math.nan}, ["lora_dropout is nan", "[0, 1)"]),
    ({"lora_dropout": True}, ["lora_dropout is True", "[0, 1)"]),
    ({"lora_dropout": 1e-7}, ["lora_dropout is 1e-07", "1/65536"]),
    ({"lora_dropout": 0.9999999}, ["lora_dropout is 0.9999999", "1/65536"]),
    ({"bias": "lora-only"}, ["bias is 'lora-only'", "'lora_only'"]),
    ({"bias": True}, ["bias is True", "'none'"]),
    ({"use_rslora": 1}, ["use_rslora is 1", "True or False"]),
    ({"use_dora": "yes"}, ["use_dora is 'yes'", "True or False"]),
    ({"init_lora_weights": "piss"}, ["init_lora_weights is 'piss'", "Did you mean 'pissa'"]),
    ({"init_lora_weights": "pissa_niter_0"}, ["pissa_niter_0", "'pissa_niter_N'"]),
    ({"init_lora_weights": "pissa_niter_N"}, ["pissa_niter_N", "expected"]),
    ({"init_lora_weights": None}, ["init_lora_weights is None", "expected"]),
    ({"target_modules": []}, ["target_modules is empty", "'all-linear'"]),
    ({"target_modules": ""}, ["target_modules is an empty string", "expected"]),
    ({"target_modules": None}, ["target_modules is None", "expected"]),
    ({"target_modules": ["q_proj", 3]}, ["target_modules is", "list of module names"]),
    ({"target_modules": "q_proj("}, ["target_modules 'q_proj('", "not a regular expression"]),
    ({"exclude_modules": "["}, ["exclude_modules '['", "not a regular expression"]),
    ({"modules_to_save": "lm_head"}, ["modules_to_save is the string 'lm_head'", "['lm_head']"]),
    ({"modules_to_save": [""]}, ["modules_to_save is", "expected"]),
    ({"rank_pattern": ["q_proj"]}, ["rank_pattern is ['q_proj']", "mapping"]),
    ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj'] is 0", ">= 1"]),
    ({"rank_pattern": {"q_proj(": 4}}, ["rank_pattern 'q_proj('", "not a regular expression"]),
    ({"alpha_pattern": {"q_proj": math.nan}}, ["alpha_pattern['q_proj'] is nan", "finite"]),
    ({"alpha_pattern": {3: 1.0}}, ["alpha_pattern has the key 3", "expected"]),
    ({"layers_to_transform": [-1]}, ["layers_to_transform is [-1]", ">= 0"]),
    ({"layers_to_transform": []}, ["layers_to_transform is []", "one or more"]),
    ({"layers_to_transform": "3"}, ["layers_to_transform is '3'", "int"]),
    ({"layers_to_transform": [1.5]}, ["layers_to_transform is [1.5]", ">= 0"]),
    ({"layers_to_transform": [True]}, ["layers_to_transform is [True]", ">= 0"]),
    ({"layers_to_transform": 1, "target_modules": ".*q_proj"}, ["layers_to_transform=1", "regular expression"]),
    ({"layers_pattern": "layers"}, ["layers_pattern is 'layers'", "layers_to_transform is None"]),
]


@pytest.mark.parametrize(("fields", "words"), BAD_FIELDS, ids=[json.dumps(f, default=str) for f, _ in BAD_FIELDS])
def test_a_bad_field_is_named_with_what_was_found_and_expected(fields, words):
    with pytest.raises(LoRAError) as error:
        LoRAConfig(**fields)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_field_suggests_the_nearest():
    with pytest.raises(LoRAError, match=r"no field 'lora_dropuot'\. Did you mean 'lora_dropout'"):
        LoRAConfig.from_dict({"lora_dropuot": 0.1})


def test_a_config_is_frozen_and_copies_what_it_is_given():
    pattern = {"q_proj": 2}
    config = LoRAConfig(rank_pattern=pattern, target_modules=["q_proj"])
    pattern["q_proj"] = 99
    assert config.rank_pattern == {"q_proj": 2}
    with pytest.raises(AttributeError):
        config.r = 3


def test_defaults_and_field_names_are_pefts():
    theirs = peft.LoraConfig().to_dict()
    for name, value in LoRAConfig().to_dict().items():
        assert name in theirs
        if name != "target_modules":  # PEFT has no default, and a model-specific table
            assert theirs[name] == value, name


def test_round_trip_through_json():
    config = LoRAConfig(r=4, target_modules=("a", "b"), rank_pattern={"a": 2}, layers_to_transform=[0, 2])
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["q_proj"], "model.layers.0.self_attn.q_proj", True),
        (["q_proj"], "q_proj", True),
        (["proj"], "model.q_proj", False),
        (["self_attn.q_proj"], "layers.0.self_attn.q_proj", True),
        ("q_proj", "layers.0.q_proj", False),
        (r".*\.q_proj", "layers.0.q_proj", True),
        (r".*\.q_pro", "layers.0.q_proj", False),
        (None, "anything", False),
    ],
)
def test_names_match_as_in_peft(names, path, expected):
    assert matches(names, path) is expected


def test_patterns_match_the_end_of_a_path_and_the_first_wins():
    config = LoRAConfig(r=8, lora_alpha=16, rank_pattern={"0.q_proj": 2, "q_proj": 4}, alpha_pattern={"v_.*": 5})
    assert [config.rank_of(p) for p in ("layers.0.q_proj", "layers.1.q_proj", "k_proj")] == [2, 4, 8]
    assert config.alpha_of("layers.3.v_proj") == 5
    assert key_matches("proj", "layers.0.q_proj") is False


def test_scaling_is_alpha_over_r_or_over_its_root():
    assert LoRAConfig(r=16, lora_alpha=32).scaling_of("x") == 2.0
    assert LoRAConfig(r=16, lora_alpha=32, use_rslora=True).scaling_of("x") == 8.0


@pytest.mark.parametrize(
    ("path", "patterns", "number"),
    [
        ("model.layers.3.mlp.up_proj", None, 3),
        ("model.layers.3.experts.5.up_proj", None, 3),  # the first number, as in PEFT
        ("model.layers.3.experts.5.up_proj", "experts", 5),
        ("model.h.12.attn", ["blocks", "h"], 12),
        ("model.embed_tokens", None, None),
    ],
)
def test_layer_numbers(path, patterns, number):
    assert layer_number(path, patterns) == number
