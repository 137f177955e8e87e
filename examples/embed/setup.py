"""Build walk_cython: `python setup.py build_ext --inplace`."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import kvmmu

EXTENSION = Extension("walk_cython", ["walk_cython.pyx"], include_dirs=[kvmmu.get_include()])
setup(name="walk_cython", ext_modules=cythonize([EXTENSION], compiler_directives={"language_level": 3}))
