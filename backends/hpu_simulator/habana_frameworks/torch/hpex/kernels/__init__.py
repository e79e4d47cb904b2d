"""Fused kernels, by their plain equivalents."""

import torch


class FusedSDPA:
    """Attention; the arguments that only steer the real kernel are accepted and have no effect."""

    @staticmethod
    def apply(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *_):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale
        )
