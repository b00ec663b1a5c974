"""Measures each model family on a tiny random model of it: formats there and back, and growth without a loss.

A model is written as a Hugging Face folder, converted to each format and back, grown to ragged sizes (where its norms
allow them), and run by transformers' own class from the folders' own configs, in fp32. What was fitted and pretrained
in shards is read from the reports of the tests (`pytest --junitxml FILE`), which need processes of their own.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from pathlib import Path

HELP = "every model family: its file, its formats there and back, its lossless growth on transformers' logits"
SIZES = {
    "num_layers": 3, "hidden_size": 24, "ffn_size": 28, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4,
    "vocab_size": 37, "max_positions": 64, "norm_eps": 1e-6, "rope_base": 1e4,
}  # fmt: skip
RAGGED = {"num_layers": 5, "hidden_size": 32, "ffn_size": 44, "num_heads": 8, "num_kv_heads": 4}
# LayerNorms keep their mean and variance at whole multiples only.
DOUBLE = {"num_layers": 5, "hidden_size": 48, "ffn_size": 44, "num_heads": 12, "num_kv_heads": 6}
ALTERNATE = {"sliding_window": 5, "window_layers": (True, False, True)}
ALL_HEADS = {"num_kv_heads": 6}
TANH_GELU = {"activation": "gelu_pytorch_tanh"}
ENCODER = {
    "activation": "gelu",
    "rope_base": None,
    "tied": True,
    "num_token_types": 2,
    "max_positions": 20,
    **ALL_HEADS,
}
IMAGES = {
    "activation": "gelu", "rope_base": None, "image_size": 12, "patch_size": 3, "num_channels": 2, "vocab_size": 5,
    "qkv_bias": True, "has_head": True, **ALL_HEADS,
}  # fmt: skip
PARALLEL = {"parallel_residual": True}
GEMMA = {**TANH_GELU, "tied": True}
# Fields of ModelConfig in which a family's model differs from `SIZES`.
OWN: dict[str, dict[str, object]] = {
    "arcee": {"activation": "relu2"},
    "bert": ENCODER,
    "dinov2": {**IMAGES, "has_mask_token": True, "max_positions": 17, "ffn_size": 48},
    "dinov2_with_registers": {**IMAGES, "num_registers": 2, "max_positions": 17, "ffn_size": 48},
    "cohere": {**PARALLEL, "logits_multiplier": 0.7, "tied": True},
    "cohere2": {
        **PARALLEL, **ALTERNATE, "rope_layers": (True, False, True), "logits_multiplier": 0.7, "tied": True,
    },
    "falcon": {**PARALLEL, "activation": "gelu", "tied": True},
    "phi": {**PARALLEL, "activation": "gelu_new", "rotary_fraction": 0.5},
    "deit": {**IMAGES, "has_distillation": True, "max_positions": 18},
    "exaone4": {**ALTERNATE, "rope_layers": (True, False, True)},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, **ALTERNATE, "attention_scale_dim": 9, "attention_softcap": 2.0, "logits_softcap": 3.0},
    "gemma3": {
        **GEMMA, **ALTERNATE, "model_type": "gemma3_text", "attention_scale_dim": 9, "window_rope_base": 100.0,
    },
    "glm4": {"rotary_fraction": 0.5, "qkv_bias": True},
    "gpt2": {"activation": "gelu_new", "rope_base": None, "tied": True, **ALL_HEADS},
    "gpt_neox": {"activation": "gelu", "rotary_fraction": 0.5, "parallel_residual": True, **ALL_HEADS},
    "granite": {"embedding_multiplier": 6.0, "residual_multiplier": 0.7, "attention_scale": 0.3, "logits_divisor": 2.0},
    "granite_swa": {
        "embedding_multiplier": 6.0, "residual_multiplier": 0.7, "attention_scale": 0.3, "logits_divisor": 2.0,
        **ALTERNATE, "rope_layers": (True, True, False),
    },
    "llama4_text": {
        "attention_chunk": 5, "chunk_layers": (True, False, True), "rope_layers": (True, False, True),
        "l2_normalises_heads": True, "query_scaling_beta": 0.5, "query_scaling_length": 4,
    },
    "ministral3": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
        "query_scaling_beta": 0.5,
    },
    "modernbert": {
        "activation": "gelu", "tied": True, "sliding_window": 5, "window_layers": (False, True, True),
        "window_rope_base": 500.0, **ALL_HEADS,
    },
    "mixtral": {"num_experts": 3, "top_k": 2, "renormalises_routing": True},
    "nemotron": {"activation": "relu2", "rotary_fraction": 0.5},
    "olmo3": {**ALTERNATE, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "window_rope_base": 1e4},
    "olmoe": {"num_experts": 3, "top_k": 2, **ALL_HEADS},
    "opt": {"activation": "relu", "rope_base": None, "position_offset": 2, "norm_eps": 1e-5, "tied": True, **ALL_HEADS},
    "phi3": {"rotary_fraction": 0.5, "sliding_window": 5},
    "qwen2_moe": {"num_experts": 3, "top_k": 2, "qkv_bias": True, "shared_expert_ffn_size": 20},
    "qwen3_moe": {"num_experts": 3, "top_k": 2},
    "roberta": {**ENCODER, "position_padding": 1},
    "seed_oss": {"qkv_bias": True, "output_bias": True},
    "smollm3": {"rope_layers": (True, False, True)},
    "stablelm": {"rotary_fraction": 0.5, "qkv_bias": True},
    "starcoder2": {**TANH_GELU, "sliding_window": 5, **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), True)},
    "vaultgemma": {**GEMMA, **ALTERNATE, "attention_scale_dim": 9, "attention_softcap": 2.0, "logits_softcap": 3.0},
    "vit": {**IMAGES, "max_positions": 17},
}  # fmt: skip
# DINOv2's config states the width of its feed-forward block as a multiple of its own.
GROWN = {
    "dinov2": {"ffn_size": 96},
    "dinov2_with_registers": {"ffn_size": 96},
    # Norms over all heads want the same ratio of query and key heads.
    "olmoe": {"num_kv_heads": 8},
}
# The tests that fit, and those that pretrain, one family in shards against one process. Their first parameter names it.
FITS = (
    "test_the_fit_is_exact_on_three_ranks",
    "test_layers_that_differ_are_exact_when_sharded",
    "test_other_decoders_are_exact_when_sharded",
)
PRETRAINING = ("test_pretraining_is_exact_on_three_ranks", "test_every_family_trains_as_one_process")
LAYOUT_WORDS = {"tp": "TP", "pp": "PP", "zero": "ZeRO ", "sequence_parallel": "SP"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", action="append", metavar="NAME", help="a file of arch/families (default: all)")
    parser.add_argument(
        "--tests", action="append", default=[], type=Path, metavar="FILE", help="a report of `pytest --junitxml FILE`"
    )
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="write the table as a page, too")


def measure(args: argparse.Namespace, folder: Path) -> dict:
    from megatron_ligo.arch import architectures, get

    names = args.family or list(architectures())
    layouts = list(_iter_layouts(args.tests))
    results: dict = {"what": "families", "families": {}}
    for name in names:
        arch = get(name)
        source = Path(inspect.getfile(sys.modules[f"megatron_ligo.arch.families.{name}"]))
        results["families"][name] = {
            "lines": len(source.read_text(encoding="utf-8").splitlines()),
            "reads_gguf": bool(arch.gguf_fields),
            **_measure_family(name, folder / name),
            "fit": sorted({layout for family, kind, layout in layouts if (family, kind) == (name, "fit")}),
            "pretraining": sorted({layout for family, kind, layout in layouts if (family, kind) == (name, "train")}),
        }
    if args.page:
        args.page.write_text(format_page(results), encoding="utf-8")
    return results


def _measure_family(name: str, folder: Path) -> dict:
    from megatron_ligo.checkpoint import formats, verify
    from megatron_ligo.checkpoint.convert import convert
    from megatron_ligo.common.errors import LigoError
    from megatron_ligo.config.run_config import LargeSection, OperatorSection
    from megatron_ligo.experiments.reference_logits import compare_reference_logits
    from megatron_ligo.export.grown_reader import GrownReader
    from megatron_ligo.growth.validation import build_initial_operator

    convert(_random_reader(family_config(name)), folder / "hf", "hf")
    source = formats.open(folder / "hf")
    there_and_back, refused = [], {}
    for to in formats.writers():
        try:
            if to != "hf":
                convert(source, folder / to, to)
            convert(formats.open(folder / to), folder / f"{to}_back", "hf")
        except LigoError as error:
            refused[to] = str(error).splitlines()[0]
            continue
        if verify.compare(source, formats.open(folder / f"{to}_back")).same:
            there_and_back.append(to)
    growth = growth_sizes(name)
    try:
        operator = build_initial_operator(source.model_config, LargeSection(**growth), OperatorSection())
        grown = GrownReader(operator, source)
        convert(grown, folder / "grown", "hf")
        compared = compare_reference_logits(source, formats.open(folder / "grown"))
        gap: object = compared.difference / compared.scale
    except LigoError as error:
        gap = str(error).splitlines()[0]
    return {"there_and_back": there_and_back, "refused": refused, "growth": growth, "gap": gap}


def family_config(name: str):
    """Returns the sizes of a family's tiny model (a ModelConfig)."""
    from megatron_ligo.arch import get
    from megatron_ligo.arch.model_config import ModelConfig

    arch = get(name)
    own = OWN.get(name, {})
    model_type = own.get("model_type", next(iter(arch.model_types)))
    parts = next(iter(arch.hf_classes(model_type).values()))
    return ModelConfig(**{"arch": name, "model_type": model_type, **SIZES, **dict.fromkeys(parts, True), **own})


def growth_sizes(name: str) -> dict[str, int]:
    """Returns the sizes that a family's tiny model grows to: no whole multiples, where its norms allow it."""
    from megatron_ligo.arch import get

    arch = get(name)
    sizes = dict(RAGGED if arch.uses_rms_norm else DOUBLE)
    if "num_kv_heads" not in arch.hf_fields.values():
        sizes["num_kv_heads"] = sizes["num_heads"]
    if arch.ffn_ratio_key:
        # It follows hidden_size.
        del sizes["ffn_size"]
    if not arch.pre_norm:
        # Norms after the sums have no lossless form in depth.
        sizes["num_layers"] = SIZES["num_layers"]
    return sizes | GROWN.get(name, {})


def _random_reader(model_config):
    import torch

    from megatron_ligo.arch.spec import Use
    from megatron_ligo.bench.synthetic_reader import SyntheticReader

    class RandomModel(SyntheticReader):
        """Weights of a spread that shows every part, and gains about 1."""

        def read(self, key: str, kind: str = "weight") -> torch.Tensor:
            tensor = super().read(key, kind)
            is_gain = self.param(key).axes[0].use is Use.GAIN
            return 1 - self.arch.gain_offset + 0.2 * tensor if is_gain else 0.15 * tensor

    return RandomModel(model_config)


def _iter_layouts(reports: list[Path]) -> Iterator[tuple[str, str, str]]:
    """Yields (family, "fit" or "train", layout) of every test of the reports that passed."""
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name, _, parameters = case.get("name", "").partition("[")
            has_failed = any(child.tag in ("failure", "error", "skipped") for child in case)
            if not has_failed and name in (*FITS, *PRETRAINING):
                family = re.split(r"[- \]]", parameters)[0].replace("qwen2", "llama")
                yield family, "fit" if name in FITS else "train", _describe_layout(name, parameters)


def _describe_layout(test: str, parameters: str) -> str:
    if "three_ranks" in test:
        return "TP3 SP" if test in FITS else "TP3"
    stated = dict(re.findall(r"'(\w+)': (\w+)", parameters))
    sizes = stated | {"sequence_parallel": ""}
    return " ".join(f"{word}{sizes[key]}" for key, word in LAYOUT_WORDS.items() if key in stated)


def format_text(results: Mapping) -> str:
    lines = []
    for name, family in results["families"].items():
        formats = ", ".join(family["there_and_back"]) + (", gguf (in)" if family["reads_gguf"] else "")
        lines.append(f"{name:<11} {family['lines']:>4} lines  {_describe_gap(family['gap']):<9} {formats}")
        for to, reason in family["refused"].items():
            lines.append(f"{'':<12}{to}: {reason}")
    return "\n".join(lines)


def _describe_gap(gap: object) -> str:
    return f"{gap:.1e}" if isinstance(gap, float) else f"refused: {gap}"


def format_page(results: Mapping) -> str:
    """Returns the table as Markdown: with the layouts of a fit and of pretraining if any test is reported."""
    families = results["families"]
    layouts = [kind for kind in ("fit", "pretraining") if any(family[kind] for family in families.values())]
    columns = ["family", "lines", "there and back", "grown to (layers x features)", "difference", *layouts]
    rows = [
        "# Families, as measured by `ligo bench families`",
        "",
        "One file of `megatron_ligo/arch/families` each. Formats: written and read back with the same bits. Growth:",
        "the largest difference of transformers' logits over their scale, in fp32, from 3 layers of 24 features,",
        "6 heads and 28 neurons to the sizes named."
        + " Fit and pretraining: layouts whose test passed." * bool(layouts),
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for name, family in families.items():
        formats = " ".join(family["there_and_back"]) + (" (gguf in)" if family["reads_gguf"] else "")
        growth = f"{family['growth']['num_layers']} x {family['growth']['hidden_size']}"
        tested = ["; ".join(family[kind]) or "-" for kind in layouts]
        cells = [name, str(family["lines"]), formats, growth, _describe_gap(family["gap"]), *tested]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"
