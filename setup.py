"""What pyproject.toml cannot say: what is bundled lies beside train/ in a checkout, and within it in a wheel."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLED = ("demo", "accelerate_configs")
LEFT_OUT = ("make_base.py", "vocabulary.jsonl")  # how the bundled base was made


class BuildWithBundled(build_py):
    """Adds the bundled files to train/bundled_files/, where train/bundled.py finds them, and to a source archive."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install finds them in the checkout
            for target, source in self._bundled().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self._bundled().values()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        added = [] if self.editable_mode else list(self._bundled())
        return [*super().get_outputs(include_bytecode), *added]

    def _bundled(self) -> dict[str, str]:
        """Target -> source."""
        found = (path for folder in BUNDLED for path in sorted(Path(folder).rglob("*")) if path.is_file())
        wanted = [path for path in found if path.name not in LEFT_OUT and path.suffix != ".pyc"]
        return {str(Path(self.build_lib, "train", "bundled_files", path)): str(path) for path in wanted}


setup(cmdclass={"build_py": BuildWithBundled})
