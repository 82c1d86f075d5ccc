"""What every test on a GPU must leave as it was."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _default_stream() -> Iterator[None]:
    """The current stream is the default one, in order with bitsandbytes' kernels, also after a capture that failed."""
    yield
    if torch.cuda.is_available():
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
