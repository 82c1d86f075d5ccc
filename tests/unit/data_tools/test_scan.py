"""What the audit recognises in a text and in the order of a conversation's turns."""

import pytest

from data_tools.facts import CONTROL, MOJIBAKE, role_problem


@pytest.mark.parametrize("codec", ["cp1252", "latin-1"])
@pytest.mark.parametrize(
    "text", ["é", "für", "naïve", "it\u2019s", "“quoted”", "5 €", "a \u2013 b", "🎉", "привет", "20 °C"]
)
def test_mojibake_is_recognised(text: str, codec: str) -> None:
    """UTF-8 that was decoded with the wrong codec."""
    garbled = text.encode().decode(codec, "replace")
    assert MOJIBAKE.search(garbled), garbled


@pytest.mark.parametrize(
    "text",
    [
        "São João, «IRMû», “AMANHÔ",
        "« CAFÉ » «CAFÉ»",
        "Ångström Ñandú â",
        "ÐÑ русский",
        "日本語 🎉 naïve 20 °C \u2013 €5",
    ],
)
def test_good_text_is_not_garbage(text: str) -> None:
    """Accents, capitals before closing quotes, other scripts and emoji are no finding."""
    assert not MOJIBAKE.search(text)
    assert not CONTROL.search(text)
    assert not CONTROL.search("tab\t line\r\n")


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        ("system user assistant", ""),
        ("user assistant tool tool assistant user assistant", ""),
        ("assistant user", "begins with assistant"),
        ("system", "nothing follows the system turn"),
        ("user user assistant", "user after user"),
        ("user system assistant", "system after user"),
        ("user assistant assistant", "assistant after assistant"),
        ("user assistant user", "ends with user"),
    ],
)
def test_order_of_roles(roles: str, problem: str) -> None:
    """System comes first if at all, user and assistant alternate, tools follow the assistant, which comes last."""
    assert role_problem(roles.split()) == problem
