
from Cython.Build import cythonize
from setuptools import Extension, setup

import kvmmu

setup(name="internals", ext_modules=cythonize(
    [Extension("kvmmu_internals", ["kvmmu_internals.pyx"], include_dirs=[kvmmu.get_include()])],
    compiler_directives={"language_level": 3, "nonecheck": True}))
