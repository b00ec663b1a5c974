"""What a model is trained on: images with labels, or text, masked where its family is trained to tell masked tokens."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import Dims
from megatron_ligo.arch.spec import Task
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.image_dataset import open_images
from megatron_ligo.data.masking import masking_of
from megatron_ligo.data.megatron_dataset import everywhere
from megatron_ligo.data.sampler import Dealt
from megatron_ligo.data.text_dataset import open_data


def open_feed(data: DataSection, dims: Dims, samples: int, held_out: int, output: Path, first: int = 0) -> Dealt:
    """What [data] names, for a run of so many training samples from sample `first` on. Collective: every rank calls it
    alike. output: the run's folder."""
    if architectures.get(dims.arch).task is Task.LABEL:
        return open_images(data, dims, held_out, first)
    cache = data.cache or output / "data_cache"
    masking = everywhere(lambda: masking_of(data, dims))
    opened = open_data(data, data.seq_length, samples, held_out, data.seed, cache, first, masking)
    opened.check_vocab(dims.vocab_size)
    return opened
