"""Tool definitions, tool calls and template arguments, as objects or JSON text -> as chat templates expect them."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.strict_json import parse_json
from data_tools.values import check_plain, is_absent, json_or_same, kind_of, without_absent, without_nulls


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions as templates expect them, from a list or JSON text; raises ValueError for anything else."""
    given, value = value, json_or_same(value, "'tools'")
    if is_absent(value):
        return ()
    if not isinstance(value, list):
        raise ValueError(f"'tools' must be a list of tool definitions, not {kind_of(value)}")
    tools = []
    for number, tool in enumerate(value, start=1):
        # what JSON text says was written; in an object Arrow may have filled in what other rows have
        is_text = isinstance(given, str) or isinstance(tool, str)
        tool = json_or_same(tool, f"tool {number}") if is_text else without_absent(tool)
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError(f"tool {number} must be an object with a name")
        if "function" not in tool:  # as OpenAI's Responses have it
            tool = {"type": "function", "function": {key: item for key, item in tool.items() if key != "type"}}
        tools.append(tool)
    check_plain(tools)
    return tuple(tools)


def arguments_of(value: Any, field: str) -> dict[str, Any]:
    """A row's arguments for the chat template; raises ValueError unless they are an object of options."""
    value = json_or_same(value, f"{field!r}")
    if is_absent(value):
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{field!r} must be an object, not {kind_of(value)}")
    check_arguments(value)
    check_plain(value)
    return without_absent(value)


TAKEN = {"self", "messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
TAKEN |= {f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError for a template argument that would replace the conversation or a special token."""
    taken = sorted(TAKEN & set(arguments))
    if taken:
        raise ValueError(f"a template argument cannot be named {taken[0]!r}; that is what the template is given anyway")


def tool_calls_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Calls with their arguments as objects; from a list or a single call, each an object or JSON text."""
    value = json_or_same(value, "'tool_calls'")
    if is_absent(value):
        return ()
    calls = value if isinstance(value, list) else [value]
    return tuple(_tool_call(call, number) for number, call in enumerate(calls, start=1))


ARGUMENTS = ("arguments", "parameters", "args", "input")  # of a call, by OpenAI, by others, LangChain and Anthropic
KNOWN = {"type", "function", "name", *ARGUMENTS}


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    call = json_or_same(call, f"call {number}")
    inner = call.get("function") if isinstance(call, dict) else None
    levels = [level for level in (call, inner) if isinstance(level, dict)]
    names = [level["name"] for level in levels if not is_absent(level.get("name"))]
    if not names or not all(isinstance(name, str) and name == names[0] for name in names):
        wanted = "one name, and not two" if len(names) > 1 else "the name and arguments of a function"
        raise ValueError(f"call {number} must be an object with {wanted}")
    values = _arguments_of_call(levels, number)
    rest = {key: value for key, value in call.items() if key not in KNOWN and not is_absent(value)}
    beside = {
        key: value for key, value in (inner or {}).items() if key not in KNOWN | set(rest) and not is_absent(value)
    }
    is_said = any(key in level for level in levels for key in ARGUMENTS)
    if not is_said and (objects := [key for key, value in (rest | beside).items() if isinstance(value, dict)]):
        raise ValueError(f"call {number} has no 'arguments', and an object {objects[0]!r}; name its arguments so")
    return {**rest, "type": "function", "function": {**beside, "name": names[0], "arguments": values}}


def _arguments_of_call(levels: Sequence[Mapping[str, Any]], number: int) -> dict[str, Any]:
    """The arguments of a call, which stand in it or in its function; raises ValueError where there are two."""
    given = {key: level[key] for level in levels for key in ARGUMENTS if not is_absent(level.get(key))}
    twice = [key for key in ARGUMENTS if sum(not is_absent(level.get(key)) for level in levels) > 1]
    if twice or len(given) > 1:
        found = f"{twice[0]!r} twice" if twice else f"both {' and '.join(map(repr, given))}"
        raise ValueError(f"call {number} has {found}; keep one")
    try:
        # what JSON text says was written; in an object Arrow may have filled in what other rows have
        value = next(iter(given.values()), {})
        arguments = parse_json(value) if isinstance(value, str) else without_nulls(value)
    except ValueError as error:
        raise ValueError(f"call {number}: the arguments are {error}") from None
    if not isinstance(arguments, dict):
        text = " in JSON text" if isinstance(value, str) else ""
        raise ValueError(f"call {number}: the arguments must be an object, not {kind_of(arguments)}{text}")
    return arguments
