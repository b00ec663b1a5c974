"""Core attention on PyTorch's fused kernel, for Megatron-core layers without Transformer Engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from deepspeed.sequence.layer import DistributedAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from megatron_ligo.distributed import device
from megatron_ligo.distributed.mesh import current_cp_group
from megatron_ligo.sharding.tensor_parallel import exchanged_kv_heads


@dataclass(frozen=True)
class QueryScaling:
    """Queries at position p are multiplied by 1 + beta log(1 + floor((p + first) / length)).

    unrotated_only: those of layers without rotary positions.
    """

    beta: float
    length: float
    first: int = 0
    unrotated_only: bool = False


class FusedAttention(nn.Module):
    """softmax(q k^T scale) v, causal or full, grouped-query, with the signature of mcore's DotProductAttention.

    softmax_scale: None = 1 / sqrt(d). The scores are bounded by the config's `attention_softcap`, and queries are
    multiplied by the factor of their position that its `query_scaling` states, if these are not None. With
    `softmax_type` "learnable" each head has a sink: a logit of its own in the softmax, by Megatron-core's name. Where
    `chunk_layers` says so, tokens attend within their chunk of `attention_chunk` tokens. With `l2_normalises_heads`
    rotated queries and keys are divided by their root mean square.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        **_,
    ):
        super().__init__()
        self.scale, self.softcap = softmax_scale, config.attention_softcap
        self.config = config
        self.causal = attn_mask_type is AttnMaskType.causal
        rotates = not config.no_rope_freq or not config.no_rope_freq[layer_number - 1]
        self.norm_eps = config.layernorm_epsilon if config.l2_normalises_heads and rotates else None
        scaling = config.query_scaling
        self.query_scaling = None if scaling is None or (scaling.unrotated_only and rotates) else scaling
        has_chunks = config.chunk_layers is None or config.chunk_layers[layer_number - 1]
        self.chunk = config.attention_chunk if has_chunks else None
        has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] if has_window else None
        self.register_parameter("softmax_offset", build_sinks(config))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sinks: Tensor | None = None,
        **_,
    ) -> Tensor:
        """query (s, b, heads, d); key, value (s, b, groups, d) -> (s, b, heads d). attention_mask: True = masked.

        sinks: (heads,), in place of the module's own.
        """
        sinks = self.softmax_offset if sinks is None else sinks
        return self.attend(query, key, value, attention_mask, sinks).flatten(2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """query (s, b, heads, d); key, value (s, b, groups, d); sinks (heads,) or None -> (s, b, heads, d)."""
        if self.norm_eps is not None:
            query, key = (divide_by_mean_square(x, self.norm_eps) for x in (query, key))
        if self.query_scaling is not None:
            query = query * query_factors(len(query), self.query_scaling, query)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if attention_mask is None or self.causal else ~attention_mask
        within = self._build_mask(q.shape[2], q.device)
        if within is not None:
            mask = within if mask is None else mask & within
        if self.softcap is not None or sinks is not None:
            out = plain_attention(q, k, v, mask, self.causal, self.scale, self.softcap, sinks)
            return out.permute(2, 0, 1, 3)
        is_grouped = q.shape[1] != k.shape[1]
        if is_grouped and not device.has_grouped_attention(q.dtype, masked=mask is not None):
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            is_grouped = False
        is_causal = self.causal and mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale, enable_gqa=is_grouped
        )
        return out.permute(2, 0, 1, 3)

    def _build_mask(self, length: int, device: torch.device) -> Tensor | None:
        """Returns which tokens (dim 1) each one (dim 0) attends to, (s, s), bool; None for all or all before it."""
        has_window = self.window is not None and length > self.window + 1
        has_chunks = self.chunk is not None and length > self.chunk
        if not has_window and not has_chunks:
            return None
        index = torch.arange(length, device=device)
        distance = index[:, None] - index[None, :]
        if has_window:
            return (distance <= self.window) & (distance >= (0 if self.causal else -self.window))
        within = index[:, None] // self.chunk == index[None, :] // self.chunk
        return within & (distance >= 0) if self.causal else within


class UlyssesAttention(nn.Module):
    """`FusedAttention` over whole sequences, of which each context-parallel rank has a part.

    DeepSpeed-Ulysses: an all-to-all gives each rank all tokens of its share of the heads, and another one takes the
    outputs back. Fewer key-value heads than ranks are repeated.
    """

    def __init__(self, config, layer_number: int, attn_mask_type: AttnMaskType, **options):
        super().__init__()
        self.group = current_cp_group()
        self.local = FusedAttention(config, layer_number, attn_mask_type, **options)
        self.exchange = DistributedAttention(self.local.attend, self.group)
        # Under the name that it has without context parallelism.
        self.register_parameter("softmax_offset", self.local.softmax_offset)
        self.local.softmax_offset = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sinks: Tensor | None = None,
        **_,
    ) -> Tensor:
        """query (s / cp, b, heads, d); key, value (s / cp, b, groups, d) -> (s / cp, b, heads d).

        sinks: (heads,), in place of the module's own.
        """
        heads, groups, ranks = query.shape[2], key.shape[2], self.group.size()
        repeats = exchanged_kv_heads(heads, groups, ranks) // groups
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
        sinks = self.softmax_offset if sinks is None else sinks
        if sinks is not None:
            sinks = sinks.chunk(ranks)[self.group.rank()]
        return self.exchange(query, key, value, 1, None, attention_mask, sinks).flatten(2)


def build_sinks(config) -> nn.Parameter | None:
    """Returns the sinks of this rank's heads, (heads / tp,), not initialised; None if heads have none."""
    if config.softmax_type != "learnable":
        return None
    heads = config.num_attention_heads // config.tensor_model_parallel_size
    return nn.Parameter(torch.empty(heads, dtype=config.params_dtype, device=device.current_device()))


def query_factors(length: int, scaling: QueryScaling, like: Tensor) -> Tensor:
    """Returns the factor of the queries at each position, (length, 1, 1, 1), in the dtype of `like`."""
    positions = torch.arange(length, device=like.device) + scaling.first
    factors = 1 + scaling.beta * torch.log(1 + torch.floor(positions / scaling.length))
    return factors.to(like.dtype)[:, None, None, None]


def divide_by_mean_square(x: Tensor, eps: float) -> Tensor:
    """Returns x / sqrt(mean of its squares over the last dim + eps), (..., d), computed in fp32, in x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Returns attention with scores c tanh(q k^T scale / c), or with sinks, which no fused kernel of PyTorch has.

    q: (b, heads, s, d); k, v: (b, groups, s, d); mask: (s, s), True = attended, or None; softcap: c or None; sinks:
    (heads,) or None, a logit in each head's softmax whose share goes to no value -> (b, heads, s, d).
    """
    repeats, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal and mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
    column = sinks.to(scores)[:, None, None].expand(len(q), -1, length, 1)
    shares = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1, dtype=torch.float32)
    return shares[..., :-1].to(q.dtype) @ v
