# SPDX-License-Identifier: MIT
"""The ablations' command on a few images, and that each listed variant can be trained."""

import json
from pathlib import Path

import ablation
import pytest
import yaml
from test_training import CONFIG

from fpt_model import FlowPokeTransformer
from sim.dataset import GENERATOR, Settings, write_dataset
from training.config import RunConfig

TINY = Path("training/configs/tiny.yaml")


def test_every_variant_is_a_run_of_its_own() -> None:
    variants = ablation.load_variants(ablation.HERE / "ablations.yaml")
    assert not variants[0].overrides, "what the others are held against"
    configs = [ablation.configuration(TINY, v, 1000, ()) for v in variants]
    assert len({json.dumps(c.to_dict()) for c in configs}) == len(variants)
    assert len({v.folder for v in variants}) == len(variants)
    for v, config in zip(variants, configs, strict=True):
        assert config.optim.steps == 1000
        assert (config.optim.seed == configs[0].optim.seed) == ("seed=1" not in str(v.overrides))
        if config.model != configs[0].model:
            FlowPokeTransformer(config.model)
    about = " ".join(v.question for v in variants)
    asked = "ViT from scratch", "patch size", "resolution", "components", "pokes", "EMA", "camera"
    assert all(word in about for word in asked)


def test_from_variants_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_dataset(tmp_path, split, 12, Settings(size=64, images_per_shard=12))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(CONFIG.to_dict()))
    chosen = "as configured", "1 component"
    table = tmp_path / "table.md"
    command = (
        *("--quick", "--variants", *chosen, "--data", tmp_path),
        *("--config", tmp_path / "small.yaml", "--out", tmp_path / "runs", "--table", table),
        *("--scenes", 3, "--set", "optim.segment_weight=0.5"),
    )
    ablation.main(list(map(str, command)))
    results = json.loads(table.with_suffix(".json").read_text())
    assert (results["steps"], results["seed"], results["scenes"]) == (4, 0, 3)
    assert (results["images"], results["generator"]) == (12, GENERATOR)
    assert [row["name"] for row in results["rows"]] == list(chosen)
    mixture, single = results["rows"]
    assert mixture["parameters"] > single["parameters"] > 0
    for row in results["rows"]:
        assert 0 < row["epe_over_no_motion"] < 100
    assert single["best_of_two_over_mean"] == pytest.approx(1), "one mode, which is the mean"
    made = RunConfig.load(tmp_path / "runs" / "1-component" / "config.yaml")
    assert (made.model.components, made.optim.segment_weight, made.optim.steps) == (1, 0.5, 4)
    text = table.read_text()
    made_model = tmp_path / "runs" / "1-component" / "model.safetensors"
    before = made_model.stat().st_mtime_ns
    ablation.main(list(map(str, command)))
    assert made_model.stat().st_mtime_ns == before, "neither trained nor measured again"
    assert json.loads(table.with_suffix(".json").read_text()) == results
    assert text in capsys.readouterr().out
    assert f"| 1 component | number of components | {single['parameters']:.3f} |" in text


def test_unknown_variants_are_named() -> None:
    with pytest.raises(ValueError, match="no variant 'bigger'"):
        ablation.load_variants(ablation.HERE / "ablations.yaml", ["bigger"])
