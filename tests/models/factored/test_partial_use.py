"""A whole parameter that each tensor-parallel rank uses partially: its gradient is the sum over the ranks."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_ligo.arch.spec import Role
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_linears import NormTransform
from megatron_ligo.models.factored.map_parameters import MapParameters
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.models.mcore.layer_calls import sum_gradients
from tests.models.factored.fit_reference import make_operator
from tests.tiny_models import hf_llama, llama_config, memory_of

LARGE = {"hidden_size": 32, "num_heads": 8, "num_kv_heads": 4, "num_layers": 4}


def grown_gain_gradients(is_partial: bool) -> list[dict[str, float]]:
    """By rank, the gradients of a small gain and of the map that grows it; rank r weighs its use by r + 1."""
    small = llama_config(num_heads=4, num_kv_heads=2)
    operator = make_operator(small, LARGE, {"method": "ligo"})
    mesh = meshes.build_mesh(2, 1)
    source = SmallWeights(operator, memory_of(hf_llama(small), small), mesh, 1)
    context = FactoredContext(operator, source, mesh, torch.float32)
    spec = replace(operator.arch.get(Role.ATTENTION_NORM), partial_tp_use=is_partial)
    maps = MapParameters(operator, mesh, None)
    mixed = torch.ones(small.hidden_size, requires_grad=True)
    transform = NormTransform(context, [spec], 0, 1e-5, "RMSNorm")
    (gain,) = transform.build({spec.key: mixed}, maps.layout.matrices(maps(torch.float32)), torch.float32)
    ((mesh.tp_rank + 1) * gain.sum()).backward()
    gradients = {"mixed": float(mixed.grad.sum()), "map": float(maps.residual_expand.grad.sum())}
    return gathered(gradients)


def full_gradients() -> list[float]:
    """By rank, the summed gradient of a parameter whose use rank r weighs by r + 1."""
    mesh = meshes.build_mesh(2, 1)
    parameter = torch.nn.Parameter(torch.ones(3))
    sum_gradients([parameter], mesh.tp_group)
    ((mesh.tp_rank + 1) * parameter.sum()).backward()
    return gathered(float(parameter.grad.sum()))


def gathered(value) -> list:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def test_a_grown_gain_that_is_used_partially_has_its_gradient_summed(pools):
    own = pools(2).run(grown_gain_gradients, is_partial=False)
    summed = pools(2).run(grown_gain_gradients, is_partial=True)
    for name in ("mixed", "map"):
        assert own[1][name] == pytest.approx(2 * own[0][name])
        expected = pytest.approx(own[0][name] + own[1][name])
        assert summed[0][name] == expected and summed[1][name] == expected


def test_a_full_parameter_that_is_used_partially_has_its_gradient_summed(pools):
    assert pools(2).run(full_gradients) == [9.0, 9.0]
