"""The two prompts of the released LongVLM code as Jinja chat templates, character by character.

The released code trains with `vicuna_v1_1` and evaluates with `long_vlm_v1`; only their system texts differ.
Structure: system text, a space, then for each turn `ROLE: message`, with a space after the user's message and the end
token after the assistant's. An empty message gives `ROLE:` alone, as in the released code.
The `generation` blocks mark what a model is trained to generate: the answer with its leading space and end token.
Content is a string here: `LongVLMProcessor.apply_chat_template` turns lists of parts into one beforehand.
"""

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# No space between "language." and "Follow", as in the released code.
LONG_VLM_SYSTEM = (
    "You are LongVLM, a large vision-language assistant. "
    "You are able to understand the video content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "Follow the instructions carefully and explain your answers in detail based on the provided video."
)

# The separator after an answer is the tokenizer's end token; LLaMA's, which the released code writes, is "</s>".
_TEMPLATE = """\
{%- set end = eos_token if eos_token is defined and eos_token else '</s>' -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system, turns = messages[0].content, messages[1:] -%}
{%- else -%}
    {%- set system, turns = SYSTEM_TEXT, messages -%}
{%- endif -%}
{%- if system -%}
    {{- system + ' ' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role == 'user' -%}
        {{- 'USER:' -}}
        {%- if message.content -%}
            {{- ' ' + message.content + ' ' -}}
        {%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- if message.content -%}
            {%- generation -%}
                {{- ' ' + message.content + end -}}
            {%- endgeneration -%}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception('role "' + message.role + '" cannot stand here: first system, then user or assistant') -}}
    {%- endif -%}
{%- endfor -%}
{%- set opened = turns and turns[-1].role == 'assistant' and not turns[-1].content -%}
{%- if add_generation_prompt and not opened -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def _with_system(text: str) -> str:
    return _TEMPLATE.replace("SYSTEM_TEXT", '"' + text + '"')


CHAT_TEMPLATES = {"vicuna_v1_1": _with_system(VICUNA_SYSTEM), "long_vlm_v1": _with_system(LONG_VLM_SYSTEM)}
DEFAULT_CHAT_TEMPLATE = "vicuna_v1_1"
