"""The words around questions and answers that a run was trained on, as a chat template of transformers (Jinja)."""

import json
from typing import Any

from eim_jax.data.chat_form import FIXED_CLOCK
from eim_jax.data.conversation import TOKENIZER, messages_of
from eim_jax.data.datasets import chat_prompt, data_set
from eim_jax.models.vlm import VLM
from eim_jax.pretrained.llava import IMAGE
from eim_jax.training.setup import Inputs

# What stands for a question and an answer while the wording around them is found out.
_ASKED, _ANSWERED, _AGAIN = "\u2460asked\u2460", "\u2461answered\u2461", "\u2462again\u2462"


def chat_template(inputs: Inputs, vlm: VLM, *, always_shown: bool = False) -> str:
    """Returns the template of a conversation: BOS, the marker of a picture, the picture, the turns in their words.

    A turn that the model never met (a system prompt; a second question, where it was trained on single ones; a second
    picture) is an error of the template, not words of another form; so is a question without a picture where
    `always_shown` says that the model was folded for pictures.

    A run that asks in the tokenizer's own chat template keeps that, system prompts and all; the picture stands before
    what it writes.
    """
    in_own = inputs.config.data.seam == TOKENIZER
    before, between, behind = ("", _between_own(inputs), "") if in_own else _wording(inputs)
    start = inputs.lm_tokenizer.bos_token if vlm.bos is not None else ""
    marker = inputs.lm_tokenizer.decode(vlm.with_image) if vlm.with_image else ""
    without = inputs.lm_tokenizer.decode(vlm.without_image) if vlm.without_image else ""
    quoted = {
        name: json.dumps(words, ensure_ascii=False)
        for name, words in {
            "BOS": start,
            "MARKER": marker,
            "WITHOUT": without,
            "BEFORE": before,
            "BEHIND": behind,
            "IMAGE": IMAGE,
            "BETWEEN": between or "",
        }.items()
    }
    template = (_OWN_TEMPLATE if in_own else _TEMPLATE).replace("@PICTURES@", _PICTURES).replace("@SAID@", _SAID)
    template = template if between is not None else template.replace("{#- more -#}", _SINGLE)
    template = template.replace("{#- unseen -#}", _UNSEEN) if always_shown else template
    for name, words in quoted.items():
        template = template.replace(f"@{name}@", words)
    return template.replace("@OWN@", _own(inputs.lm_tokenizer)) if in_own else template


def _own(tokenizer: Any) -> str:
    """The tokenizer's template as it stands inside of another, with the clock and without thinking, as in training."""
    own = tokenizer.get_chat_template()
    # At the end of a template Jinja leaves a newline out, inside of one it does not.
    return (FIXED_CLOCK if "strftime_now" in own else "") + own.removesuffix("\n")


def _between_own(inputs: Inputs) -> str | None:
    """Returns what `_wording` says of several turns, of which the tokenizer's own template has its own words."""
    turns = messages_of(chat_prompt(inputs.config.data, _AGAIN, [(_ASKED, _ANSWERED)]))
    return "" if len(turns) > 1 else None


_SINGLE = (
    "{%- if ns.turns > 1 %}{{- raise_exception('this model was trained on single questions: ask one at a time') }}"
    "{%- endif %}"
)
_UNSEEN = (
    "{%- if not ns.images %}{{- raise_exception('this model is the one for questions about a picture') }}{%- endif %}"
)
# The text of a message, whose content is a text or a list of texts and pictures.
_SAID = """\
{%- if message['content'] is string %}{%- set said = message['content'] %}{%- else %}
{%- set part = namespace(text='') %}
{%- for item in message['content'] %}
{%- if item['type'] == 'image' %}{%- set ns.images = ns.images + 1 %}
{%- else %}{%- set part.text = part.text + item['text'] %}{%- endif %}
{%- endfor %}{%- set said = part.text %}{%- endif %}"""
_PICTURES = """\
{%- if ns.images > 1 %}{{- raise_exception('this model was trained on one picture at a time') }}{%- endif %}
{#- unseen -#}
{%- set shown = (@MARKER@ + @IMAGE@) if ns.images else @WITHOUT@ %}"""
_TEMPLATE = """\
{%- set ns = namespace(images=0, turns=0, text='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{{- raise_exception('this model was trained without system prompts') }}{%- endif %}
@SAID@
{%- if message['role'] == 'user' %}{%- set ns.turns = ns.turns + 1 %}{#- more -#}
{%- set ns.text = ns.text + (@BEFORE@ if ns.turns == 1 else @BETWEEN@) + said %}
{%- else %}{%- set ns.text = ns.text + @BEHIND@ + said %}{%- endif %}
{%- endfor %}
@PICTURES@
{{- @BOS@ + shown + ns.text }}
{%- if messages[-1]['role'] == 'user' %}{{- @BEHIND@ }}{%- endif %}"""
# The tokenizer's template sees texts alone; the BOS that it may begin with stands before the picture.
_OWN_TEMPLATE = """\
{%- set ns = namespace(images=0, turns=0, said=[]) %}
{%- for message in messages %}
@SAID@
{%- if message['role'] == 'user' %}{%- set ns.turns = ns.turns + 1 %}{#- more -#}{%- endif %}
{%- set ns.said = ns.said + [{'role': message['role'], 'content': said}] %}
{%- endfor %}
@PICTURES@
{%- set messages = ns.said %}
{%- set enable_thinking = false %}
{%- set own %}@OWN@{% endset %}
{{- @BOS@ + shown + (own[@BOS@ | length:] if own.startswith(@BOS@) else own) }}"""


def _wording(inputs: Inputs) -> tuple[str, str | None, str]:
    """What stands before the first question, between an answer and the next question, behind a question.

    The middle one is None where the run's data are single questions. A run that captions has no words.
    """
    data = inputs.config.data
    if data_set(data).prompt is None:
        return "", None, ""
    before, _, behind = chat_prompt(data, _ASKED).partition(_ASKED)
    first, _, rest = chat_prompt(data, _AGAIN, [(_ASKED, _ANSWERED)]).partition(_ASKED)
    middle, _, rest = rest.partition(_ANSWERED)
    between, found, last = rest.partition(_AGAIN)
    same = first == before and last == behind and middle.rstrip(" ") == behind.rstrip(" ")
    return before, between if found and same else None, behind
