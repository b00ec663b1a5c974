"""Opens the training data of a model: labelled images, or text, which is masked for masked-LM models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.image_dataset import open_image_dataset
from megatron_ligo.data.masking import build_masking
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.data.text_dataset import open_text_dataset
from megatron_ligo.distributed.mesh import all_ranks


def open_dataset(
    section: DataSection,
    model_config: ModelConfig,
    num_train: int,
    num_valid: int,
    output: Path,
    first_sample: int = 0,
    tokenizers: Sequence[Path] = (),
) -> ShardedSampler:
    """Opens the data of a run that reads `num_train` training samples from `first_sample` on. Collective.

    output: the run's folder; sample indices are cached below it unless data.cache is set. tokenizers: the files of
    those that text may have been prepared with; (): any, but one for all.
    """
    if architectures.get(model_config.arch).reads_images:
        return open_image_dataset(section, model_config, num_valid, first_sample)
    cache = section.cache or output / "data_cache"
    masking = all_ranks().run_on_all(lambda: build_masking(section, model_config))
    dataset = open_text_dataset(
        section, section.seq_length, num_train, num_valid, section.seed, cache, first_sample, masking, tokenizers
    )
    dataset.check_vocab(model_config.vocab_size)
    return dataset
