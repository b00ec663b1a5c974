"""The divergence from the small model: its value against transformers', its gradient the same at any tp."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_model import FactoredModel
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.models.factored.teacher import Teacher
from tests.models.factored.fit_reference import make_operator
from tests.tiny_models import hf_from, hf_llama, llama_config, memory_of, tokens

WEIGHT = 0.4
LARGE = {"hidden_size": 32, "num_heads": 8, "num_kv_heads": 4, "num_layers": 4}


def taught(tp: int) -> dict[str, float]:
    """The blended loss, the loss of an evaluation, and the norm of the residual map's gradient."""
    small = llama_config(num_heads=4, num_kv_heads=2)
    operator = make_operator(small, LARGE, {"method": "noisy_stack"})
    mesh, reader = meshes.build_mesh(tp, 1), memory_of(hf_llama(small), small)
    teacher = Teacher(reader, mesh, torch.float32, WEIGHT, sequence_parallel=False)
    model = FactoredModel(
        FactoredContext(operator, SmallWeights(operator, reader, mesh, 1), mesh, torch.float32, teacher=teacher)
    )
    ids = tokens(small, batch=2, length=12)
    labels, mask = ids.roll(-1, dims=1), torch.ones(ids.shape)
    mask[0, :5] = 0
    loss = model(ids, labels, mask)
    loss.backward()
    gradient = model.shared_maps().residual_expand.grad.norm()
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "teacher" in name or "word_embeddings" in name]
    with torch.no_grad():
        evaluated = model.eval()(ids, labels, mask)
    result = {"loss": float(loss.detach()), "gradient": float(gradient), "evaluated": float(evaluated)}
    if tp == 1:
        result["expected"] = expected(model, reader, ids, evaluated, mask)
    return result


@torch.no_grad()
def expected(model: FactoredModel, reader, ids, loss, mask) -> float:
    student = model.logits(ids).transpose(0, 1).log_softmax(-1)
    wanted = hf_from(reader)(ids).logits.log_softmax(-1)
    per_token = F.kl_div(student, wanted, reduction="none", log_target=True).sum(-1)
    return float((1 - WEIGHT) * loss + WEIGHT * (per_token * mask).sum() / mask.sum())


@pytest.fixture(scope="module")
def one(pools) -> dict[str, float]:
    return pools(1).run(taught, tp=1)


def test_as_transformers_and_torch_have_it(one):
    assert one["loss"] == pytest.approx(one["expected"], rel=1e-5)
    assert abs(one["loss"] - one["evaluated"]) > 1e-2


def test_the_same_at_any_tp(pools, one):
    """A vocabulary of 37 is padded here: the second rank's last columns are no tokens."""
    two = pools(2).run(taught, tp=2)
    for name, value in two.items():
        assert value == pytest.approx(one[name], rel=1e-5), name
