"""The tests lie where they are looked for."""

import re

from tests.conftest import ROOT


def test_the_quick_tier_is_a_part_of_the_whole() -> None:
    """--quick runs some of the tests that the whole runs: all but the faults and the real command."""
    script = (ROOT / "launch" / "test.sh").read_text(encoding="utf-8")
    match = re.search(r"^quick=\((.+)\)$", script, re.MULTILINE)
    assert match is not None
    quick = [ROOT / name for name in match[1].split()]
    whole = {path for path in (ROOT / "tests").rglob("test_*.py") if not path.is_relative_to(ROOT / "tests" / "gpu")}
    chosen = {test for path in quick for test in ([path] if path.is_file() else path.rglob("test_*.py"))}
    assert all(path.exists() for path in quick)
    assert chosen < whole
    assert {test.parent.name for test in whole - chosen} == {"faults", "integration"}


# Tests of what no single module has.
ACROSS_MODULES = {
    "test_loss_scale",
    "test_security",
    "test_chosen_plans",
    "test_refusals",
    "test_scripts",
}


def test_unit_tests_mirror_the_tree() -> None:
    """Each file in tests/unit is named after the module that it tests, and lies where that module does."""
    files = sorted((ROOT / "tests" / "unit").rglob("test_*.py"))
    assert len(files) > 40
    for path in files:
        folder = path.parent.relative_to(ROOT / "tests" / "unit")
        base = ROOT if folder.as_posix() in ("data_tools", "launch") else ROOT / "train"
        tested = base / folder / f"{path.stem.removeprefix('test_')}.py"
        assert tested.exists() or path.stem in ACROSS_MODULES, f"{path}: there is no {tested}"
