# SPDX-License-Identifier: MIT
"""Evaluation: the paper's tables and more, for the suites in ``training/suites`` (one YAML each).

``fpt eval --suite NAME --model M --data DIR --out OUT`` writes OUT/figures.json, OUT/figures.md and
plots. The protocol is in ``docs/evaluation.md``; the modules follow it: `suite` (what is asked),
`scenes` (which pictures, what is true), `measure` (all that is measured on one scene), `figures`
(scenes to figures), `report` (tables, plots), `run` (the whole).
"""
