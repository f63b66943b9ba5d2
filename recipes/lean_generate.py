"""A whole generation loop from `layers` and `checkpoints` alone: no engine, no zoo.

    python -m recipes.lean_generate "The capital of France is"

It builds a Llama-shaped model, takes the prompt into an arena cache with SnapKV at 64 tokens per KV head, and decodes
32 tokens greedily. Copy it and change what you like.
"""

import sys

import torch
from torch import Tensor, nn

from checkpoints.config import load_config
from checkpoints.resolve import resolve
from checkpoints.tokenizer import load_tokenizer
from checkpoints.weights import load_state
from layers.attention import Attention
from layers.block import Block
from layers.cache.arena import ArenaCache
from layers.cache.base import KVCache
from layers.cache.prompt import PromptPass
from layers.embedding import Embedding
from layers.linear import linear
from layers.methods import build_method
from layers.mlp import GatedMLP
from layers.norm import RMSNorm
from layers.plan import ArenaShape
from layers.rope import RotaryEmbedding, default_frequencies


@torch.inference_mode()
def main(text: str, new_tokens: int = 32, budget: int = 64) -> str:
    """Continue a text with the default model."""
    path = resolve("smollm2-135m")
    c, tokenizer = load_config(path), load_tokenizer(path)
    L, N, H, D, E = c.num_layers, c.num_heads, c.num_kv_heads, c.head_dim, c.hidden_size
    embed, norm = Embedding(c.vocab_size, E), RMSNorm(E, eps=c.rms_norm_eps)
    blocks = [
        Block(
            Attention(E, num_heads=N, num_kv_heads=H, head_dim=D, layer=layer),
            GatedMLP(E, c.intermediate_size),
            E,
            eps=c.rms_norm_eps,
        )
        for layer in range(L)
    ]
    model = nn.ModuleDict({"embed": embed, "blocks": nn.ModuleList(blocks), "norm": norm})
    model.load_state_dict(load_state(path, c, dtype=torch.float32), assign=True)
    rope = RotaryEmbedding(default_frequencies(D, c.rope.theta))

    ids = tokenizer.encode(text)
    keep_BLH = torch.full((1, L, H), min(budget, len(ids)))
    slots = int(keep_BLH.sum()) + L * H * new_tokens
    shape = ArenaShape(batch=1, num_layers=L, num_kv_heads=H, head_dim=D, slots=slots, dtype=torch.float32)
    cache = ArenaCache(shape, "cpu")

    def next_token(ids_T: list[int], position_BT: Tensor, attend: KVCache) -> int:
        x_BTE, rotation = embed(torch.tensor([ids_T])), rope(position_BT)
        for block in blocks:
            x_BTE = block(x_BTE, rotation, attend)
        return int(linear(norm(x_BTE[:, -1]), embed.weight).argmax())

    method = build_method("snapkv:preset=tuned")
    prompt = PromptPass(cache, method, keep_BLH=keep_BLH, room=[new_tokens], new_tokens=[len(ids)])
    new = [next_token(ids, prompt.position_BT, prompt)]
    prompt.finish()
    while len(new) < new_tokens and new[-1] != tokenizer.eos_id:
        cache.begin_step(torch.tensor([True]))
        new.append(next_token(new[-1:], cache.position[:, None], cache))
        cache.end_step()
    return tokenizer.decode(new, skip_special=True)


if __name__ == "__main__":
    print(main(" ".join(sys.argv[1:]) or "The capital of France is"))
