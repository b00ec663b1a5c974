"""ViT, DeiT and DINOv2: the tables against the real models, there and back, growth, larger images."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_ligo.arch import get
from megatron_ligo.checkpoint import formats, inspect, verify
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection, RunConfig
from megatron_ligo.experiments.reference_logits import compare_reference_logits
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.export.handoff import grow_from_config
from megatron_ligo.growth.methods import METHODS
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests import image_models, layer_norm_models
from tests.checkpoint.hf_models import same_bits

# Without ffn_size DINOv2 keeps its ratio.
LARGER = LargeSection(hidden_size=48, ffn_size=100, num_heads=12, num_layers=5)


# By way of every other format.
CHAIN = ("universal", "mcore", "megatron", "pipeline", "deepspeed", "fsdp")
CHAINED = [("deit", "DeiTForImageClassification"), ("dinov2 with a gate", "Dinov2ForImageClassification")]


@pytest.mark.parametrize(("case", "name"), image_models.CLASSES)
def test_round_trip(tmp_path, case, name):
    model_config = image_models.image_config(case, name)
    arch = get(model_config.arch)
    assert arch.hf_class(model_config) == name
    model, folder = image_models.saved(tmp_path / "a", model_config)
    source = formats.open(folder)
    assert source.model_config == model_config
    expected = {name: item.shape(model_config) for name, item in stored_tensors(arch, model_config, "hf").items()}
    before = load_file(folder / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in before.items()} == expected
    last = source.path
    for form in (*(CHAIN if (case, name) in CHAINED else ()), "hf"):
        convert(formats.open(last), tmp_path / form, form)
        last = tmp_path / form
    after = load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(same_bits(before[key], after[key]) for key in before)
    seen = image_models.pictures(model_config)
    again = getattr(transformers, name).from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(again(seen)[0], model(seen)[0])
        assert torch.equal(verify.compute_logits(formats.open(last), seen), model(seen)[0])
    assert verify.compare(source, formats.open(last)).same
    assert "image_size=10" in inspect.to_text(inspect.describe(source))


def test_labels_keep_their_names(tmp_path):
    model, folder = image_models.saved(tmp_path / "a", image_models.image_config())
    model.config.id2label = dict(enumerate(("cat", "dog", "emu", "fox", "gnu")))
    model.config.label2id = {name: number for number, name in model.config.id2label.items()}
    model.config.save_pretrained(folder)
    operator = build_initial_operator(image_models.image_config(), LargeSection(vocab_size=7), OperatorSection())
    convert(GrownReader(operator, formats.open(folder)), tmp_path / "b", "hf")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    assert [config.id2label[number] for number in (0, 4, 5, 6)] == ["cat", "gnu", "LABEL_5", "LABEL_6"]
    assert (config.num_labels, config.label2id["LABEL_6"]) == (7, 6)


def edited(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_refusals(tmp_path):
    _, folder = image_models.saved(tmp_path / "a", image_models.image_config("deit"))
    with pytest.raises(CheckpointError, match="DeiTForImageClassificationWithTeacher"):
        formats.open(edited(folder, architectures=["DeiTForImageClassificationWithTeacher"]))
    for changes, word in (({"image_size": None}, "image_size"), ({"patch_size": 11}, "patch_size")):
        stated = config_json.to_hf_config(image_models.image_config(), {}, torch.float32)
        with pytest.raises(CheckpointError, match=word):
            config_json.parse_model_config({**stated, **changes}, "config.json")
    with pytest.raises(ConfigError, match="fairscale"):
        stored_tensors(get("vit"), image_models.image_config(), "fairscale")
    gpt2 = layer_norm_models.config_of("gpt2", "GPT2LMHeadModel")
    for small in (image_models.image_config(), gpt2):
        with pytest.raises(ConfigError) as error:
            build_initial_operator(small, LargeSection(image_size=9), OperatorSection())
        assert "large.image_size" in str(error.value)


def gap(family: str, large: LargeSection, settings: OperatorSection, **shown) -> float:
    """Largest difference of the logits in fp64, the small model looking at the large one's image."""
    if family not in ("vit", "deit"):
        large = replace(large, ffn_size=None)
    small = image_models.image_config(family)
    source = layer_norm_models.memory_of(layer_norm_models.model_of(small).double(), small)
    grown = GrownReader(build_initial_operator(small, large, settings), source)
    for key in grown.keys():  # noqa: SIM118
        assert grown.read(key).shape == grown.info(key).shape
    seen = image_models.pictures(grown.model_config).double()
    with torch.no_grad():
        before, after = layer_norm_models.built(source)(seen, **shown)[0], layer_norm_models.built(grown)(seen)[0]
    assert before.abs().max() > 0.1
    return float((before - after).abs().max())


@pytest.mark.parametrize("family", image_models.OWN)
def test_growth(family):
    assert gap(family, LARGER, OperatorSection()) < 1e-12
    if family not in ("vit", "deit"):
        # Its class interpolates positions without being told to.
        assert gap(family, LargeSection(hidden_size=48, num_heads=12, image_size=16), OperatorSection()) < 1e-6
        return
    for method in (name for name, method in METHODS.items() if method.is_lossless):
        assert gap(family, LARGER, OperatorSection(method=method)) < 5e-6, method
    assert gap(family, LARGER, OperatorSection(method="stack")) > 1e-2
    # Positions that are not interpolated are another model's.
    wide = {"image_size": 16, "hidden_size": 48, "num_heads": 12}
    assert gap(family, LargeSection(**wide), OperatorSection(), interpolate_pos_encoding=True) < 1e-12
    assert gap(family, LargeSection(image_size=21), OperatorSection(), interpolate_pos_encoding=True) < 1e-12


@pytest.mark.parametrize("method", ["ligo", "random"])
def test_every_method_grows_every_parameter(method):
    small = image_models.image_config("deit")
    source = layer_norm_models.memory_of(layer_norm_models.model_of(small), small)
    large = LargeSection(hidden_size=48, ffn_size=100, num_heads=12, num_layers=5, vocab_size=7, image_size=14)
    grown = GrownReader(build_initial_operator(small, large, OperatorSection(method=method)), source)
    assert all(grown.read(key).isfinite().all() for key in grown.keys())  # noqa: SIM118
    assert layer_norm_models.built(grown)(image_models.pictures(grown.model_config))[0].shape == (2, 7)
    # A fresh model sees a patch with all of its features.
    assert (grown.read("patch").flatten(1).abs().sum(dim=1) > 0).all()


def test_the_hand_off(tmp_path):
    """tools/grow.py's way: the grown model as transformers takes it, equal to the small one on a larger image."""
    model_config = image_models.image_config("deit")
    model, folder = image_models.saved(tmp_path / "small", model_config)
    table = {"small": {"path": str(folder)}, "large": {"hidden_size": 48, "num_heads": 12, "image_size": 13}}
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 10, "width": 10}}')
    assert [file.name for file in formats.open(folder).files] == ["preprocessor_config.json"]
    grow_from_config(RunConfig.from_dict(table), None, tmp_path / "grown")
    # It tells another size.
    assert not formats.open(tmp_path / "grown" / "hf").files
    grown = formats.open(tmp_path / "grown" / "hf")
    logits = compare_reference_logits(formats.open(folder), grown)
    assert logits.difference < 1e-6 * max(1.0, logits.scale)
    seen = image_models.pictures(grown.model_config)
    again = transformers.DeiTForImageClassification.from_pretrained(grown.path).eval()
    with torch.no_grad():
        assert torch.allclose(again(seen)[0], model(seen, interpolate_pos_encoding=True)[0], atol=1e-6)
