"""The count from shapes against PyTorch's own counter on a real model."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from megatron_ligo.flops import forward_flops, train_flops
from tests.tiny import hf_llama, llama_dims, tokens

CASES = [
    {},
    {"tied": True, "num_layers": 5, "num_kv_heads": 6},
    {"hidden_size": 96, "num_heads": 8, "num_kv_heads": 2, "head_dim": 16, "ffn_size": 200, "vocab_size": 501},
]


@pytest.mark.parametrize("changes", CASES)
def test_counts_as_torch_does(changes):
    dims = llama_dims(**changes)
    model = hf_llama(dims)
    ids = tokens(dims, batch=3, length=32)
    # PyTorch does not count the products inside its fused kernel on a CPU.
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward:
        loss = model(ids).logits.square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward_flops(dims, ids.numel(), 32) == pytest.approx(forward.get_total_flops(), rel=0.02)
    total = forward.get_total_flops() + backward.get_total_flops()
    assert train_flops(dims, ids.numel(), 32) == pytest.approx(total, rel=0.02)


def test_scales_with_tokens_and_sequence():
    dims = llama_dims()
    assert train_flops(dims, 2048, 64) == 2 * train_flops(dims, 1024, 64)
    assert train_flops(dims, 1024, 128) > train_flops(dims, 1024, 64)
