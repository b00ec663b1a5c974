"""Axes common to most families: the space of each, and its use of the space."""

from megatron_ligo.arch.spec import SINK_SPACE, Axis, Heads, Use

HEAD_FEATURE_GAIN = Axis("head_feature", Use.GAIN)  # of a norm of each head
ALL_QUERIES_GAIN = Axis("qk", Use.GAIN, Heads.Q)  # of a norm over all heads
ALL_KEYS_GAIN = Axis("qk", Use.GAIN, Heads.KV)
VOCAB_OUTPUT = Axis("vocab", Use.OUTPUT)
POSITION_OUTPUT = Axis("position", Use.OUTPUT)
RESIDUAL_OUTPUT = Axis("residual", Use.OUTPUT)
RESIDUAL_INPUT = Axis("residual", Use.INPUT)
RESIDUAL_GAIN = Axis("residual", Use.GAIN)
RESIDUAL_BIAS = Axis("residual", Use.BIAS)
QUERY_OUTPUT = Axis("qk", Use.OUTPUT, Heads.Q)
KEY_OUTPUT = Axis("qk", Use.OUTPUT, Heads.KV)
SINK_OUTPUT = Axis(SINK_SPACE, Use.OUTPUT, Heads.Q)
VALUE_OUTPUT = Axis("v", Use.OUTPUT, Heads.KV)
# The output projection reads each value head once for every query head of its group.
VALUE_INPUT = Axis("v", Use.INPUT, Heads.Q)
FFN_OUTPUT = Axis("ffn", Use.OUTPUT)
FFN_INPUT = Axis("ffn", Use.INPUT)
EXPERT_OUTPUT = Axis("expert", Use.OUTPUT)
SHARED_FFN_OUTPUT = Axis("shared_ffn", Use.OUTPUT)
SHARED_FFN_INPUT = Axis("shared_ffn", Use.INPUT)
SCORE_OUTPUT = Axis("score", Use.OUTPUT)
