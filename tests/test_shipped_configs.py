"""Every configuration in configs/ starts: those of samples/ for a step, those of published sizes dry."""

import json
from pathlib import Path

import pytest
from ranks import run

import estimate
import vlm
from config import parse_config
from runs import make_grounding

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("blip2", "qwen_vl", "visualglm")
CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("configs/*/*.json"))
CONFIGS = [name for name in CONFIGS if "/shapes/" not in name and "/eval_" not in name]
SHAPES = {
    "configs/blip2/pretrain1.json": "blip2-stage1",
    "configs/blip2": "blip2-opt-2.7b",
    "configs/qwen_vl": "qwen-vl-7b",
    "configs/visualglm": "visualglm-6b",
}


def test_there_are_configurations():
    assert len(CONFIGS) >= 21 and {Path(name).parent.name for name in CONFIGS} == set(FOLDERS)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_starts(tmp_path, capfd, monkeypatch, name):
    out = ["--output_dir", str(tmp_path / "out")]
    if "grounding" in name:
        monkeypatch.chdir(tmp_path)
        make_grounding.make(tmp_path / "grounding", "train", 20, 0)
        make_grounding.make(tmp_path / "grounding", "val", 2, 0)
    if "samples" in name:
        quick = ["--evaluation_strategy", "no", "--load_best_model_at_end", "false", "--do_eval", "false"]
        run([name, *out, "--max_steps", "1", "--num_workers", "0", *quick])
        assert "loss" in json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    else:  # without data, which are the user's
        shape = SHAPES.get(name) or SHAPES[str(Path(name).parent)]
        run([name, *out, "--model_name_or_path", shape, "--dry_run"])
        assert "GiB" in capfd.readouterr().out


def test_the_lora_configuration_serves_flan_t5_too():
    values = vlm.shape("blip2-flan-t5-xl")
    cfg = parse_config(["configs/blip2/lora.json", "--model_name_or_path", "blip2-flan-t5-xl"])
    model = estimate.network(cfg, values, vlm.find(values))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(".lora_" in name and "language_model" in name for name in names)
