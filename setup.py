"""The rest stands in pyproject.toml.

Were kernels/ named there in package-dir, an editable install would be an import hook at the end of the queue, and a
script beside a clone that is called igpt would find the clone's folder as an empty namespace first.
"""

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    def get_package_dir(self, package):
        """In a checkout igpt/kernels/__init__.py points at the top-level folder, which has no __init__.py: Hugging
        Face's `kernels` package must stay importable beside it. An installed package holds the folder's files."""
        return "kernels" if package == "igpt.kernels" else super().get_package_dir(package)


setup(cmdclass={"build_py": BuildPy})
