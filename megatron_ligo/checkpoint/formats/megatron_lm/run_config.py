"""YAML files that state the fields of Megatron-core's TransformerConfig and GPTModel beside a distributed checkpoint.

DIR/run_config.yaml             Megatron-Bridge's, in its section `model`
DIR/../context/model.yaml       NeMo's, in its section `config`, where DIR is weights/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_ligo.checkpoint.formats.megatron_lm.argument_parsing import RunArguments
from megatron_ligo.checkpoint.formats.megatron_lm.rope_arguments import LLAMA3_CONSTANTS
from megatron_ligo.checkpoint.io import plain_yaml
from megatron_ligo.common.errors import CheckpointError, Problem

NEMO_TOKENIZER = "nemo_tokenizer"
FILE, SECTION = "run_config.yaml", "model"
NEMO_FILE, NEMO_SECTION, NEMO_WEIGHTS = "context/model.yaml", "config", "weights"
# Real ones have a few thousand values.
MAX_VALUES = 100_000
MAX_NESTING = 16
TARGET, CALL = "_target_", "_call_"
# The classes whose models are Megatron-core's GPTModel under the stated fields, and nothing else.
MODELS = (
    "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "megatron.bridge.models.gpt.gpt_builder.GPTModelConfig",
    "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig",
    "megatron.training.models.gpt.GPTModelConfig",
)
# The start of the names of more such classes: one per published size.
MODEL_PREFIXES = (
    *(
        f"megatron.bridge.models.{name}Model"
        for name in (
            "llama.llama_provider.Llama", "llama.llama_provider.Llama2", "llama.llama_provider.Llama3",
            "llama.llama_provider.Llama31", "llama.llama_provider.Llama32", "llama.llama_provider.CodeLlama",
            "mistral.mistral_provider.Mistral", "mistral.mistral_provider.MistralSmall3",
            "qwen.qwen_provider.Qwen2", "qwen.qwen_provider.Qwen25",
        )
    ),
    *(
        f"nemo.collections.llm.gpt.model.{name}Config"
        for name in (
            "base.GPT", "llama.Llama", "llama.Llama2", "llama.Llama3", "llama.Llama31", "llama.Llama32",
            "llama.CodeLlama", "mistral.Mistral", "mistral.MistralNeMo", "qwen2.Qwen2", "qwen2.Qwen25",
        )
    ),
)  # fmt: skip
# Fields of the classes of Llama 3.1 and 3.2 in place of rope_scaling -> what Megatron-core calls them.
LLAMA3_FIELDS = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}
LLAMA3_CLASSES = ("Llama31", "Llama32")
TRANSFORMER_CONFIG = "megatron.core.transformer.transformer_config.TransformerConfig"
# The field of a model's class that holds the TransformerConfig, since Megatron-core 0.19.
TRANSFORMER = "transformer"
# Fields under other names than Megatron-LM's.
MEGATRON_LM_NAMES = {
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "seq_length": "max_position_embeddings",
}


def find_nemo_weights(path: Path) -> Path | None:
    """Returns the folder of the tensors of NeMo's checkpoint DIR, which has a folder context/ too; None for another."""
    is_nemos = (path / NEMO_FILE).parent.is_dir() and (path / NEMO_WEIGHTS).is_dir()
    return path / NEMO_WEIGHTS if is_nemos else None


def find_nemo_tokenizers(folder: Path) -> list[Path]:
    """Returns the folders with a tokenizer's files beside the folder of NeMo's tensors."""
    context = (folder.parent / NEMO_FILE).parent
    places = [context / NEMO_TOKENIZER, context] if folder.name == NEMO_WEIGHTS else []
    return [place for place in places if place.is_dir()]


def find_arguments(folder: Path, vocab_rows: int | None = None) -> RunArguments | None:
    """Returns the model's fields that a file beside a checkpoint states, by Megatron-LM's names as well.

    vocab_rows: of the embedding, padded; NeMo's file need not state them. Returns None if there is no such file. Raises
    CheckpointError for one that is damaged, or that names a class which computes something else.
    """
    for path, section in _find_files(folder):
        model = _load_model(path, section)
        where = f"the section {section} of {path}"
        target = _take_target(model, where, MODELS, MODEL_PREFIXES)
        nested = model.pop(TRANSFORMER, None)
        if isinstance(nested, dict):
            _take_target(nested, f"{where}: {TRANSFORMER}", (TRANSFORMER_CONFIG,), ())
            repeated = sorted(set(nested) & set(model))
            if repeated:
                raise CheckpointError(Problem(where, f"each field once, or in {TRANSFORMER}", f"{repeated[0]} twice"))
            model |= nested
        for name, megatron_lm_name in MEGATRON_LM_NAMES.items():
            if name in model:
                model.setdefault(megatron_lm_name, model[name])
        if target.rpartition(".")[2].startswith(LLAMA3_CLASSES) and LLAMA3_FIELDS.keys() <= model.keys():
            _take_llama3_scaling(model, where)
        if section == NEMO_SECTION and vocab_rows and model.get("vocab_size") is None:
            model["padded_vocab_size"] = vocab_rows
        return RunArguments(model, where, is_length_of_training=True)
    return None


def _find_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yields the files that state a model, each with the name of its section."""
    roots = [folder, *([folder.parent] if folder.name == NEMO_WEIGHTS else [])]
    candidates = [(folder / FILE, SECTION), *((root / NEMO_FILE, NEMO_SECTION) for root in roots)]
    return ((path, section) for path, section in candidates if path.is_file())


def _take_llama3_scaling(model: dict[str, object], where: str) -> None:
    """Replaces the scaling of the rotary positions by Megatron-LM's arguments. Raises CheckpointError if it is none."""
    scaling = {key: model.pop(name) for name, key in LLAMA3_FIELDS.items()}
    for name, key in LLAMA3_FIELDS.items():
        if key in LLAMA3_CONSTANTS and scaling[key] != LLAMA3_CONSTANTS[key]:
            raise CheckpointError(Problem(f"{where}: {name}", LLAMA3_CONSTANTS[key], repr(scaling[key])))
    model |= {"use_rope_scaling": True, "rope_scaling_factor": scaling["factor"]}


def _load_model(path: Path, section: str) -> dict[str, object]:
    """Returns a section, each reference to a function or a class in it as that one's name."""
    config = plain_yaml.load(path)
    model = config.get(section) if isinstance(config, dict) else None
    if not isinstance(model, dict) or not all(isinstance(name, str) for name in model):
        raise CheckpointError(Problem(f"{path}", f"a section {section} with the model's fields", type(model).__name__))
    budget = [MAX_VALUES]
    return {name: _simplify(value, budget, f"{path}: {name}") for name, value in model.items()}


def _simplify(value: object, budget: list[int], where: str, depth: int = 0) -> object:
    """Returns a value with names in place of references. Raises CheckpointError for one that is too large or deep."""
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_NESTING:
        raise CheckpointError(Problem(where, f"{MAX_VALUES} values in {MAX_NESTING} levels at most", "more"))
    if isinstance(value, dict):
        if set(value) == {TARGET, CALL} and value[CALL] is False:
            return value[TARGET]
        return {name: _simplify(item, budget, where, depth + 1) for name, item in value.items()}
    if isinstance(value, list):
        return [_simplify(item, budget, where, depth + 1) for item in value]
    return value


def _take_target(fields: dict[str, object], where: str, names: tuple[str, ...], prefixes: tuple[str, ...]) -> str:
    """Takes the class's name out of its fields. Raises CheckpointError for a class that is not known."""
    target = fields.pop(TARGET, names[0])
    if not isinstance(target, str) or (target not in names and not target.startswith(prefixes)):
        expected = f"{names[0]} or another known class"
        raise CheckpointError(Problem(f"{where}: {TARGET}", expected, repr(target)))
    return target
