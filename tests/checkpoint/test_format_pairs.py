"""Bit-exact round trips for every pair of formats, every layout and every architecture that both formats support.

Formats and architectures come from their registries: a new one is tested without an edit here. What a format does not
support is listed here, so that one refusal more is a decision.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_ligo.arch import architectures
from megatron_ligo.arch.model_config import ModelConfig, implied_head_sizes, positions_per_image
from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.inspect import describe
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import LigoError
from tests.checkpoint import hf_models
from tests.checkpoint.write_watch import untouched

# Sizes that tensor parallelism does not split are odd multiples; five layers make unequal stages.
SIZES = {"num_layers": 5, "hidden_size": 48, "ffn_size": 52, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6}
VOCABULARY, POSITIONS, STEP = 37, 30, 7
IMAGE = {"image_size": 10, "patch_size": 3, "num_channels": 2}
# Every layout that the sizes allow; formats without a layout have the first only.
LAYOUTS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (4, 4))
# The models that a format cannot express; it must accept all others.
UNSUPPORTED: dict[str, Callable[[ModelConfig], bool]] = {
    "fairscale": lambda model_config: (
        model_config.arch != "llama"
        or model_config.qkv_bias
        or model_config.head_dim * model_config.num_heads > model_config.hidden_size
    ),
    "fsdp": lambda model_config: model_config.num_experts > 0,
    "torchtitan": lambda model_config: model_config.arch != "llama" or model_config.qkv_bias,
    "pipeline": lambda model_config: model_config.has_pooler or model_config.has_order_head,
    # Megatron-core's positions start at row 0, and its arguments know no chunks.
    "mcore": lambda model_config: model_config.position_offset > 0 or model_config.attention_chunk is not None,
    "megatron": lambda model_config: model_config.position_offset > 0 or model_config.attention_chunk is not None,
}
# Families that share their parameters' forms with these are converted in a ring only.
ALL_PAIRS = ("llama", "gpt2", "gpt_neox", "bert", "roberta", "vit", "deit")
# Of those, the ones whose pairs are all tried daily.
DAILY = ("llama", "gpt2", "vit")
# The formats whose moments a format stores: Megatron-core needs optimizer settings, which universal does not keep.
MOMENTS_STORED_FROM = {"mcore": ("memory", "mcore"), "universal": ("memory", "mcore", "universal")}


class RandomReader(Reader):
    """Random canonical tensors, with moments."""

    format = "memory"
    path = None
    step = STEP
    has_moments = True
    groups = tuple(
        {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay, "amsgrad": False} for decay in (0.1, 0.0)
    )

    def __init__(self, model_config: ModelConfig):
        self.model_config = model_config

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(self.param(key).shape(self.model_config), torch.float32)

    def read(self, key: str, kind: str = WEIGHT) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {kind}".encode()))
        return torch.randn(self.param(key).shape(self.model_config), generator=generator)


def sizes(model_type: str, **changes) -> ModelConfig:
    """Returns a small model of a family, with unusual values for every size that its config leaves free."""
    (arch,) = (arch for arch in architectures().values() if model_type in arch.model_types)
    free = set(arch.hf_fields.values())
    result = {**SIZES, "arch": arch.name, "model_type": model_type, "vocab_size": VOCABULARY, "norm_eps": 1e-3}
    result |= {"max_positions": POSITIONS} | arch.implied_sizes.get(model_type, {})
    following = implied_head_sizes(SIZES["hidden_size"], SIZES["num_heads"])
    result |= {name: value for name, value in following.items() if name not in free}
    result |= dict.fromkeys(next(iter(arch.model_types[model_type].values())), True)
    if "rope_base" in free:
        result["rope_base"] = 5000.0
    if "no_rope_layers" in arch.hf_pattern_keys.get(model_type, ()):
        result["rope_layers"] = (True, False, True, True, False)
    if "attention_scale_dim" in free:
        result["attention_scale_dim"] = 5
    if arch.needs_window:
        layers = (True, True, True, False, True)
        result |= {"sliding_window": 4, "window_layers": layers, "rope_layers": layers}
    if "attention_chunk" in free:
        layers = (True, False, True, True, True)
        result |= {"attention_chunk": 4, "chunk_layers": layers, "query_scaling_length": 8}
    if "attention_scale" in free:
        result["attention_scale"] = 0.3
    if arch.has_experts:
        result |= {"num_experts": 3, "top_k": 2}
    if "shared_expert_ffn_size" in free:
        result["shared_expert_ffn_size"] = 20
    if "position_padding" in free:
        result["position_padding"] = 2
    if "num_token_types" in free:
        result["num_token_types"] = 3
    if arch.ffn_ratio_key:
        result["ffn_size"] = 2 * SIZES["hidden_size"]
    if arch.choices:
        result |= {name: choices[0] for name, choices in arch.choices.items()}
    if "image_size" in free:
        result |= IMAGE | {"max_positions": positions_per_image(10, 3, result.get("has_distillation", False))}
    return ModelConfig(**{**result, **changes})


MODELS = {
    **{name: sizes(name) for arch in architectures().values() for name in arch.model_types},
    "tied": sizes("llama", tied=True),
    "another head size": sizes("llama", head_dim=10, tied=True),
}


def source(model: str) -> Reader:
    return RandomReader(MODELS[model])


def is_refused(format_name: str, model: str) -> bool:
    return format_name in UNSUPPORTED and UNSUPPORTED[format_name](MODELS[model])


def supporting_formats(model: str) -> list[str]:
    return [format_name for format_name in formats.writers() if not is_refused(format_name, model)]


def pairs(model: str, whole: bool) -> Iterable[tuple[str, str]]:
    """All pairs of formats, or each format with the next one."""
    format_names = supporting_formats(model)
    if whole:
        return itertools.product(format_names, repeat=2)
    return zip(format_names, [*format_names[1:], format_names[0]], strict=True)


def stores_moments(format_name: str, source: str = "memory") -> bool:
    return source in MOMENTS_STORED_FROM.get(format_name, ())


def assert_equals_source(reader: Reader, model: str, moments: bool) -> None:
    expected = source(model)
    assert reader.model_config == expected.model_config
    assert list(reader.keys()) == list(expected.keys())
    if moments:
        assert (reader.has_moments, reader.step) == (True, STEP)
    for key, kind in itertools.product(expected.keys(), (WEIGHT, *MOMENTS) if moments else (WEIGHT,)):
        assert hf_models.same_bits(reader.read(key, kind), expected.read(key, kind)), (key, kind)


@pytest.fixture(scope="module")
def workspace() -> Iterator[Path]:
    """A folder in memory where the machine has one: the speed of fsync does not matter here."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def layouts(workspace) -> Callable[[str], list[tuple[int, int]]]:
    """Returns the layouts that a format supports. One without pipelines must name pp in its error."""

    @cache
    def supported(format_name: str) -> list[tuple[int, int]]:
        if not formats.get(format_name).has_layout:
            return [(1, 1)]
        try:
            convert(source("llama"), workspace / "pipeline" / format_name, format_name, WriteOptions(pp=2))
        except LigoError as error:
            assert "pp" in str(error)
            return [layout for layout in LAYOUTS if layout[1] == 1]
        return list(LAYOUTS)

    return supported


@pytest.fixture(scope="module")
def write_once(workspace) -> Callable[[str, str, tuple[int, int]], Reader]:
    """Returns a reader of a model in a format and layout, which is written once."""

    @cache
    def reader(model: str, format_name: str, layout: tuple[int, int]) -> Reader:
        target = workspace / f"{model} {format_name} {layout}"
        convert(source(model), target, format_name, WriteOptions(tp=layout[0], pp=layout[1]))
        return formats.open(target)

    return reader


def test_each_layout_of_each_format(write_once, layouts):
    for format_name in supporting_formats("llama"):
        for tp, pp in layouts(format_name):
            reader = write_once("llama", format_name, (tp, pp))
            assert_equals_source(reader, "llama", stores_moments(format_name))
            if formats.get(format_name).has_layout:
                assert (reader.layout["tp"], reader.layout.get("pp", 1)) == (tp, pp)


@pytest.mark.parametrize(
    "model, whole",
    [
        *((model, model in DAILY) for model in MODELS),
        *(pytest.param(model, True, marks=pytest.mark.long) for model in ALL_PAIRS if model not in DAILY),
    ],
)
def test_pairs(model, whole, write_once, layouts, workspace):
    """Ordered pairs; each uses another pair of layouts."""
    for number, (first, second) in enumerate(pairs(model, whole)):
        one, other = layouts(first), layouts(second)
        reader = write_once(model, first, one[number % len(one)])
        tp, pp = other[(number // 2) % len(other)]
        target = workspace / f"{model} {first} {second}"
        convert(reader, target, second, WriteOptions(tp=tp, pp=pp))
        assert_equals_source(formats.open(target), model, stores_moments(first) and stores_moments(second, first))


@pytest.mark.parametrize("format_name", formats.writers())
def test_narrow_dtypes_are_kept(format_name, write_once, workspace):
    fixed = formats.get(format_name).stored_dtype
    convert(
        source("llama"), workspace / f"narrow {format_name}", format_name, WriteOptions(dtype=fixed or torch.bfloat16)
    )
    reader = formats.open(workspace / f"narrow {format_name}")
    for key in reader.keys():  # noqa: SIM118 - no dict
        assert hf_models.same_bits(reader.read(key), source("llama").read(key).to(fixed or torch.bfloat16)), key


def test_unsupported_models_are_refused(workspace):
    for format_name, model in itertools.product(formats.writers(), MODELS):
        if is_refused(format_name, model):
            with pytest.raises(LigoError):
                convert(source(model), workspace / f"refused {format_name} {model}", format_name)
                pytest.fail(f"{format_name} took {model}")


@pytest.mark.parametrize("format_name", formats.writers())
def test_a_source_is_never_opened_for_writing(format_name, write_once, layouts, workspace):
    reader = write_once("llama", format_name, layouts(format_name)[-1])
    with pytest.raises(AssertionError, match="written into"), untouched(reader.path):
        next(path for path in reader.path.rglob("*") if path.is_file()).open("r+b").close()
    with untouched(reader.path):
        convert(formats.open(reader.path), workspace / f"untouched {format_name}", format_name)
        describe(formats.open(reader.path))


@pytest.mark.parametrize("format_name", formats.writers())
def test_each_format_is_described_and_verified(format_name, write_once, layouts, workspace):
    reader = write_once("llama", format_name, layouts(format_name)[-1])
    summary = describe(reader)
    assert json.loads(json.dumps(summary)) == summary
    assert (summary["format"], len(summary["rows"])) == (format_name, 5 * 9 + 3)
    assert verify.check_manifest(reader).same
    assert verify.compare(reader, source("llama")).same
    inputs = verify.sample_inputs(reader.model_config, reader.model_config)
    assert torch.equal(verify.compute_logits(reader, inputs), verify.compute_logits(source("llama"), inputs))
    damaged = workspace / f"damaged {format_name}"
    shutil.copytree(reader.path, damaged)
    first_bytes = reader.read("layers.2.o").numpy().tobytes()[:8]
    (file,) = [path for path in damaged.rglob("*") if path.is_file() and first_bytes in path.read_bytes()]
    data = file.read_bytes()
    at = data.index(first_bytes)
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    (line,) = verify.check_manifest(formats.open(damaged)).differences
    # The files of torch.save have checksums of their own, which are looked at first.
    assert line.startswith("layers.2.o (weight): ") and ("digest" in line or "checksum" in line)
