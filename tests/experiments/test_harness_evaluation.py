"""Evaluation by lm-evaluation-harness, offline, on a text of one's own."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import megatron_ligo as ligo
from megatron_ligo.commands.studies import eval as command
from megatron_ligo.experiments import harness_evaluation
from tests.checkpoint import hf_models

TEXT = "one word after the other, and then a full stop. " * 3


def test_names_of_models(tmp_path):
    parsed = command._parse_models(["small=models/small", str(tmp_path / "grown")])
    assert {name: path.name for name, path in parsed.items()} == {"small": "small", "grown": "grown"}
    with pytest.raises(ligo.ConfigError, match="NAME=PATH"):
        command._parse_models(["a=x", "a=y"])


def test_the_table_has_a_column_for_each_model():
    results = {"small": {"t": {"acc": 0.5, "bits_per_byte": 1.25}}, "grown": {"t": {"acc": 0.25}, "u": {"f1": 1.0}}}
    lines = harness_evaluation.format_table({"results": results}).splitlines()
    assert [line.split() for line in lines] == [
        ["task", "metric", "small", "grown"],
        ["t", "bits_per_byte", "1.2500"],
        ["t", "acc", "0.5000", "0.2500"],
        ["u", "f1", "1.0000"],
    ]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the harness is installed")
def test_without_the_harness_there_is_one_error(tmp_path):
    with pytest.raises(ligo.ConfigError, match="lm_eval"):
        harness_evaluation.evaluate_models({}, tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


@pytest.mark.long
def test_bits_per_byte_of_a_text(tmp_path):
    """A lossless start has the small model's figures, which are those of transformers' own loss."""
    pytest.importorskip("lm_eval")
    tokenizer = Tokenizer(models.BPE({symbol: at for at, symbol in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    small, folder = hf_models.saved(tmp_path / "small", vocab_size=256, max_position_embeddings=256)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ligo.write_handoff(folder, tmp_path / "grown", num_layers=3, settings={"handoff.formats": ["universal"]})
    (tmp_path / "own text.txt").write_text(TEXT)
    record = harness_evaluation.evaluate_models(
        {"small": folder, "grown": tmp_path / "grown"}, tmp_path / "eval", texts=[tmp_path / "own text.txt"]
    )
    assert json.loads((tmp_path / "eval" / "eval.json").read_text()) == record
    figures = {name: results["text_own_text"]["bits_per_byte"] for name, results in record["results"].items()}
    assert figures["small"] == pytest.approx(figures["grown"], rel=1e-4)
    ids = torch.tensor([tokenizer.encode("!" + TEXT).ids])
    with torch.no_grad():
        loss = float(small(ids, labels=ids).loss) * (ids.shape[1] - 1)
    assert figures["small"] == pytest.approx(loss / math.log(2) / len(TEXT), rel=0.02)
