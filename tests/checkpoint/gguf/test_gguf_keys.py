"""GGUF metadata: every key of the package's list is classified, and each changed in turn never misleads in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import gguf
import pytest
import torch
from gguf.constants import Keys
from transformers import AutoModelForCausalLM
from transformers.integrations import GGUF_CONFIG_MAPPING

from megatron_ligo import arch as architectures
from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.gguf.metadata_keys import check_keys, classify
from megatron_ligo.checkpoint.formats.gguf.tokenizer_keys import KEYS, NAMED_TEMPLATE
from megatron_ligo.checkpoint.inspect import describe
from megatron_ligo.checkpoint.source_keys import NO_KEYS
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, LigoError
from tests.checkpoint.gguf.tiny_gguf import FAMILIES, LAYERS, REMOVED, SIZES, VOCAB, Type, model_config, tensors, write

LLAMA = architectures.get("llama")
# Keys that llama.cpp 0.5.0's computation of these networks follows, measured with that program: everything else that
# it reads of them is a size, which the tensors' shapes fix.
FOLLOWED_BY_LLAMA_CPP = {
    "attention.causal": (False,),
    "attention.layer_norm_rms_epsilon": (0.5, 2.0),
    "rope.freq_base": (0.5, 2.0),
    "rope.scale_linear": (0.5, 2.0),
    "rope.scaling.factor": (0.5, 2.0),
}
VALUES = (1, 2, 8, 0.5, 2.0, True, False, "x", [1] * LAYERS, [2, 1], [0.5] * LAYERS)


def package_keys(holder: type = Keys) -> Iterator[str]:
    for name, value in vars(holder).items():
        if isinstance(value, type):
            yield from package_keys(value)
        elif isinstance(value, str) and not name.startswith("__"):
            yield value.replace("{id}", "0").replace("{dense}", "dense_2").replace("{name}", "tool_use")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_package_is_classified(family):
    names = [key.replace("{arch}", family) for key in package_keys()]
    assert len(names) > 250
    assert [key for key in names if not classify(key, LLAMA, family)] == []
    of_tokenizers = [key for key in names if key.startswith("tokenizer.") and not key.startswith(NAMED_TEMPLATE)]
    assert [key for key in of_tokenizers if key not in KEYS] == []


def read_logits(path, inputs, cached={}):  # noqa: B006 - the cache
    """Returns the logits that our reading of a file gives, and the reader."""
    reader = formats.open(path)
    sizes = repr(reader.model_config)
    if sizes not in cached:
        cached[sizes] = verify.compute_logits(reader, inputs)
    return cached[sizes]


def perturb(tmp_path, family, values) -> tuple[Counter, list]:
    """Changes each key in turn; returns counts of what became of it, and the differences that nobody was told of.

    Where a file is accepted, transformers computes the same logits from it, if it reads that key at all; and each key
    that llama.cpp follows must have moved ours.
    """
    counts, silent = Counter(), []
    inputs = torch.randint(0, VOCAB, (1, 16), generator=torch.Generator().manual_seed(0))
    plain = read_logits(write(tmp_path / "plain.gguf", family), inputs)
    names = {key.replace("{arch}.", "") for key in package_keys() if key.startswith("{arch}")}
    names |= {key for key in package_keys() if not key.startswith(("{arch}", "tokenizer.", "split."))}
    names -= {"general.architecture"}
    for name in sorted(names | set(FOLLOWED_BY_LLAMA_CPP)):
        key = name if name in set(package_keys()) else f"{family}.{name}"
        for value in (*values, *FOLLOWED_BY_LLAMA_CPP.get(name, ())):
            path = write(tmp_path / "changed.gguf", family, {key: value})
            try:
                ours = read_logits(path, inputs)
            except LigoError:
                counts["refused"] += 1
                continue
            moved = not torch.allclose(ours, plain, atol=1e-5)
            counts["moved" if moved else "unmoved"] += 1
            if any(value is known for known in FOLLOWED_BY_LLAMA_CPP.get(name, ())) and not moved:
                silent.append((key, value, "llama.cpp"))
            if name not in GGUF_CONFIG_MAPPING[family]:
                continue
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
            with torch.no_grad():
                if not torch.allclose(theirs(inputs).logits, ours, atol=1e-4):
                    silent.append((key, value, "transformers"))
    return counts, silent


@pytest.mark.parametrize("family", FAMILIES)
def test_no_changed_key_misleads(tmp_path, family):
    counts, silent = perturb(tmp_path, family, (2,))
    assert silent == []
    assert counts["refused"] > 80 and counts["moved"] > 6


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_no_changed_key_misleads_with_any_value(tmp_path, family):
    counts, silent = perturb(tmp_path, family, VALUES)
    assert silent == []
    assert counts["refused"] > 1000


def problems_of(path, **options) -> list:
    with pytest.raises(CheckpointError) as error:
        formats.open(path, "gguf", **options)
    return list(error.value.problems)


def test_unknown_keys(tmp_path):
    path = write(tmp_path / "a.gguf", changes={"llama.warp": 0, "llama.weft": False, "llama.loom": ""})
    assert formats.open(path).accepted == {}
    changes = {"llama.warp": 3.0, "mistral.weft": [1, 2], "general.loom": "of the file", "tokenizer.ggml.new": 5}
    path = write(tmp_path / "b.gguf", changes=changes)
    assert {problem.where for problem in problems_of(path)} == {"llama.warp", "mistral.weft"}
    assert "--accept llama.warp" in problems_of(path)[0].hint
    reader = formats.open(path, accept=["llama.warp", "mistral.weft"])
    assert reader.accepted == {"llama.warp": 3.0, "mistral.weft": [1, 2]}
    assert describe(reader)["accepted"] == {"llama.warp": "3.0", "mistral.weft": "[1, 2]"}
    with pytest.raises(ConfigError):
        formats.open(path, accept=["llama.warp", "mistral.weft", "llama.woof"])
    # With experts it is Mixtral's network, which must say how many a token has.
    for name, missing in (("moe_every_n_layers", "moe_every_n_layers"), ("expert_count", "expert_used_count")):
        problems = problems_of(write(tmp_path / "c.gguf", changes={f"llama.{name}": 8}))
        assert [problem.where for problem in problems] == [f"llama.{missing}"]


@pytest.mark.parametrize("name", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
def test_sizes_layer_by_layer(tmp_path, name):
    size = SIZES[name]
    reader = formats.open(write(tmp_path / "a.gguf", changes={f"llama.{name}": [size] * LAYERS}))
    assert reader.model_config == formats.open(write(tmp_path / "b.gguf")).model_config
    (problem,) = problems_of(write(tmp_path / "c.gguf", changes={f"llama.{name}": [size, size // 2]}))
    assert problem.where == f"llama.{name}"
    assert problem.found == f"{size} in layer 0 and {size // 2} in layer 1"
    (problem,) = problems_of(write(tmp_path / "c.gguf", changes={f"llama.{name}": [size]}))
    assert problem.where == f"llama.{name}"


def test_the_scale_of_attention_may_be_stated(tmp_path):
    """It changes nothing where it is what follows from the head size."""
    for value in (8**-0.5, 0.0):
        reader = formats.open(write(tmp_path / "a.gguf", changes={"llama.attention.scale": value}))
        assert reader.model_config == model_config("llama")
    for value in (0.35, 8**-0.5 * 1.00001, -(8**-0.5), 1, True, "x"):
        (problem,) = problems_of(write(tmp_path / "a.gguf", changes={"llama.attention.scale": value}))
        assert problem.where == "llama.attention.scale"


def write_architecture(path, name):
    """Writes a file whose general.architecture has any value."""
    writer = gguf.GGUFWriter(path, "llama")
    del writer.kv_data[0]["general.architecture"]
    if name is not REMOVED:
        writer.add_key_value("general.architecture", *name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ["llama4", "starcoder", "gpt2", "mistral4"])
def test_other_networks_are_named(tmp_path, family):
    path = write_architecture(tmp_path / "a.gguf", (family, Type.STRING))
    with pytest.raises(CheckpointError, match=rf"llama or .*qwen2.*, found '{family}'. Its network differs") as error:
        formats.open(path, "gguf")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("name", [REMOVED, (7, Type.UINT32), (["llama"], Type.ARRAY), ("Llama", Type.STRING)])
def test_an_architecture_of_no_known_name(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"general\.architecture: expected .*llama or "):
        formats.open(write_architecture(tmp_path / "a.gguf", name), "gguf")


def test_the_vocabulary_must_agree(tmp_path):
    path = write(tmp_path / "a.gguf", changes={"llama.vocab_size": REMOVED, "tokenizer.ggml.tokens": ["a", "b"]})
    assert formats.open(path).model_config.vocab_size == VOCAB
    for size in (VOCAB - 1, VOCAB + 1, 2**40):
        (problem,) = problems_of(write(tmp_path / "b.gguf", changes={"llama.vocab_size": size}))
        assert (problem.where, problem.found) == ("llama.vocab_size", str(size))
        assert f"{VOCAB}, the rows of token_embd.weight" in problem.expected


BAD_SIZES = {
    "block_count": ("2", 0, 10**12, 1, 3, True, 2.0, [2]),
    "embedding_length": (33, "x", 2**40, -32),
    "attention.head_count": (0, 3, [4, 4, 4], 5, 1.5),
    "attention.head_count_kv": (0, "x", [4, 4, 4]),
    "attention.layer_norm_rms_epsilon": (float("nan"), float("inf"), -1.0, "x", 0.0),
    "rope.freq_base": (float("nan"), 0.0, -1.0, "x", float("inf")),
    "vocab_size": (299, "x", 0),
    "rope.dimension_count": (4, "x", 8.0, True),
    "attention.key_length": (4, 16, "x"),
    "attention.value_length": (4, 16, "x"),
    "context_length": (0, "x"),
    "rope.dimension_sections": ([2, 2],),
    "expert_count": (8, "x"),
}


@pytest.mark.parametrize("name", BAD_SIZES)
def test_sizes_that_do_not_fit(tmp_path, name):
    for value in BAD_SIZES[name]:
        problems_of(write(tmp_path / "a.gguf", changes={f"llama.{name}": value}))


@pytest.mark.parametrize("name", SIZES)
def test_missing_sizes(tmp_path, name):
    """A size that is left out is refused, or is what llama.cpp takes for it."""
    path = write(tmp_path / "a.gguf", changes={f"llama.{name}": REMOVED})
    if name == "vocab_size":
        assert formats.open(path).model_config.vocab_size == VOCAB
    elif name == "rope.freq_base":
        assert formats.open(path).model_config.rope_base == 10000.0
    else:
        problems_of(path)


def test_only_models_weights_are_read(tmp_path):
    for key, value in {"general.type": "adapter", "general.quantization_version": 1}.items():
        (problem,) = problems_of(write(tmp_path / "a.gguf", changes={key: value}))
        assert problem.where == key
    sizes = formats.open(write(tmp_path / "b.gguf", changes={"general.type": "model"})).model_config
    assert sizes == model_config("llama")


def test_the_manifest_records_accepted_keys(tmp_path):
    path = write(tmp_path / "a.gguf", changes={"llama.warp": 3.0})
    manifest = convert(formats.open(path, accept=["llama.warp"]), tmp_path / "hf", "hf")
    assert manifest.accepted == {"llama.warp": "3.0"}


def test_a_fixed_key_is_never_accepted():
    errors = ErrorCollector("keys")
    check_keys({"llama.attention.causal": False, "llama.logit_scale": 1.0}, LLAMA, "llama", NO_KEYS, errors)
    assert [problem.where for problem in errors.problems] == ["llama.attention.causal"]


def test_all_tensors_are_read(tmp_path):
    reader = formats.open(write(tmp_path / "a.gguf"))
    assert len(list(reader.keys())) == len(tensors("llama"))
