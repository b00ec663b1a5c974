"""A real encoder of the package index: MiniLM-L6, in Megatron-core's modules and as it grows in the fit's."""

import pytest
import torch
from torch import nn

from megatron_ligo.checkpoint import formats
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_model import FactoredModel
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.models.full import parameters
from megatron_ligo.models.full.encoder import Encoder, EncoderEmbedding
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from tests import layer_norm_models


@pytest.fixture(scope="module")
def known():
    """(reader, token ids, the hidden states that transformers gives, about 1 in size)."""
    meshes.init_distributed()
    reader = formats.open(layer_norm_models.minilm())
    ids = torch.randint(1000, 30000, (2, 24), generator=torch.Generator().manual_seed(3))
    return reader, ids, layer_norm_models.outputs(reader, ids)


def test_hidden_states_are_those_of_transformers(known):
    reader, ids, expected = known
    mesh = meshes.build_mesh(1, 1)
    body = nn.ModuleDict(
        {
            "embedding": EncoderEmbedding(reader.model_config, BuildOptions(), mesh),
            "encoder": Encoder(reader.model_config, BuildOptions()),
        }
    )
    parameters.fill_parameters(body, reader.model_config, mesh, reader.read)
    with torch.no_grad():
        result = body["encoder"](body["embedding"](ids), recompute=False).transpose(0, 1)
    assert torch.allclose(result, expected, atol=2e-5)


def test_grown_to_twice_its_width_it_says_the_same(known):
    """Post-LN: at whole copies of all features, heads and neurons, and at its own depth."""
    reader, ids, expected = known
    large = LargeSection(hidden_size=768, num_heads=24, ffn_size=3072)
    operator = build_initial_operator(reader.model_config, large, OperatorSection())
    mesh = meshes.build_mesh(1, 1)
    model = FactoredModel(FactoredContext(operator, SmallWeights(operator, reader, mesh, 1), mesh, torch.float32))
    with torch.no_grad():
        h = model.embedding(model.shared(ids))
        for layer in model.layers:
            h = layer(h)
    assert torch.allclose(h.transpose(0, 1), expected.repeat(1, 1, 2), atol=2e-5)
