"""Problems in the data, collected with their places and told together."""

from dataclasses import dataclass, field

from data_tools.terminal import escaped


class DataError(ValueError):
    """Data that cannot be used; the text says where, why, and what to do."""


@dataclass
class Report:
    """The number of problems, and the first `limit` of them."""

    limit: int = 20
    total: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        """Adds a problem; control characters are escaped, because file names and reasons may come from strangers."""
        self.total += 1
        if len(self.lines) < self.limit:
            self.lines.append(escaped(f"{where}: {reason}"))

    def raise_if_any(self, way_out: str = "") -> None:
        """Raises DataError with all problems, if there are any, and what can be done about them."""
        if self.total:
            more = [f"... and {self.total - len(self.lines)} more"] if self.total > len(self.lines) else []
            problems = f"{self.total} problem{'s' if self.total > 1 else ''} in the data"
            heading = f"{problems}, so none of it was used{f' ({way_out})' if way_out else ''}:"
            raise DataError("\n".join([heading, *self.lines, *more]))
