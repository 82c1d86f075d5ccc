"""Recipes that hardly fit the data."""

import re
from dataclasses import replace

from train.config import BatchConfig, Config, OptimConfig, TrainConfig, ValidateConfig
from train.profiles import PROFILES, data_alone
from train.recipe import decided, forgot, longer, recipe_warnings, taught_little


def recipe(epochs: int = 3, max_steps: int = 0, accumulation: int = 1) -> Config:
    return replace(
        data_alone(),
        train=TrainConfig(epochs=epochs, max_steps=max_steps),
        batch=BatchConfig(per_device=1, accumulation=accumulation),
    )


def test_a_warmup_that_is_too_long() -> None:
    """Longer than a third of the run, it is told with a share that is not warned about."""
    for warmup, steps in ((98, 120), (120, 120), (41, 120), (98, 290)):
        (said,) = recipe_warnings(recipe(), 90, steps // 3, steps, warmup)
        assert f"the warmup of {warmup} steps" in said
        (share,) = re.findall(r"--optim\.warmup ([\d.]+) is", said)
        assert recipe_warnings(recipe(), 90, steps // 3, steps, int(float(share) * steps)) == []
    for warmup, steps in ((98, 984), (40, 120), (0, 120)):
        assert recipe_warnings(recipe(), 90, steps // 3, steps, warmup) == []


def test_a_learning_rate_of_no_use() -> None:
    """A thousand times too high or low is said, by what is trained; what profiles have is not."""
    for rate, method, said in ((5.0, "lora", "high"), (1e-8, "lora", "low"), (0.01, "full", "high")):
        config = replace(recipe(), optim=OptimConfig(lr=rate), train=TrainConfig(method=method))
        assert f"is {said};" in recipe_warnings(config, 600, 40, 120, 0)[0]
    for name, profile in PROFILES.items():
        assert not any("learning rate" in line for line in recipe_warnings(profile(), 600, 40, 120, 0)), name


def test_too_few_steps() -> None:
    """Each way out that is named gives about as many steps as are wanted; a number that was asked for is no mistake."""
    (said,) = recipe_warnings(recipe(epochs=3, accumulation=16), 60, 6, 18, 0)
    (accumulation,) = re.findall(r"--batch\.accumulation (\d+)", said)
    assert 18 * 16 / int(accumulation) >= 100
    config = recipe(epochs=3)
    config = replace(config, batch=BatchConfig(per_device=2, accumulation=16, samples=30))
    (samples,) = re.findall(r"--batch\.samples (\d+)", recipe_warnings(config, 180, 6, 18, 0)[0])
    assert 18 * 30 / int(samples) >= 100
    (epochs, steps) = re.findall(r"--train\.epochs (\d+) makes (\d+)", said)[0]
    assert int(epochs) * 6 == int(steps) >= 100
    (said,) = recipe_warnings(recipe(epochs=1), 2, 1, 1, 0)
    assert "more data" in said
    assert recipe_warnings(recipe(max_steps=12), 600, 40, 12, 0) == []
    assert recipe_warnings(recipe(), 600, 40, 120, 0) == []


def test_a_short_run_that_taught_little() -> None:
    """Said with a number of epochs that is enough and more than before; not of long runs, nor where half is right."""
    said = taught_little(0, 24, 39, 3)
    assert "39 steps taught little: 0 of 24" in said
    assert "--train.epochs 16 --run.resume never" in said
    assert "more data" in taught_little(0, 2, 20, 20)
    assert taught_little(12, 24, 39, 3) == taught_little(0, 24, 200, 3) == ""


def run_of(words: str, steps_per_epoch: int) -> int:
    """The steps of the run that the options in a piece of advice make."""
    (epochs,) = re.findall(r"--train\.epochs (\d+)", words)
    most = [int(number) for number in re.findall(r"--train\.max_steps (\d+) --", words)]
    return min(most[-1] if most and most[-1] else 10**9, int(epochs) * steps_per_epoch)


def test_advice_where_the_steps_were_limited() -> None:
    """A limit of steps that would cap the longer run as well is lifted by the advice, at the start and at the end."""
    for steps, epochs, most in ((4, 4 / 16, 4), (6, 0.375, 6), (48, 3, 60)):
        said = taught_little(0, 24, steps, epochs, most)
        assert "--train.max_steps 0 --train.epochs 13 --run.resume never" in said
        assert run_of(said, 16) == 13 * 16
        assert (f"--train.max_steps {most} was the limit" in said) == (steps == most)
    said = taught_little(0, 2, 4, 4, 4)
    assert "--train.max_steps 4 was the limit: more data does, without that limit" in said
    assert "max_steps" not in taught_little(0, 24, 48, 3, 500)
    (said,) = recipe_warnings(recipe(epochs=3, max_steps=60), 600, 16, 48, 0)
    assert "--train.max_steps 0 --train.epochs 13 makes 208" in said
    assert longer(recipe(3, 4).train, 16) == "--train.max_steps 8"
    assert longer(recipe(3, 60).train, 16) == "--train.max_steps 0 --train.epochs 6"
    assert longer(recipe(3).train, 16) == longer(recipe(3, 96).train, 16) == "--train.epochs 6"


def test_which_limit_decided_is_said() -> None:
    """Of two limits the smaller one, with what lets the other decide; nothing where there is one alone."""
    assert decided(recipe(3).train, 16) == ""
    assert decided(recipe(3, 4).train, 16) == "by --train.max_steps 4, which comes before the 48 of --train.epochs 3"
    said = decided(recipe(3, 60).train, 16)
    assert said.startswith("by --train.epochs 3, which comes before --train.max_steps 60; --train.epochs 4 ")
    assert "both" in decided(recipe(3, 48).train, 16)


def test_a_base_that_forgot() -> None:
    """Said where most of what it knew is lost, with the rows that keep it; not where it knew little."""
    assert "1 of 24 right, 17 before" in forgot(1, 17, 24)
    assert "demo/everyday.jsonl" in forgot(10, 17, 24)
    assert forgot(11, 17, 24) == forgot(0, 3, 24) == ""


def test_more_epochs_than_the_rows_deserve() -> None:
    """Many rows deserve fewer passes than few; who stops by validation is not told."""
    assert "12 epochs over 9,000 samples" in recipe_warnings(recipe(12), 9000, 1000, 12000, 0)[0]
    assert "40 epochs over 60 samples" in recipe_warnings(recipe(40), 60, 4, 160, 0)[0]
    for epochs, samples in ((3, 9000), (5, 9000), (20, 60), (12, 655)):
        assert recipe_warnings(recipe(epochs), samples, 100, epochs * 100, 0) == []
    for stopping in (ValidateConfig(patience=2), ValidateConfig(final="best")):
        assert recipe_warnings(replace(recipe(40), validate=stopping), 60, 4, 160, 0) == []


def test_the_profiles_fit_the_bundled_data() -> None:
    """No profile is warned about on the glossary of 655 rows."""
    for make in PROFILES.values():
        config = make()
        batch = config.batch.per_device * config.batch.accumulation
        steps = -(-655 // batch)
        share = float(config.optim.warmup)
        total = steps * config.train.epochs
        assert recipe_warnings(config, 655, steps, total, int(share * total)) == []
