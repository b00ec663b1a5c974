"""What a model is trained on: images with labels, or text, masked where its family is trained to tell masked tokens."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Task
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.image_dataset import open_image_dataset
from megatron_ligo.data.masking import build_masking
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.data.text_dataset import open_text_dataset
from megatron_ligo.distributed.mesh import all_ranks


def open_dataset(
    data: DataSection, model_config: ModelConfig, samples: int, held_out: int, output: Path, first: int = 0
) -> ShardedSampler:
    """What [data] names, for a run of so many training samples from sample `first` on. Collective: every rank calls it
    alike. output: the run's folder."""
    if architectures.get(model_config.arch).task is Task.LABEL:
        return open_image_dataset(data, model_config, held_out, first)
    cache = data.cache or output / "data_cache"
    masking = all_ranks().run_on_all(lambda: build_masking(data, model_config))
    opened = open_text_dataset(data, data.seq_length, samples, held_out, data.seed, cache, first, masking)
    opened.check_vocab(model_config.vocab_size)
    return opened
