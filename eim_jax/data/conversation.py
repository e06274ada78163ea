"""A conversation as a sample's instruction, for LMs that are asked in their tokenizer's own chat template.

Where a run is asked so (`data.template=tokenizer`), an instruction is no prompt yet: it is the turns up to the answer,
{"messages": [{"role": "user", "content": "..."}, ...]} as JSON, since data sets know no tokenizer. data/chat_form.py
renders it. An instruction of another form (ScienceQA's question with its options, say) is a user's single turn.
"""

import json
from collections.abc import Sequence

TOKENIZER = "tokenizer"  # what `data.template` and `data.seam` say of the form
_HEAD = '{"messages": [{"role": '

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


def message(role: str, content: str) -> Message:
    """Returns a turn of a conversation."""
    return {"role": role, "content": content}


def written(messages: Sequence[Message]) -> str:
    """Returns the instruction that holds these turns.

    >>> written([message("user", "Who?")])
    '{"messages": [{"role": "user", "content": "Who?"}]}'
    """
    return json.dumps({"messages": list(messages)}, ensure_ascii=False)


def messages_of(instruction: str) -> list[Message]:
    """Returns the turns of an instruction; one that is no conversation is a user's single turn."""
    if not instruction.startswith(_HEAD):
        return [message("user", instruction)]
    return json.loads(instruction)["messages"]


def readable(instruction: str) -> str:
    r"""Returns an instruction as a page shows it.

    >>> readable(written([message("system", "Be kind."), message("user", "Who?")]))
    'system: Be kind.\nuser: Who?'
    >>> readable("Instruction: Who?\nResponse:")
    'Instruction: Who?\nResponse:'
    """
    if not instruction.startswith(_HEAD):
        return instruction
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages_of(instruction))
