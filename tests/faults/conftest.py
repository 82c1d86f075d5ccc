"""The fixture that counts every try of a fault."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tally import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """The tally of a test marked `@pytest.mark.fault("T1")`."""
    marker = request.node.get_closest_marker("fault")
    assert marker is not None, "mark the test with the number of its fault"
    counted = Tally(marker.args[0])
    began = time.monotonic()
    yield counted
    record = {
        "test": counted.name,
        "what": request.node.name,
        "tries": len(counted.tries),
        "count": counted.count,
        "failures": len(counted.failures),
        "seconds": round(time.monotonic() - began, 1),
    }
    if "HANDLOOP_TALLY" in os.environ:
        with Path(os.environ["HANDLOOP_TALLY"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    assert counted.count, "the test has checked nothing"
    assert not counted.failures, f"{len(counted.failures)} of {counted.count}: " + "; ".join(counted.failures[:10])
