"""What is said about a loss, and what is not."""

import math
import random

from train.track.loss_watch import SPAN, LossWatch


def said(losses: list[float]) -> list[tuple[int, str]]:
    """(position, warning) of every warning."""
    watch = LossWatch()
    return [(i, warning) for i, loss in enumerate(losses) if (warning := watch.check(loss))]


def noisy(start: float, end: float, steps: int, noise: float = 0.05) -> list[float]:
    draw = random.Random(0)
    return [start + (end - start) * i / steps + draw.gauss(0, noise) for i in range(steps)]


def test_a_jump_is_said_once_where_it_is() -> None:
    """A falling noisy loss is quiet; one that doubles in a step is named with what it was."""
    falling = noisy(3.0, 1.0, 150)
    assert said(falling) == []
    jumped = [*falling[:100], 5.0, *falling[101:]]
    ((position, warning),) = said(jumped)
    assert position == 100
    assert warning.startswith("the loss jumped to 5.0000 from about 1.9")


def test_one_hard_batch_is_no_jump() -> None:
    """A step that is somewhat high is said only with the one behind it; afterwards the watch is as before."""
    falling = noisy(3.0, 1.0, 150)
    watch = LossWatch()
    for loss in falling[:100]:
        watch.check(loss)
    high = watch.mean + 8 * math.sqrt(watch.variance)
    assert said([*falling[:100], high, *falling[101:]]) == []
    ((position, warning),) = said([*falling[:100], high, high, *falling[102:]])
    assert position == 101
    assert warning.startswith(f"the loss jumped to {high:.4f} from about {watch.mean:.4f}")
    assert [place for place, _ in said([*falling[:100], high, *falling[101:120], 5.0, 5.0])] == [121]


def test_the_start_of_training_is_no_jump() -> None:
    """The first steps may do what they like; what is not a number is another's matter."""
    assert said([5.0, 9.0, 2.0, 12.0, 4.0]) == []
    assert said([*noisy(3.0, 2.0, 50), math.nan, math.inf, *noisy(2.0, 1.5, 50)]) == []


def test_a_standstill_is_said_every_so_many_steps() -> None:
    """No fall over two spans: one warning at their end, and one more after two more; a falling loss: none."""
    flat = said(noisy(2.0, 2.0, 4 * SPAN))
    assert [position for position, _ in flat] == [2 * SPAN - 1, 4 * SPAN - 1]
    assert "has not fallen: mean" in flat[0][1]
    assert said(noisy(2.0, 1.5, 4 * SPAN)) == []
