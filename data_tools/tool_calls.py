"""Tool definitions, tool calls and template arguments, as objects or JSON text -> as chat templates expect them."""

from collections.abc import Mapping
from typing import Any

from data_tools.strict_json import parse_json
from data_tools.values import check_plain, is_absent, json_or_same, kind_of, without_absent, without_nulls


def tools_of(value: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions as templates expect them, from a list or JSON text; raises ValueError for anything else."""
    value = json_or_same(value, "'tools'")
    if is_absent(value):
        return ()
    if not isinstance(value, list):
        raise ValueError(f"'tools' must be a list of tool definitions, not {kind_of(value)}")
    tools = []
    for number, tool in enumerate(value, start=1):
        tool = without_absent(json_or_same(tool, f"tool {number}"))
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise ValueError(f"tool {number} must be an object with a name")
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
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


TAKEN = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now"}
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


def _tool_call(call: Any, number: int) -> dict[str, Any]:
    call = json_or_same(call, f"call {number}")
    inner = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise ValueError(f"call {number} must be an object with the name and arguments of a function")
    given = [inner[key] for key in ("arguments", "parameters") if not is_absent(inner.get(key))]
    if len(given) > 1:
        raise ValueError(f"call {number} has both 'arguments' and 'parameters'; keep one")
    try:
        # what JSON text says was written; in an object Arrow may have filled in what other rows have
        value = given[0] if given else {}
        arguments = parse_json(value) if isinstance(value, str) else without_nulls(value)
    except ValueError as error:
        raise ValueError(f"call {number}: the arguments are {error}") from None
    if not isinstance(arguments, dict):
        text = " in JSON text" if isinstance(value, str) else ""
        raise ValueError(f"call {number}: the arguments must be an object, not {kind_of(arguments)}{text}")
    known = {"type", "function", "name", "arguments", "parameters"}
    rest = {key: value for key, value in call.items() if key not in known and not is_absent(value)}
    beside = {key: value for key, value in inner.items() if key not in known | set(rest) and not is_absent(value)}
    return {**rest, "type": "function", "function": {**beside, "name": inner["name"], "arguments": arguments}}
