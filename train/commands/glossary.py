"""`handloop glossary`: hands over to the tool, which needs nothing of training."""

from data_tools.glossary import main as run


def main(words: list[str]) -> int:
    """As data_tools.glossary.main."""
    return int(run(words) or 0)
