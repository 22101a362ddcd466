#!/usr/bin/env bash
# Makes the tiny models from nothing but samples/. First samples/tiny_qwen_vl (about 20 minutes on two cores), and prints
# its accuracy on the validation questions of the tasks that it was trained on. The Chinese flags are held out for the
# LoRA example.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. OMP_NUM_THREADS=2
python runs/make_tiny_qwen_vl.py init runs/out/init
# First the base model's raw format, everything trainable: it supervises the answers alone. ChatML's markers, supervised
# too, drown the picture in a model without any knowledge. Then a few epochs of chat.
python train.py runs/tiny_qwen_vl.json
python train.py runs/tiny_qwen_vl.json --stage sft --model_name_or_path runs/out/trained --output_dir runs/out/chat \
    --num_train_epochs 4 --learning_rate 0.0005
python runs/make_tiny_qwen_vl.py round runs/out/chat samples/tiny_qwen_vl
python evaluate.py --model_name_or_path samples/tiny_qwen_vl --image_root samples \
    --data_files samples/pretrain/vqa_val_en.jsonl --data_files samples/pretrain/vqa_val_zh.jsonl

# BLIP-2 (about 12 minutes on one core): samples/tiny_blip2, and samples/blip2_stage1 that its stage 2 began with.
R=runs/out/blip2
python runs/make_tiny_blip2.py init $R
# The language model first, on the samples' English text: a picture is eight zero vectors yet, so it is encoded once.
python train.py runs/tiny_blip2.json --stage pretrain2 --model_name_or_path $R/language_model --output_dir $R/language \
    --freeze_include '["vision_model.*", "q*", "language_projection.*"]' --freeze_exclude '["language_model.*"]' \
    --max_steps 600 --image_jitter 0 --cache_image_features
# Stage 1. There is no tower that was trained before, so it is trained too.
python train.py runs/tiny_blip2.json --stage pretrain1 --model_name_or_path $R/stage1 --output_dir $R/trained1 \
    --freeze_exclude '["vision_model.*"]' --max_steps 700
# Stage 2, the tower frozen. The language model goes on learning: three layers that have read 2,000 short texts cannot
# be steered by a prefix as a real one can (CIDEr-D 0.3 with it frozen). The Q-Former stays as stage 1 left it, which so
# few pictures would spoil (0.7). The second run begins with stage 1's tower, but a new Q-Former, which it trains; the
# third has nothing of stage 1 and trains everything.
python runs/make_tiny_blip2.py tower $R/trained1 $R/tower
stage2() {
    python train.py runs/tiny_blip2.json --stage pretrain2 --model_name_or_path $R/language --init_from $R/$1 \
        --output_dir $R/from_$1 --freeze_exclude '["language_model.*"]' --max_steps 400 --warmup_steps 20 "${@:2}"
    python evaluate.py --model_name_or_path $R/from_$1 --stage pretrain2 --name coco_caption --image_root samples \
        --data_files samples/caption/captions_val_en.json
}
stage2 trained1 --freeze_include '["qformer.*", "query_tokens"]'
stage2 tower
stage2 language --freeze_exclude '["*"]'  # its own start: what init_from names is what it has
python runs/make_tiny_blip2.py round $R/from_trained1 samples/tiny_blip2
python runs/make_tiny_blip2.py round $R/trained1 samples/blip2_stage1

# VisualGLM (about 17 minutes on one core): samples/tiny_visualglm. Its tower begins as the tiny Qwen-VL's, and stays as it
# is until the Q-Former and the language model can read it: gradients of models that can't would only spoil it.
python runs/make_tiny_visualglm.py init runs/out/init_glm
python train.py runs/tiny_visualglm.json --freeze_include 'image_encoder.vit.*' --learning_rate 0.0015 \
    --output_dir runs/out/first_glm
python train.py runs/tiny_visualglm.json --model_name_or_path runs/out/first_glm
python runs/make_tiny_visualglm.py round runs/out/trained_glm samples/tiny_visualglm
python evaluate.py --model visualglm --image_root samples \
    --data_files samples/pretrain/vqa_val_en.jsonl --data_files samples/pretrain/vqa_val_zh.jsonl
