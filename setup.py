"""Puts `hub_card.md`, which is next to the packages, into the wheel as `longvlm/hub_card.md`.

Everything else about the build is in `pyproject.toml`. An editable install reads the file in the checkout.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CARD = "hub_card.md"


class BuildWithCard(build_py):
    @property
    def _target(self) -> str:
        return str(Path(self.build_lib) / "longvlm" / CARD)

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file(CARD, self._target, preserve_mode=False)

    def get_outputs(self, include_bytecode=1):
        return [*super().get_outputs(include_bytecode), self._target]

    def get_output_mapping(self):
        return {**super().get_output_mapping(), self._target: CARD}


setup(cmdclass={"build_py": BuildWithCard})
