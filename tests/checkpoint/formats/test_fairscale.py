"""Meta's Llama files, read from and loaded by real fairscale layers; sizes; tokenizers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.formats.fairscale import params_json
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ConfigError
from tests.checkpoint import hf_models
from tests.checkpoint.formats import fairscale_model

# head_dim = hidden / heads, as Meta's code requires; 2 ranks can share these sizes.
PLAIN = {"head_dim": 8}


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits


@pytest.mark.parametrize(
    ("cut", "params", "context"),
    [("features", fairscale_model.LLAMA_2, 4096), ("vocabulary", fairscale_model.LLAMA_3, 8192)],
)
def test_files_saved_by_fairscale_layers(tmp_path, pools, cut, params, context):
    folder = tmp_path / "meta"
    folder.mkdir()
    expected = torch.tensor(pools(2).run(fairscale_model.save, folder=str(folder), cut=cut, params=params))
    reader = formats.open(folder)
    assert (reader.layout, reader.model_config.vocab_size, reader.model_config.max_positions) == (
        {"tp": 2},
        38,
        context,
    )
    assert (reader.model_config.ffn_size, reader.model_config.rope_base) == (
        {4: 168, 6: 128}[params["n_heads"]],
        reader.model_config.rope_base,
    )
    convert(reader, tmp_path / "hf", "hf")
    ids = hf_models.tokens(fairscale_model.VOCABULARY)
    torch.testing.assert_close(logits(tmp_path / "hf", ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("cut", "tp", "changes"),
    [
        ("features", 2, {"tie_word_embeddings": True, "rope_theta": 10000.0}),
        ("vocabulary", 4, {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12}),
    ],
)
def test_what_is_written_loads_into_fairscale_layers(tmp_path, pools, cut, tp, changes):
    tied = changes.pop("tie_word_embeddings", False)
    _, folder = hf_models.saved(tmp_path / "hf", tied=tied, **{**PLAIN, **changes})
    convert(formats.open(folder), tmp_path / "meta", "fairscale", WriteOptions(tp=tp, extra={"embedding": cut}))
    result = torch.tensor(pools(tp).run(fairscale_model.load, folder=str(tmp_path / "meta"), cut=cut))
    ids = hf_models.tokens()
    torch.testing.assert_close(result[..., :37], logits(folder, ids), atol=1e-5, rtol=1e-5)
    # 37 tokens on 2 or 4 ranks: zero rows below.
    assert (result[..., 37:] == 0).all()
    assert result.shape[-1] == -(-37 // tp) * tp


@pytest.mark.parametrize("tied", [False, True])
def test_any_number_of_ranks_to_any_other(tmp_path, tied):
    sizes = {**PLAIN, "num_key_value_heads": 6, "intermediate_size": 60}
    _, folder = hf_models.saved(tmp_path / "hf", tied=tied, dtype=torch.bfloat16, **sizes)
    source = formats.open(folder)
    for number, (tp, cut) in enumerate(itertools.product((1, 2, 3, 6), ("vocabulary", "features"))):
        target = tmp_path / str(number)
        convert(source, target, "fairscale", WriteOptions(tp=tp, extra={"embedding": cut}))
        assert len(list(target.glob("consolidated.*.pth"))) == tp
        source = formats.open(target)
    convert(source, tmp_path / "back", "hf")
    hf_models.assert_same(formats.open(tmp_path / "back"), formats.open(folder))


def test_more_ranks_than_kv_heads(tmp_path):
    """Each rank has a copy of one head, as in Llama 3.1 405B at 16 ranks."""
    _, folder = hf_models.saved(tmp_path / "hf", **PLAIN, num_key_value_heads=1)
    convert(formats.open(folder), tmp_path / "meta", "fairscale")
    whole = torch.load(tmp_path / "meta" / "consolidated.00.pth")
    (tmp_path / "meta" / "manifest.json").unlink()
    for rank in range(2):
        state = {}
        for name, tensor in whole.items():
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            alike = "norm" in name or name.endswith(("wk.weight", "wv.weight"))
            if name in ("tok_embeddings.weight", "output.weight"):
                tensor = torch.cat([tensor, torch.zeros(1, 48)])
            state[name] = tensor.clone() if alike else tensor.chunk(2, dim)[rank].clone()
        torch.save(state, tmp_path / "meta" / f"consolidated.{rank:02d}.pth")
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(json.dumps({**params, "vocab_size": 38}))
    hf_models.assert_same(formats.open(tmp_path / "meta"), formats.open(folder))
    state["layers.1.attention.wk.weight"][3, 3] += 1
    torch.save(state, tmp_path / "meta" / "consolidated.01.pth")
    with pytest.raises(CheckpointError) as error:
        formats.open(tmp_path / "meta").read("layers.1.k")
    (problem,) = error.value.problems
    assert problem.where.startswith("layers.1.k ") and "rank 1" in problem.found
    with pytest.raises(ConfigError) as error:
        convert(formats.open(folder), tmp_path / "other", "fairscale", WriteOptions(tp=2))
    assert "num_kv_heads = 1" in [problem.found for problem in error.value.problems]


def test_the_ffn_rule_gives_the_size():
    releases = {(4096, 11008): 256, (5120, 13824): 256, (8192, 28672): 4096, (4096, 14336): 1024, (16384, 53248): 4096}
    for hidden, ffn in [*releases, (2048, 8192), (48, 52), (7, 100003), (8, 3), (1, 1)]:
        multiple_of, multiplier = params_json.find_ffn_rule(hidden, ffn)
        stated = {"dim": hidden, "multiple_of": multiple_of}
        stated |= {} if multiplier is None else {"ffn_dim_multiplier": multiplier}
        assert fairscale_model.ffn_size(stated) == ffn, (hidden, ffn)
    assert params_json.find_ffn_rule(8192, 28672) == (4096, 1.3)
    assert params_json.find_ffn_rule(4096, 11008) == (256, None)


def test_models_that_metas_code_computes_differently_are_refused(tmp_path):
    llama3 = {**params_json.LLAMA31_SCALING, "rope_theta": 500000.0}
    cases = {
        "head_dim": {},
        "q_bias": {"model_type": "qwen2", **PLAIN},
        "sliding_window": {"model_type": "mistral", "sliding_window": 8, **PLAIN},
        "rope_scaling": {"rope_parameters": {**llama3, "factor": 32.0}, **PLAIN},
    }
    for number, (part, changes) in enumerate(cases.items()):
        _, folder = hf_models.saved(tmp_path / str(number), changes.pop("model_type", "llama"), **changes)
        with pytest.raises(CheckpointError) as error:
            convert(formats.open(folder), tmp_path / "meta", "fairscale")
        assert any(part in f"{problem.where} {problem.found}" for problem in error.value.problems)
    _, folder = hf_models.saved(tmp_path / "scaled", rope_parameters=llama3, **PLAIN)
    convert(formats.open(folder), tmp_path / "meta", "fairscale")
    assert json.loads((tmp_path / "meta" / "params.json").read_text())["use_scaled_rope"] is True
    hf_models.assert_same(formats.open(tmp_path / "meta"), formats.open(folder))
    # A config.json beside params.json decides the rope scaling: Llama 3.2's factor is larger than in Meta's code.
    _, other = hf_models.saved(tmp_path / "3.2", rope_parameters={**llama3, "factor": 32.0}, **PLAIN)
    (tmp_path / "meta" / "dims.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        formats.open(tmp_path / "meta")
    assert error.value.problems[0].where == f"{tmp_path / 'meta' / 'dims.json'}"
    (tmp_path / "meta" / "dims.json").unlink()
    (tmp_path / "meta" / "config.json").write_bytes((other / "config.json").read_bytes())
    hf_models.assert_same(formats.open(tmp_path / "meta"), formats.open(other))
    for scaling in ({"rope_type": "linear", "factor": 8.0}, {**llama3, "original_max_position_embeddings": 4096}):
        config = json.loads((other / "config.json").read_text())
        config["rope_parameters"] = {**scaling, "rope_theta": 500000.0}
        (tmp_path / "meta" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="use_scaled_rope"):
            formats.open(tmp_path / "meta")
    for layout, where, result in [({"pp": 2}, "pp", "2"), ({"tp": 4}, "tp = 4", "num_kv_heads = 2")]:
        with pytest.raises(ConfigError) as error:
            convert(formats.open(folder), tmp_path / "other", "fairscale", WriteOptions(**layout))
        assert (where, result) in [(problem.where, problem.found) for problem in error.value.problems]


def test_a_release_without_our_files(tmp_path):
    """params.json, tensors and the tokenizer in the folder above are all there is."""
    text = tmp_path / "text"
    text.write_text("\n".join(f"the quick brown fox number {n} jumps over {n * n} lazy dogs" for n in range(200)))
    above = tmp_path / "release"
    above.mkdir()
    # As Llama 2's was.
    rules = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(above / "tokenizer"), vocab_size=330, minloglevel=2, **rules
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(above / "tokenizer.model"))
    _, folder = hf_models.saved(tmp_path / "hf", **PLAIN, vocab_size=330, rope_theta=10000.0)
    convert(formats.open(folder), above / "small", "fairscale", WriteOptions(tp=2, extra={"embedding": "features"}))
    for file in ("dims.json", "manifest.json"):
        (above / "small" / file).unlink()
    params = json.loads((above / "small" / "params.json").read_text())
    assert "rope_theta" not in params
    (above / "small" / "params.json").write_text(json.dumps({**params, "vocab_size": -1, "max_seq_len": 64}))
    reader = formats.open(above / "small")
    assert reader.carried == {"bos_token_id": 1, "eos_token_id": 2}
    convert(reader, tmp_path / "back", "hf")
    hf_models.assert_same(formats.open(tmp_path / "back"), formats.open(folder))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 2
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back")
    again = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "back" / "tokenizer.model"))
    for words in ("the lazy fox jumps over 144 dogs", "Grüße 世界\n\tx"):
        assert again.encode(words) == tokenizer.encode(words)
        assert theirs(words).input_ids == [1, *tokenizer.encode(words)]
        assert theirs.decode(tokenizer.encode(words)) == words


PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5}


def test_every_key_of_a_release_is_known_or_refused(tmp_path):
    """Llama 4, quantised and multimodal releases, and Mistral's files of the same name."""
    path = tmp_path / params_json.PARAMS

    def refused(accept=(), **changes):
        path.write_text(json.dumps(PARAMS | changes))
        try:
            params_json.load_params(path, AcceptedKeys(accept))
        except CheckpointError as error:
            return [problem.where for problem in error.problems]
        return []

    llama32 = {"ffn_dim_multiplier": 1.5, "multiple_of": 256, "n_kv_heads": 2, "rope_theta": 5e5, "vocab_size": 128256}
    assert not refused(**llama32, use_scaled_rope=True)
    assert not refused(head_dim=16, hidden_dim=96, rope_theta=1e6, max_seq_len=32768, sliding_window=None, moe=None)
    changes = {
        "moe_args": {"num_experts": 16}, "nope_layer_interval": 4, "attention_chunk_size": 8192, "use_qk_norm": True,
        "rope_scaling_factor": 16, "quantization_args": {"scheme": "int4"}, "lora_args": {"rank": 16},
        "vision_chunk_size": 448, "vision_num_cross_attention_layers": 8, "moe": {"num_experts": 8},
        "sliding_window": 4096, "quantization": {"qformat_weight": "fp8"}, "yarn": {"factor": 16}, "causal": False,
    }  # fmt: skip
    for key, value in changes.items():
        assert refused(**{key: value}) == [key]
        assert refused((key,), **{key: value}) == [key]
    for key in ("n_heads", "multiple_of", "ffn_dim_multiplier", "hidden_dim", "tied_embeddings", "use_scaled_rope"):
        assert refused(**{key: "8"}) == [key]
    assert refused(a_new_key=3) == ["a_new_key"]
    assert not refused(("a_new_key",), a_new_key=3)


def test_params_json_agrees_with_the_sizes_beside_it(tmp_path):
    _, folder = hf_models.saved(tmp_path / "hf", **PLAIN)
    convert(formats.open(folder), tmp_path / "meta", "fairscale")
    path = tmp_path / "meta" / params_json.PARAMS
    params = json.loads(path.read_text())
    stated = {"head_dim": 8, "hidden_dim": 52, "max_seq_len": 64, "tied_embeddings": False}
    path.write_text(json.dumps(params | stated))
    formats.open(tmp_path / "meta")
    wrong = {"head_dim": 16, "hidden_dim": 64, "max_seq_len": 128, "tied_embeddings": True, "multiple_of": 32}
    wrong |= {"norm_eps": 0.5, "rope_theta": 7.0, "use_scaled_rope": True}
    for key, value in wrong.items():
        path.write_text(json.dumps(params | {key: value}))
        with pytest.raises(CheckpointError) as error:
            formats.open(tmp_path / "meta")
        (problem,) = error.value.problems
        assert problem.where.startswith(f"{params_json.PARAMS}: {key}")
