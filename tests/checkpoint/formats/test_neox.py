"""GPT-NeoX's own checkpoints: the layer files of its pipeline, its plain engine's files, and the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch import Tensor

import megatron_ligo as ligo

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "layer_norm_eps": 1e-3,
    "rotary_pct": 0.5,
    "rotary_emb_base": 5000,
}
SETTINGS = {
    "num_layers": 3,
    "hidden-size": 32,
    "num_attention_heads": 4,
    "max-position-embeddings": 32,
    "seq_length": 32,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "rotary-emb-base": 5000,
    "layernorm_epsilon": 0.001,
    "no_weight_tying": True,
    "gpt_j_residual": True,
    "attention_config": [[["flash"], 3]],
    "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
    "fp16": {"enabled": True},
    "hidden_dropout": 0.1,
}
# Of transformers in memory.
HEAD = "lm_head.weight"
CUT_INPUTS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
SUMMED = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")


def model(**changes) -> transformers.GPTNeoXForCausalLM:
    torch.manual_seed(0)
    network = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.2)
    return network


def place(name: str, num_layers: int = 3) -> tuple[int, str]:
    """Returns the number of GPT-NeoX's layer that holds a tensor of Hugging Face's name, and its name there."""
    others = {
        "gpt_neox.embed_in.weight": (0, "word_embeddings.weight"),
        HEAD: (num_layers + 4, "final_linear.weight"),
        "gpt_neox.final_layer_norm.weight": (num_layers + 3, "norm.weight"),
        "gpt_neox.final_layer_norm.bias": (num_layers + 3, "norm.bias"),
    }
    if name in others:
        return others[name]
    _, _, layer, rest = name.split(".", 3)
    return int(layer) + 2, rest


def cut(name: str, tensor: Tensor, tp: int, parallel: bool = True, head_dim: int = 0) -> list[Tensor]:
    """Returns the ranks' shards. A sum of biases is cut into halves that float32 adds up to the same bits."""
    if name.endswith(CUT_INPUTS):
        return list(tensor.chunk(tp, dim=1))
    if name.endswith(SUMMED) and parallel:
        return [tensor / tp] * tp
    if "norm" in name or name.endswith(SUMMED):
        return [tensor] * tp
    return list(tensor.chunk(tp, dim=head_dim if name == HEAD else 0))


def write(root: Path, network, tp: int = 1, *, engine: bool = False, settings: Mapping | None = None, **how) -> Path:
    """Writes the files of a run: DIR/latest, its layers or (engine) its ranks, and its settings in two files."""
    folder = root / "global_step7"
    (folder / "configs").mkdir(parents=True)
    (root / "latest").write_text("global_step7")
    tied = network.config.tie_word_embeddings
    shards = {
        name: cut(name, tensor, tp, network.config.use_parallel_residual, **how)
        for name, tensor in network.state_dict().items()
        if not (tied and name == HEAD)
    }
    layers: list[dict[int, dict[str, Tensor]]] = [{} for _ in range(tp)]
    for name, pieces in shards.items():
        layer, own = place(name)
        for rank, piece in enumerate(pieces):
            layers[rank].setdefault(layer, {})[own] = piece.clone()
    state = {"global_steps": 7, "mp_world_size": tp, "dp_world_size": 1, "iteration": 7, "module": None}
    state["args"] = {"num_layers": 3, "hidden_size": 32, "padded_vocab_size": 64, "model_parallel_size": tp}
    for rank, numbered in enumerate(layers):
        for number in range(2, 5):
            numbered[number]["attention.rotary_emb.inv_freq"] = torch.ones(3)
        if engine:
            module = {f"sequential.{layer}.{name}": t for layer, named in numbered.items() for name, t in named.items()}
            torch.save({**state, "module": module}, folder / f"mp_rank_{rank:02d}_model_states.pt")
            continue
        torch.save(state, folder / f"mp_rank_{rank:02d}_model_states.pt")
        for layer, named in numbered.items():
            torch.save(named, folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
    values = dict(SETTINGS if settings is None else settings)
    (folder / "configs" / "local_setup.yml").write_text('{"data-path": "data/x", "save": "checkpoints",}')
    (folder / "configs" / "model.yml").write_text(yaml.safe_dump(values))
    return root


@pytest.mark.parametrize("engine", [False, True], ids=["pipeline", "engine"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_run_is_read_by_its_settings(tmp_path, tp, engine):
    network = model()
    folder = write(tmp_path / "run", network, tp, engine=engine)
    summary = ligo.inspect(folder)
    assert (summary["format"], summary["step"], summary["layout"]) == ("neox", 7, {"tp": tp})
    assert ligo.inspect(folder)["dims"] == ligo.inspect(network)["dims"]
    assert ligo.verify(folder, network).same and ligo.verify(folder / "global_step7", network).same
    ligo.convert(folder, tmp_path / "hf", to="hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded(tokens).logits, network(tokens).logits)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"use_parallel_residual": False}, {"gpt_j_residual": False}),
        ({"tie_word_embeddings": True}, {"no_weight_tying": False}),
        ({"hidden_act": "gelu_new"}, {"bias_gelu_fusion": True}),
        ({"hidden_act": "relu"}, {"activation": "relu", "bias_gelu_fusion": True}),
    ],
    ids=["in sequence", "tied", "fused GELU", "ReLU"],
)
def test_settings_that_change_the_network(tmp_path, changes, settings):
    network = model(**changes)
    folder = write(tmp_path / "run", network, 2, settings={**SETTINGS, **settings})
    assert ligo.inspect(folder)["dims"] == ligo.inspect(network)["dims"]
    assert ligo.verify(folder, network).same


def test_a_head_cut_along_its_inputs_and_newer_names(tmp_path):
    network = model()
    folder = write(tmp_path / "run", network, 2, head_dim=1)
    for path in folder.glob("global_step7/layer_0[2-4]*"):
        renamed = {"dense_h_to_4h": "linear1", "dense_4h_to_h": "linear2"}
        state = torch.load(path)
        for old, new in renamed.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
        torch.save(state, path)
    assert ligo.verify(folder, network).same


def test_norms_that_the_ranks_trained_apart_are_read_as_their_mean(tmp_path, caplog):
    network = model()
    folder = write(tmp_path / "run", network, 2)
    path = folder / "global_step7" / "layer_03-model_01-model_states.pt"
    state = torch.load(path)
    state["input_layernorm.weight"] += 0.5
    torch.save(state, path)
    (difference,) = ligo.verify(folder, network).differences
    assert difference.startswith("layers.1.norm1") and "mean" in caplog.text
    ligo.convert(folder, tmp_path / "hf", to="hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    expected = network.gpt_neox.layers[1].input_layernorm.weight + 0.25
    assert torch.allclose(loaded.gpt_neox.layers[1].input_layernorm.weight, expected)
    folder = write(tmp_path / "sequence", model(use_parallel_residual=False), 2,
                   settings={**SETTINGS, "gpt_j_residual": False})  # fmt: skip
    torch.save(state, folder / "global_step7" / path.name)
    with pytest.raises(ligo.CheckpointError, match="rank 1"):
        ligo.verify(folder, network)


def test_a_config_beside_replaces_the_settings_and_must_agree(tmp_path):
    """The vocabulary of the run is padded, and its GELU is the fused one, which configs of the hub do not say."""
    network = model(vocab_size=64)
    folder = write(tmp_path / "run", network, settings={**SETTINGS, "bias_gelu_fusion": True})
    config = transformers.GPTNeoXConfig(**{**SIZES, "vocab_size": 50, "architectures": ["GPTNeoXForCausalLM"]})
    config.save_pretrained(folder)
    summary = ligo.inspect(folder)
    assert (summary["dims"]["vocab_size"], summary["dims"]["activation"]) == (50, "gelu")
    assert summary["layout"] == {"tp": 1, "padded_vocab": 64}
    config.rotary_emb_base = config.rope_parameters["rope_theta"] = 10000
    config.save_pretrained(folder)
    with pytest.raises(ligo.CheckpointError, match="rope_base"):
        ligo.inspect(folder)
    (folder / "config.json").unlink()
    for path in (folder / "global_step7" / "configs").iterdir():
        path.unlink()
    with pytest.raises(ligo.CheckpointError, match=r"config\.json"):
        ligo.inspect(folder)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"pos_emb": "alibi"}, "pos_emb"),
        ({"pos_emb": None}, "pos_emb"),
        ({"norm": "rmsnorm"}, "norm"),
        ({"gpt_j_tied": True}, "gpt_j_tied"),
        ({"use-qk-layernorm": True}, "use_qk_layernorm"),
        ({"num_kv_heads": 2}, "num_kv_heads"),
        ({"attention_config": [[["global", "sparse_fixed"], 2]]}, "attention_config"),
        ({"moe_num_experts": 8}, "moe_num_experts"),
        ({"activation": "swiglu"}, "activation"),
        ({"use_bias_in_mlp": False}, "use_bias_in_mlp"),
        ({"num_layers": 4}, "num_layers|layers.3"),
        ({"a_new_feature": 3}, "a_new_feature"),
        ({"rotary-emb-base": 5000, "rotary_emb_base": 500}, "rotary_emb_base"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_of_another_network_are_refused(tmp_path, settings, where):
    folder = write(tmp_path / "run", model(), settings={**SETTINGS, **settings})
    with pytest.raises(ligo.CheckpointError, match=where):
        ligo.inspect(folder)


def test_missing_and_damaged_files_are_refused(tmp_path):
    network = model()
    folder = write(tmp_path / "run", network, 2)
    step = folder / "global_step7"
    (step / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(ligo.CheckpointError, match="layer_03-model_01"):
        ligo.inspect(folder)
    folder = write(tmp_path / "other", network)
    path = folder / "global_step7" / "layer_06-model_00-model_states.pt"
    state = torch.load(path)
    torch.save({**state, "norm.scale": torch.ones(32)}, path)
    with pytest.raises(ligo.CheckpointError, match=r"final_layer_norm\.scale"):
        ligo.inspect(folder)
    (folder / "global_step7" / "configs" / "model.yml").write_text("num_layers: !!python/name:os.system")
    with pytest.raises(ligo.CheckpointError, match=r"model\.yml"):
        ligo.inspect(folder)
