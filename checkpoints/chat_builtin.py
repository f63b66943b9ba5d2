"""Chat templates of our families, for checkpoints that bring none. Source: the published prompt formats."""

from __future__ import annotations

from collections.abc import Collection


def built_in_template(model_type: str, special_tokens: Collection[str]) -> tuple[str, str] | None:
    """The template that fits a vocabulary.

    Args:
        model_type: the family, e.g. "llama".
        special_tokens: texts of the control tokens.

    Returns:
        Its name and its text, or None when no template fits.

    Example:
        >>> built_in_template("mistral", ["<s>", "</s>"])[0]
        'Mistral v1'
    """
    special = set(special_tokens)
    if special >= {"<|im_start|>", "<|im_end|>"}:
        return "ChatML", _CHATML.replace("DEFAULT", repr(_CHATML_SYSTEM.get(model_type, "")))
    if special >= {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}:
        return "Llama 3", _LLAMA3
    if model_type == "mistral" and special >= {"<s>", "</s>", "[INST]", "[/INST]"}:
        return "Mistral v3", _MISTRAL_V3
    if model_type == "mistral" and special >= {"<s>", "</s>"}:
        return "Mistral v1", _MISTRAL_V1
    if model_type == "llama" and special >= {"<s>", "</s>"}:
        return "Llama 2", _LLAMA2
    return None


_CHATML_SYSTEM = {
    "llama": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "qwen2": "You are a helpful assistant.",
}
_CHATML = """\
{%- if DEFAULT and messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\n' + DEFAULT + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


def _instructions(*, system: str, user: str, assistant: str) -> str:
    """The template of a family without system turns, from Jinja expressions: `system` stands before the first user."""
    return f"""\
{{%- if messages[0].role == 'system' -%}}
    {{%- set system = {system} -%}}
    {{%- set turns = messages[1:] -%}}
{{%- else -%}}
    {{%- set system = '' -%}}
    {{%- set turns = messages -%}}
{{%- endif -%}}
{{%- for message in turns -%}}
    {{%- set content = (system if loop.first else '') + message.content -%}}
    {{%- if message.role != ('user', 'assistant')[loop.index0 % 2] -%}}
        {{{{- raise_exception('after an optional system message, user and assistant must alternate') -}}}}
    {{%- elif message.role == 'user' -%}}
        {{{{- {user} -}}}}
    {{%- else -%}}
        {{{{- {assistant} -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
"""


_LLAMA2 = _instructions(
    system="'<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n'",
    user="bos_token + '[INST] ' + content | trim + ' [/INST]'",
    assistant="' ' + content | trim + ' ' + eos_token",
)
# Some Mistral templates move the system message to the last user's; a kept cache wants it to stay where it was.
_MISTRAL_V1 = _instructions(
    system="messages[0].content + '\\n\\n'",
    user="(bos_token if loop.first else '') + '[INST] ' + content + ' [/INST]'",
    assistant="' ' + content + eos_token",
)
_MISTRAL_V3 = _instructions(
    system="messages[0].content + '\\n\\n'",
    user="(bos_token if loop.first else '') + '[INST]' + content + '[/INST]'",
    assistant="content + eos_token",
)
