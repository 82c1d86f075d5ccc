"""`handloop glossary`: calls the data tool, which needs nothing from train/."""

from data_tools.glossary import main as run


def main(words: list[str]) -> int:
    """See data_tools.glossary.main."""
    return run(words)
