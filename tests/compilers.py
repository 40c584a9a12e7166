# SPDX-License-Identifier: MIT
"""Whether there is a C++ compiler for what the library builds on the user's machine."""

import shutil

import pytest

from fpt_model.native import compiler

needs_compiler = pytest.mark.skipif(not shutil.which(compiler()[0]), reason="needs a C++ compiler")
