"""Logits of a checkpoint by the library whose format it is, from its own config: not by this program's reading of it.

A misreading that both sides of a comparison share shows no difference. So a Hugging Face folder is run by transformers
from its own config.json, a GGUF file by transformers' loader if that reads all of its keys, and a Megatron checkpoint
by a Megatron-core model built from its saved arguments. Other formats have no such program here: their logits are those
of this program's reading, and the result says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ligo.arch.architecture import Task
from megatron_ligo.checkpoint.formats.hf.config_json import CONFIG
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.verify import compute_logits, sample_inputs
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.experiments.megatron_reference import compute_megatron_logits

# Covers different attention kernels; equal weights usually give a difference of 0.
LOGIT_TOLERANCE = 5e-4
OUR_READING = "this program's reading, run by transformers"


@dataclass(frozen=True)
class LogitComparison:
    """The largest difference of two models' logits, and the scale: the largest |logit| of the first.

    origins: for each side, who computed it. compared: logits that were compared for each token.
    """

    difference: float
    scale: float
    compared: int
    origins: tuple[str, str]


def compare_reference_logits(a: Reader, b: Reader) -> LogitComparison:
    """Runs both models in fp32 on one batch.

    Of vocabularies of different sizes, the tokens that both have are compared: a grown vocabulary on its old rows.
    Raises CheckpointError if the outputs have different meanings.
    """
    inputs = sample_inputs(a.model_config, b.model_config)
    (first, our_origin), (second, their_origin) = reference_logits(a, inputs), reference_logits(b, inputs)
    texts = a.model_config.image_size is None and a.model_config.has_head and b.model_config.has_head
    count = min(first.shape[-1], second.shape[-1])
    if first.shape[:-1] != second.shape[:-1] or (first.shape != second.shape and not texts):
        raise CheckpointError(Problem("logits", f"shape {tuple(first.shape)}", tuple(second.shape)))
    difference = (first[..., :count] - second[..., :count]).abs().max()
    return LogitComparison(float(difference), float(first.abs().max()), count, (our_origin, their_origin))


def reference_logits(reader: Reader, inputs: Tensor) -> tuple[Tensor, str]:
    """Returns the logits of a checkpoint, (batch, length, vocab) or as `compute_logits` does, and who computed them.

    inputs: as `sample_inputs` draws them.
    """
    if reader.run_arguments is not None and reader.arch.task is Task.NEXT_TOKEN:
        try:
            logits = compute_megatron_logits(reader, reader.run_arguments, inputs)
            return logits, "a GPTModel of Megatron-core, from the checkpoint's args"
        except Exception as error:  # whatever Megatron-core raises, the checkpoint was read
            reason = f"Megatron-core does not build its args' model: {_first_line(error)}"
            return compute_logits(reader, inputs), f"{OUR_READING} ({reason})"
    model, origin = _load_reference(reader)
    if model is None:
        return compute_logits(reader, inputs), f"{OUR_READING} ({origin})" if origin else OUR_READING
    other_size = reader.model_config.image_size not in (None, inputs.shape[-1])
    with torch.no_grad():
        return model.eval()(inputs, **({"interpolate_pos_encoding": True} if other_size else {}))[0], origin


def _load_reference(reader: Reader) -> tuple[torch.nn.Module | None, str]:
    """Returns transformers' model of a checkpoint's own files, and who computes; None, and why, if there is none."""
    if reader.format == "hf":
        return _load_hf_folder(reader)
    if reader.format == "gguf":
        return _load_gguf(reader)
    return None, f"{reader.format} has no reference here" if reader.format else ""


def _load_hf_folder(reader: Reader) -> tuple[torch.nn.Module | None, str]:
    import transformers

    if reader.path is None or not (reader.path / CONFIG).is_file():
        return None, f"without {CONFIG}"
    folder = str(reader.path)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        names = config.architectures or [next(iter(reader.arch.model_types[reader.model_config.model_type]))]
        return _load(getattr(transformers, names[0]), folder), f"transformers, from {CONFIG}"
    except Exception as error:  # whatever transformers raises, the checkpoint was read
        return None, f"transformers does not load it: {_first_line(error)}"


def _load_gguf(reader: Reader) -> tuple[torch.nn.Module | None, str]:
    import transformers

    if reader.model_config.rope_scaling:
        return None, "transformers ignores the rope scaling of GGUF files"
    try:
        model = _load(transformers.AutoModelForCausalLM, str(reader.path.parent), gguf_file=reader.path.name)
    except Exception as error:  # whatever transformers raises, the checkpoint was read
        return None, f"transformers does not load it: {_first_line(error)}"
    return model, "transformers, from the file's metadata"


def _load(cls: type, folder: str, **options: str) -> torch.nn.Module:
    """Loads a model in fp32. Raises CheckpointError if transformers invents or ignores a tensor."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model, report = cls.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, output_loading_info=True, **options
    )
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(Problem(folder, f"no {kind.replace('_', ' ')}", sorted(map(str, report[kind]))[:3]))
    return model


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
