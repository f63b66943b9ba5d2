"""A whole checkpoint: tests/tiny.py's weights with a byte-level tokenizer, a chat template and head scores."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from checkpoints.config import config_hash, load_config
from checkpoints.importance import METHODS, HeadImportance, write_importance
from checkpoints.tokenizer import load_tokenizer
from tests import tiny

CONTEXT = 4096
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITING_TEMPLATE = "{{ messages | length }} messages\n" + TEMPLATE


def write(directory: Path, *, template: str = TEMPLATE, **changes: object) -> Path:
    """Write the checkpoint into an empty directory; its answers are printable ASCII and never stop."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))

    config = tiny.config_json("llama") | {"vocab_size": len(alphabet) + 2, "max_position_embeddings": CONTEXT}
    tiny.write(directory, config | changes)
    state = load_file(directory / "model.safetensors")
    printable = [token.isascii() and token.isprintable() for token in alphabet]
    state["lm_head.weight"][[not flag for flag in printable] + [True, True]] = 0
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_gguf(path: Path) -> Path:
    """Write a GGUF file with the same kind of tokenizer and template."""
    import gguf

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|im_start|>", "<|im_end|>"]
    config = tiny.config_json("llama") | {"vocab_size": len(tokens)}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, shape in tiny.tensor_shapes(config).items():
        writer.add_tensor(names.get_name(name, (".weight",)), tiny.weights(name, shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_scores(checkpoint: Path, path: Path) -> Path:
    """Write a head-importance file for the checkpoint."""
    config = load_config(checkpoint)
    table = tuple(tuple(1.0 / (1 + i + 2 * n) for n in range(config.num_heads)) for i in range(config.num_layers))
    fingerprint = load_tokenizer(checkpoint).fingerprint()
    write_importance(
        path,
        [
            HeadImportance(
                model_id="tiny",
                config_hash=config_hash(config),
                tokenizer_hash=fingerprint,
                method=method,
                trials=1,
                scores_LN=tuple(row[:1] for row in table) if method == "layer_errors" else table,
            )
            for method in METHODS
        ],
    )
    return path
