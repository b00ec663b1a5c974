"""Every pair of formats and every layout, there and back to the bit, for every architecture that both can carry.

What is written is found by looking into the folders of formats and architectures: a new one joins by itself. What a
format refuses is said here, so that one refusal more is a decision.
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
from megatron_ligo.arch.model_config import ModelConfig, implied_head_sizes, tokens_of_image
from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.inspect import describe
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import LigoError
from tests.checkpoint import hf_models
from tests.checkpoint.write_watch import untouched

# No power of two divides what tensor parallelism does not cut; five layers, so that stages differ.
SIZES = {"num_layers": 5, "hidden_size": 48, "ffn_size": 52, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6}
VOCABULARY, POSITIONS, STEP = 37, 30, 7
IMAGE = {"image_size": 10, "patch_size": 3, "num_channels": 2}
# Every layout of which the sizes allow a rank; those without LAYOUT have the first only.
LAYOUTS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4), (4, 4))
# What a format cannot say. Of the others every one is carried.
REFUSED: dict[str, Callable[[ModelConfig], bool]] = {
    "fairscale": lambda model_config: (
        model_config.arch != "llama"
        or model_config.qkv_bias
        or model_config.head_dim * model_config.num_heads > model_config.hidden_size
    ),
    "pipeline": lambda model_config: model_config.has_pooler or model_config.has_order_head,
}
# Whose moments a format stores: Megatron-core's asks for the settings of their optimizer, and universal keeps none.
CARRIED = {"mcore": ("memory", "mcore"), "universal": ("memory", "mcore", "universal")}


class Drawn(Reader):
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
    """A network of a family: every size that its config leaves free is odd somewhere."""
    (arch,) = (arch for arch in architectures().values() if model_type in arch.model_types)
    free = set(arch.hf_fields.values())
    found = {**SIZES, "arch": arch.name, "model_type": model_type, "vocab_size": VOCABULARY, "norm_eps": 1e-3}
    found |= {"max_positions": POSITIONS} | arch.implied_sizes.get(model_type, {})
    following = implied_head_sizes(SIZES["hidden_size"], SIZES["num_heads"])
    found |= {name: value for name, value in following.items() if name not in free}
    found |= dict.fromkeys(next(iter(arch.model_types[model_type].values())), True)
    if "rope_base" in free:
        found["rope_base"] = 5000.0
    if "num_token_types" in free:
        found["num_token_types"] = 3
    if arch.choices:
        found |= {name: choices[0] for name, choices in arch.choices.items()}
    if "image_size" in free:
        found |= IMAGE | {"max_positions": tokens_of_image(10, 3, found.get("has_distillation", False))}
    return ModelConfig(**{**found, **changes})


MODELS = {
    **{name: sizes(name) for arch in architectures().values() for name in arch.model_types},
    "tied": sizes("llama", tied=True),
    "another head size": sizes("llama", head_dim=10, tied=True),
}


def source(model: str) -> Reader:
    return Drawn(MODELS[model])


def refused(form: str, model: str) -> bool:
    return form in REFUSED and REFUSED[form](MODELS[model])


def carriers(model: str) -> list[str]:
    return [form for form in formats.writers() if not refused(form, model)]


def pairs(model: str) -> Iterable[tuple[str, str]]:
    """All of them for the first family of each network; for what differs from it, each format and the next one."""
    forms = carriers(model)
    if model == next(iter(architectures()[MODELS[model].arch].model_types)):
        return itertools.product(forms, repeat=2)
    return zip(forms, [*forms[1:], forms[0]], strict=True)


def carries_moments(form: str, source: str = "memory") -> bool:
    return source in CARRIED.get(form, ())


def assert_equal(found: Reader, model: str, moments: bool) -> None:
    expected = source(model)
    assert found.model_config == expected.model_config
    assert list(found.keys()) == list(expected.keys())
    if moments:
        assert (found.has_moments, found.step) == (True, STEP)
    for key, kind in itertools.product(expected.keys(), (WEIGHT, *MOMENTS) if moments else (WEIGHT,)):
        assert hf_models.same_bits(found.read(key, kind), expected.read(key, kind)), (key, kind)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """In memory where the machine has such a disk: how long fsync takes is not the question here."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def layouts(place) -> Callable[[str], list[tuple[int, int]]]:
    """The layouts that a format obeys. One without pipelines says so."""

    @cache
    def of(form: str) -> list[tuple[int, int]]:
        if not formats.get(form).has_layout:
            return [(1, 1)]
        try:
            convert(source("llama"), place / "pipeline" / form, form, WriteOptions(pp=2))
        except LigoError as error:
            assert "pp" in str(error)
            return [layout for layout in LAYOUTS if layout[1] == 1]
        return list(LAYOUTS)

    return of


@pytest.fixture(scope="module")
def written(place) -> Callable[[str, str, tuple[int, int]], Reader]:
    """A model as a format has it at a layout, written once."""

    @cache
    def reader(model: str, form: str, layout: tuple[int, int]) -> Reader:
        target = place / f"{model} {form} {layout}"
        convert(source(model), target, form, WriteOptions(tp=layout[0], pp=layout[1]))
        return formats.open(target)

    return reader


def test_each_layout_of_each_format(written, layouts):
    for form in carriers("llama"):
        for tp, pp in layouts(form):
            reader = written("llama", form, (tp, pp))
            assert_equal(reader, "llama", carries_moments(form))
            if formats.get(form).has_layout:
                assert (reader.layout["tp"], reader.layout.get("pp", 1)) == (tp, pp)


@pytest.mark.parametrize("model", MODELS)
def test_pairs(model, written, layouts, place):
    """Ordered pairs, each at one pair of layouts, other ones each time."""
    for number, (first, second) in enumerate(pairs(model)):
        one, other = layouts(first), layouts(second)
        reader = written(model, first, one[number % len(one)])
        tp, pp = other[(number // 2) % len(other)]
        target = place / f"{model} {first} {second}"
        convert(reader, target, second, WriteOptions(tp=tp, pp=pp))
        assert_equal(formats.open(target), model, carries_moments(first) and carries_moments(second, first))


@pytest.mark.parametrize("form", formats.writers())
def test_narrow_dtypes_stay_what_they_are(form, written, place):
    fixed = formats.get(form).stored_dtype
    convert(source("llama"), place / f"narrow {form}", form, WriteOptions(dtype=fixed or torch.bfloat16))
    found = formats.open(place / f"narrow {form}")
    for key in found.keys():  # noqa: SIM118 - no dict
        assert hf_models.same_bits(found.read(key), source("llama").read(key).to(fixed or torch.bfloat16)), key


def test_what_a_format_cannot_say_is_refused(place):
    for form, model in itertools.product(formats.writers(), MODELS):
        if refused(form, model):
            with pytest.raises(LigoError):
                convert(source(model), place / "refused", form)


@pytest.mark.parametrize("form", formats.writers())
def test_a_source_is_never_opened_for_writing(form, written, layouts, place):
    reader = written("llama", form, layouts(form)[-1])
    with pytest.raises(AssertionError, match="written into"), untouched(reader.path):
        next(path for path in reader.path.rglob("*") if path.is_file()).open("r+b").close()
    with untouched(reader.path):
        convert(formats.open(reader.path), place / f"untouched {form}", form)
        describe(formats.open(reader.path))


@pytest.mark.parametrize("form", formats.writers())
def test_each_format_is_described_and_verified(form, written, layouts, place):
    reader = written("llama", form, layouts(form)[-1])
    found = describe(reader)
    assert json.loads(json.dumps(found)) == found
    assert (found["format"], len(found["rows"])) == (form, 5 * 9 + 3)
    assert verify.check_manifest(reader).same
    assert verify.compare(reader, source("llama")).same
    assert verify.compare_logits(reader, source("llama"))[0] == 0
    damaged = place / f"damaged {form}"
    shutil.copytree(reader.path, damaged)
    wanted = reader.read("layers.2.o").numpy().tobytes()[:8]
    (file,) = [path for path in damaged.rglob("*") if path.is_file() and wanted in path.read_bytes()]
    data = file.read_bytes()
    at = data.index(wanted)
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    (line,) = verify.check_manifest(formats.open(damaged)).differences
    assert line.startswith("layers.2.o (weight): digest")
