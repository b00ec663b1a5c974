"""Megatron-Bridge's own loaders on our folders, and ours on its. Where it is not installed, these tests are skipped.

pip install --no-deps megatron-bridge omegaconf hydra-core antlr4-python3-runtime==4.9.3 triton    # Python 3.12
pytest --long tests/checkpoint/peers
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

import megatron_ligo as ligo
from tests.checkpoint import hf_models
from tests.checkpoint.peers import bridge_ranks

# For Python 3.11 there is a release of another interface only.
ABSENT = pytest.mark.skipif(
    find_spec("megatron.bridge") is None or find_spec("triton") is None or sys.version_info < (3, 12),
    reason="megatron-bridge or triton is not installed, or this is Python 3.11",
)
# The arguments that its reader takes from every checkpoint of Megatron-LM, without defaults of its own.
ARGUMENTS = (
    "no_persist_layer_norm", "overlap_p2p_comm", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "fp8_param_gather", "bias_swiglu_fusion", "bias_gelu_fusion", "squared_relu",
    "init_method_xavier_uniform", "config_logger_dir", "cp_comm_type", "is_hybrid_model",
    "heterogeneous_layers_config_path", "fp16_lm_cross_entropy", "transformer_impl", "rotary_interleaved",
)  # fmt: skip

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16, "vocab_size": 256}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tied": True}),
    "llama 3.1": ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def test_args_state_what_its_reader_asks_for(tmp_path):
    ligo.convert(hf_models.model(**SIZES), tmp_path / "ours", to="mcore", options={"bridge": True})
    args = vars(torch.load(tmp_path / "ours" / "iter_0000000" / "common.pt", weights_only=False)["args"])
    assert set(ARGUMENTS) <= set(args)
    assert (args["hidden_dropout"], args["attention_dropout"]) == (0.0, 0.0)


@ABSENT
@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_megatron_bridge_loads_our_checkpoint(pools, tmp_path, name):
    model_type, changes = CASES[name]
    _, folder = hf_models.saved(tmp_path / "hf", model_type, **SIZES, **changes)
    ligo.convert(folder, tmp_path / "ours", to="mcore", options={"bridge": True})
    results = pools(1).run(bridge_ranks.load, hf=str(folder), folder=str(tmp_path / "ours"))
    assert results == {"AutoBridge": [], "args": [], "dropouts": [0.0] * 4}


@ABSENT
@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_what_megatron_bridge_saves_is_read(pools, tmp_path, name):
    """By its run_config.yaml alone."""
    model_type, changes = CASES[name]
    network, folder = hf_models.saved(tmp_path / "hf", model_type, **SIZES, **changes)
    pools(1).run(bridge_ranks.save, hf=str(folder), folder=str(tmp_path / "theirs"))
    reader = ligo.inspect(tmp_path / "theirs")
    assert reader["format"] == "mcore"
    result = ligo.verify(tmp_path / "theirs", network)
    assert not [line for line in result.differences if not line.startswith("model_type")]
