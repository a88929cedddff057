"""The packages of the wheel; everything else is in pyproject.toml.

The package itself is found by its folders. Two folders stay at the top level, where readers look for them, and are
mapped into it: `kernels/src`, imported as `vlmedit.kernels` (transformers and diffusers probe for a package called
`kernels`), and `notebooks`, which travels as data.
"""

from setuptools import find_packages, setup

MAPPED = {"vlmedit.kernels": "kernels/src", "vlmedit.notebooks": "notebooks"}

setup(
    packages=[*find_packages(include=["vlmedit", "vlmedit.*"]), *MAPPED], package_dir={"vlmedit": "vlmedit", **MAPPED}
)
