"""GGUF tensors that hold all experts of a layer, (experts, rows, columns), as one tensor for each expert.

blk.N.ffn_gate_exps.weight is read as blk.N.ffn_gate_exps.E.weight; so is blk.N.ffn_gate.E.weight, of files before April
2024.
"""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_ligo.checkpoint.formats.gguf.header import GgufHeader, TensorBlock

ALONE = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down))(\.\d+\.weight)")
JOINED = re.compile(r"(blk\.\d+\.ffn_(?:gate|up|down)_exps)\.weight")


def split_experts(header: GgufHeader) -> GgufHeader:
    """Returns the header with a block for each expert, in place of those of all. Rows are quantised one by one."""
    tensors: dict[str, TensorBlock] = {}
    for name, block in header.tensors.items():
        match = JOINED.fullmatch(name)
        if not match or len(block.shape) != 3:
            tensors[ALONE.sub(r"\1_exps\2", name)] = block
            continue
        count, size = block.shape[0], block.nbytes // block.shape[0]
        for expert in range(count):
            offset = block.offset + expert * size
            tensors[f"{match[1]}.{expert}.weight"] = replace(block, shape=block.shape[1:], offset=offset, nbytes=size)
    return replace(header, tensors=tensors)
