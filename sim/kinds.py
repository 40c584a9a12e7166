# SPDX-License-Identifier: MIT
"""Names of the object kinds, and which of them a model may be trained on."""

TRAIN_KINDS = ("drawer", "door", "slider", "knob", "arm", "body", "assembly")
"""Kinds of the "train" and "val" splits."""

HELD_OUT_KINDS = ("lid", "lever", "turntable")
"""Kinds of the "held_out" split; they differ in shape and hinge axis from the training kinds."""


def split_kinds(kind: str) -> tuple[str, ...]:
    """Returns the kinds that may share a scene with `kind`; ValueError for an unknown name."""
    for kinds in (TRAIN_KINDS, HELD_OUT_KINDS):
        if kind in kinds:
            return kinds
    raise ValueError(f"unknown kind {kind!r}, expected one of {TRAIN_KINDS + HELD_OUT_KINDS}")
