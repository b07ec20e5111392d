"""Chat templates in five styles, with what they are known to do to conversations, and random conversations."""

import random
from typing import Any

from transformers import PreTrainedTokenizerFast

from .conftest import WORDS, build_tokenizer

# Turns end with eos and a line break; the header's line break is no part of the generation prompt.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Prints the date; tools in the system prompt; content is trimmed; tool results have the role ipython.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) + "\n\n" }}{%- endfor %}{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson + "}<|eot_id|>" }}
{%- elif message.role == "tool" %}
{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" + message.content | tojson + "<|eot_id|>" }}
{%- else %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

# Reasoning is shown only after the last question, and an empty one in the last turn.
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- "# Tools\n" }}{%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}{{- "<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == "user" %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}
{%- if message.role == "user" or (message.role == "system" and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- elif message.role == "assistant" %}
{%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{%- if message.tool_calls %}{%- for call in message.tool_calls %}
{%- if loop.index0 > 0 or content %}{{- '\n' }}{%- endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\n' }}
{%- elif message.role == "tool" %}
{{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

# No header for the assistant at all: a space; the system prompt is part of the first question; roles alternate.
MISTRAL = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\n\n' %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}
{%- for message in rest %}
{%- if message.role == 'user' %}
{%- if loop.first and tools %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}{{- call.function | tojson + (']' if loop.last else ', ') }}{%- endfor %}
{{- eos_token }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
{%- else %}{{- raise_exception('unknown role ' + message.role) }}{%- endif %}
{%- endfor %}"""

# As v0.3: system prompt and tools move to the last question, also where that is in a response of several turns.
MISTRAL_3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content + '\n\n' %}{%- set rest = messages[1:] %}
{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in rest %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in rest %}
{%- if message.role == 'user' %}
{%- if loop.index0 == ns.last and tools %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' + (system if loop.index0 == ns.last else '') + message.content + '[/INST]' }}
{%- elif message.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}{{- call.function | tojson + (']' if loop.last else ', ') }}{%- endfor %}
{{- eos_token }}
{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}
{%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
{%- else %}{{- raise_exception('unknown role ' + message.role) }}{%- endif %}
{%- endfor %}"""

TEMPLATES = {"zephyr": ZEPHYR, "llama-3": LLAMA3, "qwen3": QWEN3, "mistral": MISTRAL, "mistral-3": MISTRAL_3}
# What each style ends a turn with.
ENDS = {"zephyr": "</s>", "llama-3": "<|eot_id|>", "qwen3": "<|im_end|>", "mistral": "</s>"}
ENDS["mistral-3"] = ENDS["mistral"]
_SPECIAL = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"]
TOOLS = [{"type": "function", "function": {"name": "say", "parameters": {"type": "object", "properties": {"w": {}}}}}]


def build_chat_tokenizer(style: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    tokenizer.chat_template = TEMPLATES[style]
    return tokenizer


def text(rng: random.Random) -> str:
    words = [rng.choice([*WORDS, "é", "漢字", "🙂", "2+2", "\n", "  ", "{x}", "<b>"]) for _ in range(rng.randint(1, 7))]
    joined = rng.choice(["", " ", "\n"]) + " ".join(words) + rng.choice(["", "", " ", "\n\n"])
    return joined if joined.strip() else "red"


def turn(rng: random.Random, role: str) -> dict[str, Any]:
    return {"role": role, "content": text(rng)}


def call(rng: random.Random) -> list[dict[str, Any]]:
    """A call of a tool and its result; APIs give no content beside a call, and arguments as a string."""
    arguments: Any = {"w": text(rng), "times": rng.randint(1, 9)}
    function = {"name": "say", "arguments": arguments}
    asked = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    return [asked, {"role": "tool", "content": rng.choice([None, text(rng)]), "name": "say"}]


def reply(rng: random.Random, style: str) -> dict[str, Any]:
    message = turn(rng, "assistant")
    if style == "qwen3" and rng.random() < 0.5:
        message["reasoning_content"] = text(rng)
    return message


def conversation(rng: random.Random, style: str) -> dict[str, Any]:
    """A record of messages: an UltraFeedback-shaped, implicit, multi-turn or tool-calling one."""
    system = [turn(rng, "system")] if rng.random() < 0.3 else []
    history = [m for _ in range(rng.randint(0, 2)) for m in (turn(rng, "user"), reply(rng, style))]
    asked = [*system, *history, turn(rng, "user")]
    shape = rng.choice(["ultrafeedback", "implicit", "multi-turn", "tools"])
    if shape == "tools" and style == "zephyr":
        shape = "implicit"

    def response() -> list[dict[str, Any]]:
        last = reply(rng, style)
        if shape == "multi-turn":
            turns = [m for _ in range(rng.randint(1, 2)) for m in (reply(rng, style), turn(rng, "user"))]
            return [*turns, last]
        return [*(call(rng) if shape == "tools" else []), last]

    chosen, rejected = response(), response()
    if shape in ("multi-turn", "tools") or (shape == "implicit" and rng.random() < 0.5):
        row = {"prompt": asked, "chosen": chosen, "rejected": rejected}
    else:
        row = {"chosen": [*asked, *chosen], "rejected": [*asked, *rejected]}
        if shape == "ultrafeedback":
            row["prompt"] = asked[-1]["content"]
    return row | ({"tools": TOOLS} if shape == "tools" else {})


def plain(rng: random.Random) -> dict[str, Any]:
    """A record of strings: hh-rlhf-shaped (implicit prompt) or TL;DR-shaped."""
    if rng.random() < 0.5:
        asked = f"\n\nHuman: {text(rng)}\n\nAssistant:"
        return {name: f"{asked} {text(rng)}" for name in ("chosen", "rejected")}
    prompt = f"SUBREDDIT: r/{rng.choice(WORDS)}\nPOST: {text(rng)}\nTL;DR:"
    return {"prompt": prompt, "chosen": f" {text(rng)}", "rejected": f" {text(rng)}"}
