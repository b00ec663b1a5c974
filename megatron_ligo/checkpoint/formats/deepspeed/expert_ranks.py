"""Expert-parallel ranks of an engine's checkpoint: each holds some of a layer's experts, and a copy of all else."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ligo.arch.mcore_names import EXPERT_NUMBER
from megatron_ligo.checkpoint.formats.deepspeed.engine_rank import EngineRank


def join_expert_ranks(ranks: Sequence[EngineRank], num_experts: int) -> list[EngineRank]:
    """Returns one state for each tensor-parallel rank, from those of all model-parallel ranks of a stage.

    Model-parallel rank ep_rank x tp + tp_rank has the experts from ep_rank x num_experts / ep on. Ranks whose names do
    not follow from such a division are returned as they are.
    """
    numbers = {int(match[0]) for name in ranks[0].shapes for match in EXPERT_NUMBER.finditer(name)}
    ep = num_experts // len(numbers) if numbers else 1
    if ep <= 1 or len(ranks) % ep:
        return list(ranks)
    tp = len(ranks) // ep
    return [_join(ranks[tp_rank::tp]) for tp_rank in range(tp)]


def _join(ranks: Sequence[EngineRank]) -> EngineRank:
    joined = EngineRank({}, {})
    for rank in ranks:
        joined.module_state = rank.module_state | joined.module_state
        joined.shapes = rank.shapes | joined.shapes
        joined.frozen = rank.frozen | joined.frozen
        joined.trained |= rank.trained
        joined.optimizer_states += rank.optimizer_states
    return joined
