# SPDX-License-Identifier: MIT
"""The sub-commands of ``fpt``, one module each."""
