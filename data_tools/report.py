"""Problems in the data, collected with their places and told together."""

from dataclasses import dataclass, field

from data_tools.terminal import escaped

NUM_PLACES = 3  # named of equal problems


class DataError(ValueError):
    """Data that cannot be used; the text says where, why, and what to do."""


class Unread(str):
    """A reason for which the rest of a file was not read; it is never skipped as if it were one bad record."""

    __slots__ = ()


@dataclass
class Equal:
    """Problems for one reason: how many, and the first places."""

    reason: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        first, *others = self.places
        if not others:
            return f"{first}: {self.reason}"
        end = ", ..." if self.count > len(self.places) else ""
        named = ", ".join(place.rpartition("/")[2] for place in others)
        return f"{first}: {self.reason} ({self.count:,} times; next {named}{end})"


@dataclass
class Report:
    """The number of problems, and the first `limit` kinds of them."""

    limit: int = 20
    total: int = 0
    kinds: dict[str, Equal] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)  # where reading ended early, and why

    def add(self, where: str, reason: str) -> None:
        """Adds a problem; control characters are escaped, because file names and reasons may come from strangers."""
        self.total += 1
        is_unread, reason = isinstance(reason, Unread), escaped(reason)
        if is_unread:
            self.unread.append(f"{escaped(where)}: {reason}")
        if reason in self.kinds or len(self.kinds) < self.limit:
            kind = self.kinds.setdefault(reason, Equal(reason))
            kind.count += 1
            if len(kind.places) < NUM_PLACES:
                kind.places.append(escaped(where))

    @property
    def lines(self) -> list[str]:
        """A line for each kind of problem, in the order in which they were met."""
        return list(map(str, self.kinds.values()))

    def raise_if_any(self, way_out: str = "") -> None:
        """Raises DataError with all problems, if there are any, and what can be done about them."""
        if self.total:
            num_told = sum(kind.count for kind in self.kinds.values())
            more = [f"... and {self.total - num_told} more"] if self.total > num_told else []
            problems = f"{self.total} problem{'s' if self.total > 1 else ''} in the data"
            heading = f"{problems}, so none of it was used{f' ({way_out})' if way_out else ''}:"
            raise DataError("\n".join([heading, *self.lines, *more]))

    def raise_if_unread(self) -> None:
        """Raises DataError where the rest of a file was not read."""
        if self.unread:
            heading = (
                "some files were not read to their end, so none of the data was used; no option skips more than "
                "single rows: mend the files at these places, or take them out of --data.path:"
            )
            raise DataError("\n".join([heading, *self.unread[: self.limit]]))
