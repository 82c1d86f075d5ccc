"""What the banner says before a run."""

import re

from train.banner import warmup_warning


def test_a_warmup_that_is_too_long_gets_one_that_fits() -> None:
    """Longer than a third of the run: the number that is named is a tenth of its steps, and is not warned about."""
    for warmup, steps in ((98, 40), (40, 40), (14, 40), (2, 5), (1, 1), (98, 290)):
        said = warmup_warning(warmup, steps)
        assert said.startswith(f"optim.warmup {warmup} ")
        (advised,) = re.findall(r"--optim\.warmup (\d+) is a tenth", said)
        assert int(advised) == steps // 10
        assert warmup_warning(int(advised), steps) == ""
    assert "none of the run's 40 steps" in warmup_warning(40, 40)
    assert "34% of the run's 290 steps" in warmup_warning(98, 290)
    for warmup, steps in ((98, 984), (13, 40), (0, 1), (1, 3)):
        assert warmup_warning(warmup, steps) == ""
