"""What a rank's tensors take at most, as the plan says it and as it is measured, for many layouts and sizes."""

from __future__ import annotations

import pytest

from tests.plan import cases

NARROW = {
    "small": {"num_layers": 3, "hidden_size": 128, "ffn_size": 352, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    | {"vocab_size": 4096},
    "large": {"num_layers": 6, "hidden_size": 384, "ffn_size": 1024, "num_heads": 12, "num_kv_heads": 6},
}
WIDE = {
    "small": {"num_layers": 3, "hidden_size": 192, "ffn_size": 512, "num_heads": 6, "num_kv_heads": 3, "head_dim": 32}
    | {"vocab_size": 8000},
    "large": {"num_layers": 4, "hidden_size": 512, "ffn_size": 1408, "num_heads": 16, "num_kv_heads": 8},
}
CASES = {
    "pretraining": ("plain", 1, NARROW, {"tokens": 1024, "sequences": 2}),
    "pretraining, recomputed": ("plain", 1, WIDE, {"tokens": 1024, "sequences": 4, "recompute": True}),
    "pretraining, bf16": ("plain", 1, WIDE, {"tokens": 128, "precision": "bf16"}),
    "pretraining, TP2": ("plain", 2, NARROW, {"sequences": 2, "parallel": {"tp": 2}}),
    "pretraining, PP2": ("plain", 2, NARROW, {"tokens": 256, "micro_batches": 4, "parallel": {"pp": 2}}),
    "pretraining, ZeRO 2": ("plain", 2, WIDE, {"tokens": 256, "micro_batches": 2, "parallel": {"zero": 2}}),
    "pretraining, ZeRO 3": ("plain", 2, WIDE, {"tokens": 256, "parallel": {"zero": 3}}),
    "fit": ("fit", 1, WIDE, {"tokens": 1024, "sequences": 4}),
    "fit, micro-batches": ("fit", 1, WIDE, {"tokens": 512, "micro_batches": 2}),
    "fit, rank 32": ("fit", 1, WIDE, {"tokens": 512, "operator": {"rank": 32}}),
    "fit, recomputed": ("fit", 1, NARROW, {"tokens": 1024, "sequences": 4, "recompute": True}),
    "fit, TP2": ("fit", 2, NARROW, {"tokens": 1024, "sequences": 2, "parallel": {"tp": 2}}),
    "fit, PP2": ("fit", 2, WIDE, {"tokens": 256, "micro_batches": 4, "parallel": {"pp": 2}}),
    "fit, ZeRO 3": ("fit", 2, WIDE, {"tokens": 256, "parallel": {"zero": 3}}),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_as_planned_within_15_percent(pools, case):
    kind, world, sizes, more = CASES[case]
    ranks = pools(world).run(cases.peak, kind=kind, job={**sizes, **more})
    for stage in {rank["stage"] for rank in ranks}:
        held = [rank for rank in ranks if rank["stage"] == stage]
        measured = max(rank["measured"] for rank in held)
        planned = held[0]["planned"]
        total = sum(planned.values())
        print(f"stage {stage}: measured {measured >> 20} MiB, planned / measured {total / measured:.2f}, {planned}")
        assert total == pytest.approx(measured, rel=0.15)
        assert all(rank["parameters"] == rank["counted"] for rank in held)
