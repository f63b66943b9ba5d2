"""Our checkpoints as transformers runs them; needs `pip install -e '.[test]'`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from checkpoints.resolve import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_directory(directory: Path) -> PreTrainedModel:
    """Read a checkpoint directory; every tensor that the model has must be there and no other."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    return _without_stop(model)


def default_model() -> PreTrainedModel:
    """Build the default model from its GGUF file, with nothing of ours between the file and transformers."""
    import gguf
    from transformers import LlamaConfig, LlamaForCausalLM

    file = gguf.GGUFReader(resolve(DEFAULT_MODEL, progress=False))
    number = {name.removeprefix("llama."): field.contents() for name, field in file.fields.items()}
    stored = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in file.tensors}
    config = LlamaConfig(
        vocab_size=number["vocab_size"],
        hidden_size=number["embedding_length"],
        intermediate_size=number["feed_forward_length"],
        num_hidden_layers=number["block_count"],
        num_attention_heads=number["attention.head_count"],
        num_key_value_heads=number["attention.head_count_kv"],
        max_position_embeddings=number["context_length"],
        rms_norm_eps=number["attention.layer_norm_rms_epsilon"],
        rope_theta=number["rope.freq_base"],
        tie_word_embeddings=True,
    )

    def halves(rows: torch.Tensor) -> torch.Tensor:
        """Undo llama.cpp's order of a head's rows: the pairs that turn together stand side by side in it."""
        heads = rows.split(config.head_dim)
        return torch.cat([row for head in heads for row in (head[0::2], head[1::2])])

    state = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
    }
    for i in range(config.num_hidden_layers):
        ours, theirs = f"blk.{i}", f"model.layers.{i}"
        state |= {
            f"{theirs}.input_layernorm.weight": stored[f"{ours}.attn_norm.weight"],
            f"{theirs}.self_attn.q_proj.weight": halves(stored[f"{ours}.attn_q.weight"]),
            f"{theirs}.self_attn.k_proj.weight": halves(stored[f"{ours}.attn_k.weight"]),
            f"{theirs}.self_attn.v_proj.weight": stored[f"{ours}.attn_v.weight"],
            f"{theirs}.self_attn.o_proj.weight": stored[f"{ours}.attn_output.weight"],
            f"{theirs}.post_attention_layernorm.weight": stored[f"{ours}.ffn_norm.weight"],
            f"{theirs}.mlp.gate_proj.weight": stored[f"{ours}.ffn_gate.weight"],
            f"{theirs}.mlp.up_proj.weight": stored[f"{ours}.ffn_up.weight"],
            f"{theirs}.mlp.down_proj.weight": stored[f"{ours}.ffn_down.weight"],
        }
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    return _without_stop(model)


def greedy(model: PreTrainedModel, ids: list[int], max_new_tokens: int) -> list[int]:
    """What transformers generates after one prompt."""
    ids_BT = torch.tensor([ids])
    # Without a mask it takes the padding id for padding wherever it stands.
    out_BT = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=max_new_tokens, do_sample=False
    )
    return out_BT[0, len(ids) :].tolist()


def _without_stop(model: PreTrainedModel) -> PreTrainedModel:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)
