"""What DeepSpeed's own converter makes of an engine that trained a model of transformers."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch.distributed as dist

import megatron_ligo as ligo
from tests.checkpoint import hf_models

ARGUMENTS = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True,
             "inject_missing_state": True}  # fmt: skip


def train_and_convert(folder: str, zero: int) -> None:
    """Trains a model for two steps, saves the engine's checkpoint in `folder`/run and converts it to universal."""
    import deepspeed
    from deepspeed.checkpoint import ds_to_universal

    model = hf_models.model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    tokens = hf_models.tokens()[dist.get_rank()][None]
    for _ in range(2):
        engine.backward(engine(tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(f"{folder}/run")
    dist.barrier()
    if dist.get_rank() == 0:
        places = {"input_folder": f"{folder}/run/global_step2", "output_folder": f"{folder}/universal/global_step2"}
        ds_to_universal.main(argparse.Namespace(**places, **ARGUMENTS))
        for name in ("run", "universal"):
            model.config.save_pretrained(f"{folder}/{name}")
    dist.barrier()


@pytest.mark.parametrize("zero", [1, 3])
def test_deepspeeds_converter_of_a_transformers_model(pools, tmp_path, zero):
    """Weights, moments and step equal those of the engine's own checkpoint, which is read from other files."""
    pools(2).run(train_and_convert, folder=str(tmp_path), zero=zero)
    assert ligo.inspect(tmp_path / "run")["layout"]["zero"] == zero
    for place in ("universal", "universal/global_step2"):
        summary = ligo.inspect(tmp_path / place)
        assert (summary["format"], summary["step"], summary["moments"]) == ("universal", 2, True)
        # 21 weights, each with two moments.
        result = ligo.verify(tmp_path / "run", tmp_path / place)
        assert result.same and result.compared == 63
    ligo.convert(tmp_path / "universal", tmp_path / "hf", to="hf")
    assert ligo.verify(tmp_path / "hf", tmp_path / "run").same
    (tmp_path / "universal" / "config.json").unlink()
    with pytest.raises(ligo.CheckpointError, match=r"config\.json"):
        ligo.inspect(tmp_path / "universal")
    assert Path(tmp_path / "universal" / "latest_universal").is_file()
