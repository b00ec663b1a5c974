"""Hugging Face folders of one file (llama, untied) whose tensors and config do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.bad_checkpoints import Builder, edit_json, exactly, problem, register

MODEL, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
hf: dict[str, Builder] = {}


def edit_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    state = load_file(folder / MODEL)
    change(state)
    save_file(state, folder / MODEL, {"format": "pt"})


@register(hf)
def missing_tensors(folder):
    def change(state):
        del state["model.layers.0.self_attn.q_proj.weight"], state["model.norm.weight"]

    edit_tensors(folder, change)
    return exactly(problem("model.layers.0.self_attn.q_proj.weight"), problem("model.norm.weight", found="nothing"))


@register(hf)
def unexpected_tensors(folder):
    edit_tensors(
        folder, lambda state: state.update({"model.layers.0.extra": torch.ones(1), "score.weight": torch.ones(1)})
    )
    return exactly(problem("model.layers.0.extra", "no such tensor"), problem("score.weight", "no such tensor"))


@register(hf)
def misshaped_tensors(folder):
    edit_tensors(folder, lambda state: state.update({"model.norm.weight": torch.ones(47)}))
    return problem("model.norm.weight", "(48,)", "(47,)")


@register(hf)
def integer_tensors(folder):
    edit_tensors(folder, lambda state: state.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    return problem("model.norm.weight", found="I8")


@register(hf)
def more_layers_in_the_config(folder):
    edit_json(folder / CONFIG, num_hidden_layers=3)
    return "model.layers.2.mlp.up_proj.weight", "9 problems"


@register(hf)
def fewer_layers_in_the_config(folder):
    edit_json(folder / CONFIG, num_hidden_layers=1)
    return "model.layers.1.mlp.up_proj.weight", "9 problems"


@register(hf)
def a_million_layers(folder):
    edit_json(folder / CONFIG, num_hidden_layers=10**15)
    return problem("num_layers")


@register(hf)
def other_sizes_in_the_config(folder):
    edit_json(folder / CONFIG, vocab_size=38, num_key_value_heads=3)
    return problem("model.embed_tokens.weight") + problem("lm_head.weight") + problem("k_proj")


@register(hf)
def tied_in_the_config_only(folder):
    edit_json(folder / CONFIG, tie_word_embeddings=True)
    return problem("lm_head.weight", "model.embed_tokens.weight")


@register(hf)
def untied_without_a_head(folder):
    edit_tensors(folder, lambda state: state.pop("lm_head.weight"))
    return problem("lm_head.weight")


@register(hf)
def another_activation(folder):
    edit_json(folder / CONFIG, hidden_act="gelu")
    return problem("hidden_act", "silu", "gelu")


@register(hf)
def biases(folder):
    edit_json(folder / CONFIG, mlp_bias=True, attention_bias=True)
    missing = (
        problem(f"model.layers.0.{name}.bias", found="nothing") for name in ("self_attn.q_proj", "mlp.down_proj")
    )
    return sum(missing, ())


@register(hf)
def an_unknown_family(folder):
    edit_json(folder / CONFIG, model_type="lama")
    return problem("model_type", found="'lama'")


@register(hf)
def quantised(folder):
    edit_json(folder / CONFIG, quantization_config={"bits": 4})
    return problem("quantization_config")


@register(hf)
def code_of_its_own(folder):
    edit_json(folder / CONFIG, auto_map={"AutoModel": "evil.Model"})
    return problem("auto_map")


@register(hf)
def partial_rotation(folder):
    edit_json(
        folder / CONFIG, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    )
    return problem("partial_rotary_factor", found="0.5")


@register(hf)
def rotation_by_kind_of_layer(folder):
    edit_json(folder / CONFIG, rope_parameters={"full_attention": {"rope_theta": 1.0}})
    return problem("rope_parameters")


@register(hf)
def windows_in_some_layers(folder):
    edit_json(folder / CONFIG, layer_types=["full_attention", "sliding_attention"])
    return problem("layer_types")


@register(hf)
def sizes_of_another_kind(folder):
    edit_json(folder / CONFIG, hidden_size="48", rms_norm_eps=None, tie_word_embeddings="no", num_attention_heads=-6)
    return problem("hidden_size") + problem("norm_eps") + problem("tied") + problem("num_heads", found="-6")


@register(hf)
def numbers_that_are_none(folder):
    edit_json(folder / CONFIG, rms_norm_eps=float("nan"), rope_parameters=None, rope_theta=float("inf"))
    return problem("config.json", "JSON", "NaN")


@register(hf)
def a_number_that_overflows(folder):
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"rms_norm_eps": ', '"rms_norm_eps": 1e999, "unused": '))
    return problem("config.json", "JSON", "1e999")


@register(hf)
def a_key_twice(folder):
    text = (folder / CONFIG).read_text().rstrip().removesuffix("}")
    (folder / CONFIG).write_text(f'{text}, "rms_norm_eps": 0.5}}')
    return problem("config.json", "JSON", "the key 'rms_norm_eps' twice")


@register(hf)
def a_number_that_no_float_holds(folder):
    edit_json(folder / CONFIG, rms_norm_eps=10**400)
    return problem("config.json", "JSON", "401 digits")


@register(hf)
def no_config(folder):
    (folder / CONFIG).unlink()
    return problem("config.json")


@register(hf)
def a_config_that_is_no_json(folder):
    (folder / CONFIG).write_text('{"model_type": "llama",')
    return problem("config.json", "JSON")


@register(hf)
def a_config_that_is_a_list(folder):
    (folder / CONFIG).write_text("[]")
    return problem("config.json", "object", "list")


@register(hf)
def a_config_of_brackets(folder):
    (folder / CONFIG).write_text("[" * 100_000)
    return problem("config.json", "JSON")
