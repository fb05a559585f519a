"""Puts registry.yaml, which lies at the root of a checkout, into the built package. Everything else is in pyproject."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRegistry(build_py):
    """The stock build plus one data file."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "weightsmith" / "registry.yaml"
            self.mkpath(str(target.parent))
            self.copy_file("registry.yaml", str(target))


setup(cmdclass={"build_py": BuildWithRegistry})
