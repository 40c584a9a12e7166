# SPDX-License-Identifier: MIT
"""Training and evaluation of Flow Poke Transformers."""
