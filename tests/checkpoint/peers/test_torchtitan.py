"""torchtitan's own loaders and state dict adapter on our folders. Where it is not installed, these tests are skipped.

pip install --no-deps torchtitan spmd_types tyro einops docstring_parser shtab typeguard triton
pytest --long tests/checkpoint/peers
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp

import megatron_ligo as ligo
from tests.checkpoint import hf_models

pytestmark = pytest.mark.long
llama3 = pytest.importorskip("torchtitan.models.llama3", reason="torchtitan is not installed")

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 16, "vocab_size": 64}


def build(dims: dict):
    """Builds torchtitan's Llama 3 of the sizes that `ligo inspect` prints; its norms' eps is set afterwards."""
    from torchtitan.models.common.rope import ComplexRoPE

    dim, vocab_size = dims["hidden_size"], dims["vocab_size"]
    rope = ComplexRoPE.Config(dim=dims["head_dim"], max_seq_len=dims["max_positions"], theta=dims["rope_base"])
    config = llama3.Llama3Model.Config(
        dim=dim,
        vocab_size=vocab_size,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=vocab_size, embedding_dim=dim, param_init=llama3._EMBEDDING_INIT
        ),
        norm=llama3.RMSNorm.Config(normalized_shape=dim, param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=dim, out_features=vocab_size, param_init=llama3._output_linear_init(dim)
        ),
        layers=llama3._build_llama3_layers(
            n_layers=dims["num_layers"],
            dim=dim,
            n_heads=dims["num_heads"],
            n_kv_heads=dims["num_kv_heads"],
            hidden_dim=dims["ffn_size"],
            fuse_qkv=True,
            attn_backend="flex",
            rope=rope,
        ),
        **({"enable_weight_tying": True} if dims["tied"] else {}),
    )
    model = config.build()
    for module in model.modules():
        if type(module).__name__ == "RMSNorm":
            module.eps = dims["norm_eps"]
    return config, model.eval()


@pytest.mark.parametrize("tied", [False, True])
def test_torchtitan_loads_our_checkpoint(tmp_path, tied):
    """Through the wrapper that its checkpoint manager hands to torch.distributed.checkpoint.

    Its own adapter then makes the tensors of the Hugging Face model of what its model holds.
    """
    from torchtitan.components.checkpointer.base import ModelWrapper
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

    network = hf_models.model(tied=tied, **SIZES)
    ligo.convert(network, tmp_path / "titan", to="torchtitan")
    config, model = build(ligo.inspect(tmp_path / "titan")["dims"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    wrapper = ModelWrapper(model)
    state = wrapper.state_dict()
    dcp.load(state, checkpoint_id=str(tmp_path / "titan"), no_dist=True)
    wrapper.load_state_dict(state)
    loaded, expected = (
        Llama3StateDictAdapter(config, None).to_hf(ModelWrapper(model).state_dict()),
        network.state_dict(),
    )
    assert set(loaded) - {"lm_head.weight"} == set(expected) - {"lm_head.weight"}
    assert not [name for name, tensor in loaded.items() if not torch.equal(tensor, expected[name])]


@pytest.mark.parametrize("tied", [False, True])
def test_what_torchtitan_saves_is_read(tmp_path, tied):
    """Its adapter reads our Hugging Face folder; the checkpoint that it then writes is the same model to us."""
    from torchtitan.components.checkpointer.base import ModelWrapper
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

    network, folder = hf_models.saved(tmp_path / "hf", tied=tied, **SIZES)
    config, model = build(ligo.inspect(folder)["dims"])
    adapter = Llama3StateDictAdapter(config, str(folder))
    state = adapter.to_hf(ModelWrapper(model).state_dict())
    dcp.load(state, storage_reader=adapter.get_hf_storage_reader(str(folder)), no_dist=True)
    model.load_state_dict(adapter.from_hf(state), strict=False)
    own = tmp_path / "outputs" / "step-7"
    training = {"train_state": {"step": torch.tensor(7)}}
    dcp.save({**ModelWrapper(model).state_dict(), **training}, checkpoint_id=str(own), no_dist=True)
    network.config.save_pretrained(own.parent)
    assert ligo.inspect(own)["format"] == "torchtitan" and ligo.verify(own, network).same
