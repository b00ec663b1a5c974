"""The axes that most transformers have, named once: which space each meets, and from which side."""

from megatron_ligo.arch.spec import Axis, Heads, Use

VOCAB = Axis("vocab", Use.WRITES)
POSITION = Axis("position", Use.WRITES)
TO_RESIDUAL = Axis("residual", Use.WRITES)
FROM_RESIDUAL = Axis("residual", Use.READS)
GAIN = Axis("residual", Use.SCALES)
SHIFT = Axis("residual", Use.SHIFTS)
Q = Axis("qk", Use.WRITES, Heads.Q)
K = Axis("qk", Use.WRITES, Heads.KV)
V = Axis("v", Use.WRITES, Heads.KV)
# The output projection sees each value head once for every query head of its group.
FROM_V = Axis("v", Use.READS, Heads.Q)
TO_FFN = Axis("ffn", Use.WRITES)
FROM_FFN = Axis("ffn", Use.READS)
