"""What somebody wants -> the line, as it stands in the README or in a file's first lines: each runs."""

import shlex

import pytest
from ranks import run

import evaluate
import train
from runs import compare, make_grounding

SHORT = "--max_steps 2 --num_workers 0 --evaluate no --save no"
LINES = {
    "a rate per part": """train.py --model qwen_vl --dry_run
        --learning_rate_rules '{"transformer.visual.*": 2e-6}'""",
    "decay over the tower": """train.py --model blip2 --vision_lr_decay 0.9 --dry_run
        --freeze_exclude 'vision_model.*'""",
    "LoRA+": f"train.py --model qwen_vl --lora --loraplus_lr_ratio 16 {SHORT}",
    "stop early": """train.py --model qwen_vl --lora --evaluate 2 --early_stopping_patience 3
        --max_steps 2 --num_workers 0""",
    "answers while it trains": f"train.py --model visualglm --lora --sample_steps 2 {SHORT}",
    "what is forgotten": f"""train.py --model qwen_vl --lora {SHORT} --dataset '{{"train": [{{"data_files":
        "samples/flags_zh/val.jsonl", "image_root": "samples"}}], "probe": [{{"data_files":
        "samples/flags_en/val.jsonl", "image_root": "samples", "max_samples": 4}}]}}' --max_length 512""",
    "other logs": f"train.py --model qwen_vl --lora --report_to none {SHORT}",
    "boxes": f"train.py configs/qwen_vl/samples_grounding.json --per_device_train_batch_size 2 {SHORT}",
}
MAINS = {"train.py": train.main, "evaluate.py": evaluate.main}


@pytest.mark.slow
@pytest.mark.parametrize("want", LINES)
def test_the_line_runs(want, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        make_grounding.make(tmp_path / "grounding", split, 4, 0)
    script, *argv = shlex.split(LINES[want])
    run(argv, main=MAINS[script])
    said = capfd.readouterr().out
    assert {"a rate per part": "rule transformer.visual.*", "LoRA+": "loraplus_lr_ratio"}.get(
        want, ""
    ) in said
    if want == "what is forgotten":
        assert "probe | loss" in said
    if want == "stop early":
        assert compare.main(["output", "output"]) == 0
