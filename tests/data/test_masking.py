"""Masked-LM samples, and a BERT trained on them end to end: fit, hand-off, pretraining, resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ligo.checkpoint import formats
from megatron_ligo.common.errors import ConfigError, DataError
from megatron_ligo.config.run_config import DataSection, RunConfig
from megatron_ligo.data.corpus.text_files import select_text_files
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.masking import build_masking
from megatron_ligo.data.prepare_text import TextRecipe, prepare_text
from megatron_ligo.data.text_dataset import open_text_dataset
from megatron_ligo.export import handoff, provenance
from tests import layer_norm_models
from tests.data.test_data import S, pairs  # noqa: F401
from tests.training.pretrain_runs import fit, pretrain
from tests.training.test_pretrain import losses_of, make_pair

ROOT = Path(__file__).resolve().parents[2]
MASK, FIRST, LAST = 4, 5, 6
BERT = layer_norm_models.config_of("bert", "BertForMaskedLM", vocab_size=50)
SECTION = DataSection(mask_token=MASK, ends=(FIRST, LAST), special_tokens=(0,), seq_length=S)


def test_predicted_tokens_are_80_percent_mask_10_percent_random_10_percent_unchanged():
    masking = build_masking(SECTION, BERT)
    text = torch.arange(1000) % 50
    counts = torch.zeros(3)
    for index in range(50):
        sample = masking.mask_sample(text, "train", index)
        tokens, labels, predicted = sample["tokens"], sample["labels"], sample["loss_mask"] > 0
        assert torch.equal(labels, torch.tensor([FIRST, *text.tolist(), LAST]))
        assert int(predicted.sum()) == round(0.15 * 1002)
        assert sample["loss_mask"].sum() == pytest.approx(1.0)
        assert torch.equal(tokens[~predicted], labels[~predicted])
        assert not set(labels[predicted].tolist()) & {0, MASK, FIRST, LAST}
        masked, unchanged = tokens[predicted] == MASK, tokens[predicted] == labels[predicted]
        replaced = tokens[predicted][~masked & ~unchanged]
        assert not set(replaced.tolist()) & {0, MASK, FIRST, LAST}
        counts += torch.tensor([masked.sum(), replaced.numel(), unchanged.sum()])
    # One in 46 random tokens is the original one.
    expected = torch.tensor([0.8, 0.1 * 45 / 46, 0.1 + 0.1 / 46])
    assert torch.allclose(counts / counts.sum(), expected, atol=0.012)


def test_masking_depends_on_the_seed_and_the_sample_alone(pairs, tmp_path):  # noqa: F811
    def open_masked(seed=1, cache="cache"):
        section = replace(SECTION, train=(pairs["a"],), valid=(pairs["valid"],), seed=seed)
        masking = build_masking(section, BERT)
        return open_text_dataset(section, S, 400, 16, section.seed, tmp_path / cache, masking=masking)

    (whole,) = open_masked().train_batch(3, 8, 8, 1, 0)
    assert whole["tokens"].shape == (8, S)
    for micro, dp in ((2, 1), (1, 2), (2, 4)):
        ranks = [open_masked(cache="other").train_batch(3, 8, micro, dp, rank) for rank in range(dp)]
        for name in ("tokens", "labels", "loss_mask"):
            dealt = torch.cat([ranks[rank][a][name] for a in range(len(ranks[0])) for rank in range(dp)])
            assert torch.equal(dealt, whole[name]), (name, micro, dp)
    assert not torch.equal(open_masked(seed=2).train_batch(3, 8, 8, 1, 0)[0]["tokens"], whole["tokens"])
    # The same text is masked differently when it repeats.
    masking, text = build_masking(SECTION, BERT), torch.arange(1, 40)
    first, again = (masking.mask_sample(text, "train", index)["loss_mask"] for index in (0, 400))
    assert not torch.equal(first, again)


def test_special_tokens_are_read_from_the_tokenizer():
    masking = build_masking(
        DataSection(tokenizer=str(layer_norm_models.minilm())), formats.open(layer_norm_models.minilm()).model_config
    )
    assert (masking.mask, masking.ends) == (103, (101, 102))
    assert masking.special == {0, 100, 101, 102, 103}


def test_unusable_settings_and_samples_are_refused():
    causal = layer_norm_models.config_of("gpt2", "GPT2LMHeadModel")
    assert build_masking(DataSection(), causal) is None
    with pytest.raises(ConfigError) as error:
        build_masking(DataSection(), BERT)
    assert [problem.where for problem in error.value.problems] == ["data.mask_token"]
    with pytest.raises(ConfigError) as error:
        build_masking(DataSection(mask_token=50, ends=(1,), seq_length=1), BERT)
    assert [problem.where for problem in error.value.problems] == ["data.ends", "special token", "data.seq_length"]
    masking = build_masking(DataSection(mask_token=MASK), layer_norm_models.config_of("roberta", "RobertaForMaskedLM"))
    with pytest.raises(DataError) as error:
        masking.mask_sample(torch.tensor([9, 2, 9]), "valid", 7)
    assert error.value.problems[0].where == "valid sample 7" and error.value.problems[0].found == "token 2"
    with pytest.raises(DataError) as error:
        masking.mask_sample(torch.tensor([MASK, MASK]), "train", 0)
    assert error.value.problems[0].where == "train sample 0"


def test_a_bert_is_fitted_grown_pretrained_and_resumed(pools, tmp_path):
    """The source has a pooler and a next-sentence head: they grow, and pretraining drops them."""
    for seed, name in enumerate(("train", "valid")):
        make_pair(tmp_path / name, seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 8}
    layer_norm_models.saved(tmp_path / "small", "bert", "BertForPreTraining", **sizes)
    table = RunConfig().to_dict()
    table["small"]["path"] = str(tmp_path / "small")
    table["large"] |= {"num_layers": 5, "hidden_size": 48, "num_heads": 12, "ffn_size": 60}
    table["data"] |= {"train": [str(tmp_path / "train")], "valid": [str(tmp_path / "valid")], "seq_length": 12}
    table["data"] |= {"mask_token": MASK, "ends": [FIRST, LAST], "special_tokens": [0, 1, 2]}
    table["operator"] |= {"noise": 0.5, "depth_init": "stack"}
    table["fit"] |= {"steps": 4, "lr": 1e-2, "save_every": 0, "micro_batch_size": 4}
    table["fit"]["parallel"] |= {"tp": 2, "pp": 2}
    table["pretrain"] |= {"start": str(tmp_path / "grown"), "steps": 4, "save_every": 2, "micro_batch_size": 4}
    table["pretrain"]["parallel"] |= {"tp": 2, "zero": 2}
    pools(4).run(fit, settings=table, output=str(tmp_path / "fit"))
    handoff.grow_from_config(RunConfig.from_dict(table), tmp_path / "fit" / "operator", tmp_path / "grown")
    whole = pools(2).run(pretrain, settings=table, output=str(tmp_path / "whole"))
    fitted = provenance.read(tmp_path / "grown")["fit"]["losses"]
    assert whole["losses"]["fit"] == fitted["end"]
    assert whole["losses"]["start_on_fit_batch"] == pytest.approx(fitted["end"], rel=1e-5)
    assert abs(fitted["end"] - fitted["start"]) > 1e-2
    killed = pools(2).run(pretrain, settings=table, output=str(tmp_path / "killed"), die_after=3)
    assert killed == {"killed": 3}
    resumed = pools(2).run(pretrain, settings=table, output=str(tmp_path / "killed"))
    assert losses_of(resumed) == losses_of(whole)
    assert resumed["losses"] == whole["losses"]
    trained = formats.open(tmp_path / "whole" / "checkpoints/step_4/state")
    assert (trained.model_config.has_head, trained.model_config.has_pooler) == (True, False)


def test_a_headless_encoder_gets_a_trained_head(pools, tmp_path):
    """Sentence encoders are published without the head that a fit's loss needs: only the new head is trained."""
    for seed, name in enumerate(("train", "valid")):
        make_pair(tmp_path / name, seed)
    layer_norm_models.saved(tmp_path / "small", "bert", "BertModel")
    table = RunConfig().to_dict()
    table["data"] |= {"train": [str(tmp_path / "train")], "valid": [str(tmp_path / "valid")], "seq_length": 12}
    table["data"] |= {"mask_token": MASK, "ends": [FIRST, LAST]}
    table["pretrain"] |= {"start": str(tmp_path / "small"), "steps": 4, "lr": 2e-3, "warmup_steps": 0, "save_every": 0}
    table["pretrain"]["parallel"] |= {"tp": 2}
    refused = pools(2).run(pretrain, settings=table, output=str(tmp_path / "refused"))
    assert "fresh_head = true" in refused
    table["pretrain"]["fresh_head"] = True
    headed = pools(2).run(pretrain, settings=table, output=str(tmp_path / "headed"))
    assert headed["losses"]["end"] < headed["losses"]["start"]
    before, after = formats.open(tmp_path / "small"), formats.open(tmp_path / "headed" / "checkpoints/step_4/state")
    assert after.model_config == replace(before.model_config, has_head=True, has_pooler=False)
    for key in after.keys():  # noqa: SIM118
        if key in set(before.keys()):
            assert torch.equal(after.read(key), before.read(key)), key
    assert after.read("head_bias").abs().max() > 0


@pytest.mark.long
def test_the_real_minilm_gets_a_head_and_is_fitted_and_grown(pools, tmp_path):
    """A masked-LM head is trained on the published encoder; a fit to twice its width uses its loss."""
    texts = DocumentSource(select_text_files([str(ROOT / "megatron_ligo" / "checkpoint" / "formats")]).files)
    prepare_text(TextRecipe(texts, str(layer_norm_models.minilm()), valid_fraction=0.3), tmp_path / "data", workers=1)
    table = RunConfig().to_dict()
    table["data"] |= {name: [str(tmp_path / "data" / name)] for name in ("train", "valid")} | {"seq_length": 32}
    table["data"]["tokenizer"] = str(layer_norm_models.minilm())
    table["pretrain"] |= {"start": str(layer_norm_models.minilm()), "fresh_head": True, "steps": 30, "lr": 1e-3}
    table["pretrain"] |= {"save_every": 0, "eval_samples": 8}
    headed = pools(1).run(pretrain, settings=table, output=str(tmp_path / "headed"))
    assert isinstance(headed, dict), headed
    assert headed["losses"]["end"] < headed["losses"]["start"] - 1
    table["small"]["path"] = str(tmp_path / "headed" / "checkpoints" / "step_30" / "state")
    table["large"] |= {"hidden_size": 768, "num_heads": 24, "ffn_size": 3072}
    table["fit"] |= {"steps": 4, "lr": 3e-4, "warmup_steps": 0, "keep": "last", "save_every": 0, "eval_samples": 8}
    table["fit"]["parallel"] |= {"tp": 2}
    pools(2).run(fit, settings=table, output=str(tmp_path / "fit"))
    handoff.grow_from_config(RunConfig.from_dict(table), tmp_path / "fit" / "operator", tmp_path / "grown")
    fitted = provenance.read(tmp_path / "grown")["fit"]["losses"]
    assert fitted["start"] == pytest.approx(headed["losses"]["end"], rel=1e-5)
    assert abs(fitted["end"] - fitted["start"]) > 1e-3
    table["pretrain"] |= {"start": str(tmp_path / "grown"), "fresh_head": False, "steps": 0}
    table["pretrain"]["parallel"] |= {"pp": 2}
    again = pools(2).run(pretrain, settings=table, output=str(tmp_path / "large"))
    assert again["losses"]["start_on_fit_batch"] == pytest.approx(fitted["end"], rel=1e-5)
