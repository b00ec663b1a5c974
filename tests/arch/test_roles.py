"""Roles, stages and tensor-parallel uses that the families' tables state."""

import pytest

from megatron_ligo import arch as architectures
from megatron_ligo.arch.spec import ParamSpec, Role, Stage, TpUse
from tests.checkpoint.test_format_pairs import sizes

FAMILIES = sorted(architectures.architectures())


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_roles_agree(family):
    """A key outside arch/families/ is found by its role: a model has one weight and one bias of each at most."""
    arch = architectures.get(family)
    read = [param for param in arch.params if not param.unread]
    assert len({(param.role, param.is_bias, param.excludes) for param in read}) == len(read)
    for param in read:
        alike = [other.requires for other in read if (other.role, other.is_bias) == (param.role, param.is_bias)]
        assert not param.excludes or set(alike) == {"", param.excludes}
    for param in arch.params:
        assert param.is_bias is param.key.endswith("_bias"), param.key
        assert ("{}" in param.key) is param.in_layer, param.key


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_follow_the_order_of_the_table(family):
    order = [Stage.FIRST, Stage.LAYER, Stage.LAST]
    stages = [order.index(param.stage) for param in architectures.get(family).params]
    assert stages == sorted(stages)


def test_find_by_role():
    llama, bert, vit = (architectures.get(name) for name in ("llama", "bert", "vit"))
    assert llama.find(Role.FFN_GATE).key == "layers.{}.gate" and llama.is_gated(sizes("llama"))
    assert bert.find(Role.FFN_GATE) is None and not bert.is_gated(sizes("bert"))
    assert bert.find(Role.HEAD, bias=True).key == "head_bias"
    assert vit.has(Role.PATCH_EMBEDDING, bias=True) and not vit.has(Role.WORD_EMBEDDING)
    with pytest.raises(KeyError):
        vit.get(Role.WORD_EMBEDDING)


def test_a_whole_tensor_may_be_used_in_parts():
    arch = architectures.get("llama")
    assert arch.get(Role.QUERY).tp_use is TpUse.PARTIAL
    assert arch.get(Role.ATTENTION_NORM).tp_use is TpUse.COMPLETE
    norm = arch.get(Role.ATTENTION_NORM)
    assert ParamSpec(norm.key, norm.role, norm.axes, None, partial_tp_use=True).tp_use is TpUse.PARTIAL
