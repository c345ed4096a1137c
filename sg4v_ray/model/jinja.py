# SPDX-License-Identifier: Apache-2.0
"""The templates of `conversation` in Jinja, for the tokenizers that we save.

Line breaks below are for reading and are removed; one that is meant is written \\n.
"""


def plain() -> str:
    """Return the template of captions without a conversation."""
    return _one_line(_READ + _PLAIN)


def chat(system: str) -> str:
    """Return the template of a conversation with a default system text."""
    quoted = system.replace("'", "\\'")
    return _one_line(_READ + _CHAT.replace("SYSTEM", quoted))


def _one_line(source: str) -> str:
    return source.replace("\n", "")


_READ = r"""
{%- set ns = namespace(images=0, turns=[], system=none, texts=[]) -%}
{%- for message in messages -%}
{%- set ns.texts = [] -%}
{%- if message['content'] is string -%}
{%- set ns.texts = [message['content']] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{%- set ns.texts = ns.texts + [part['text']] -%}
{%- else -%}{%- set ns.images = ns.images + 1 -%}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'system' and loop.first -%}
{%- set ns.system = ns.texts | join('\n') -%}
{%- else -%}
{%- if message['role'] != ['user', 'assistant'][ns.turns | length % 2] -%}
{{- raise_exception('turns must alternate from user to assistant') -}}
{%- endif -%}
{%- set ns.turns = ns.turns + [ns.texts | join('\n')] -%}
{%- endif -%}
{%- endfor -%}
{%- if not ns.turns or (add_generation_prompt and ns.turns | length % 2 == 0) -%}
{{- raise_exception('a user turn must be last') -}}
{%- endif -%}
"""
_PLAIN = r"""
{%- if ns.turns | length > 2 or ns.system is not none -%}
{{- raise_exception('plain holds one caption, without system text') -}}
{%- endif -%}
{{- '<s>' + '<image>' * ns.images -}}
{%- if ns.turns | length == 2 -%}{{- ns.turns[1] + '\n' -}}{%- endif -%}
"""
_CHAT = r"""
{{- '<s>' + ('SYSTEM' if ns.system is none else ns.system) + ' ' -}}
{%- for text in ns.turns -%}
{%- if loop.index0 % 2 -%}
{{- ' ' + text + '</s>' -}}
{%- else -%}
{{- 'USER: ' + ('<image>\n' * ns.images if loop.first else '') + text + ' ASSISTANT:' -}}
{%- endif -%}
{%- endfor -%}
"""
