"""Models of other families whose config.json was edited: the tensors tell them, or the network is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.common.errors import CheckpointError
from tests.checkpoint.config_perturbation import MODELS, distance

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 128, "image_size": 32, "patch_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CLASSES = (
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, ("llama", "mistral", "qwen2", "gpt2", "gpt_neox")),
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, ("bert", "roberta", "xlm-roberta")),
    (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, ("vit", "deit")),
)
# Another network by no key and no tensor: rotary positions turn interleaved pairs.
UNTOLD = {("helium", "llama"), ("helium", "mistral")}


def iter_renamed() -> Iterator[tuple[str, transformers.PreTrainedConfig, str, str, dict]]:
    """Yields family, its config, its class, the other name, and the edited config that its keys let through."""
    for names, targets in CLASSES:
        for family, class_name in names.items():
            if family in MODELS or family not in CONFIG_MAPPING or not isinstance(class_name, str):
                continue
            try:
                default = CONFIG_MAPPING[family]()
                known = {*default.to_dict(), *default.attribute_map}
                config = CONFIG_MAPPING[family](**{key: size for key, size in SIZES.items() if key in known})
            except StrictDataclassError:
                continue
            for target in targets:
                edited = json.loads(config.to_json_string())
                edited |= {"model_type": target, "architectures": [MODELS[target][0]]}
                try:
                    config_json.parse_model_config(edited, "config.json")
                except CheckpointError:
                    continue
                yield family, config, class_name, target, edited


@pytest.mark.long
def test_a_renamed_model_is_refused_or_computes_the_same(tmp_path: Path):
    accepted, wrong = set(), set()
    for family, config, class_name, target, edited in iter_renamed():
        torch.manual_seed(0)
        model = getattr(transformers, class_name)(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / family)
        (tmp_path / family / config_json.CONFIG).write_text(json.dumps(edited))
        try:
            reader = formats.open(tmp_path / family)
        except CheckpointError:
            continue
        accepted.add((family, target))
        inputs = verify.sample_inputs(reader.model_config, reader.model_config)
        with torch.no_grad():
            if distance(verify.compute_logits(reader, inputs), model(inputs)[0]) > 1e-5:
                wrong.add((family, target))
    assert len(accepted) > 5
    assert wrong == UNTOLD
