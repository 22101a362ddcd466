"""Seeing that a run learns: answers to a few questions while it trains, an end when it learns no more, and
what it forgets.

    python train.py --model qwen_vl --lora --sample_steps 20 --evaluate 20 --early_stopping_patience 3
    python train.py --dataset '{"train": [...], "eval": [...], "probe": [{"data_files": "general.json"}]}'

What is counted stands in the training state (`since_best`, `probe`), so a run that was killed stops at the
same step and compares with the same scores. train.py's Run calls these; with the keys off they cost nothing.
"""

import parallel
from config import Config
from draw import draw_boxes
from terminal import cut

QUESTIONS = 4  # of sample_steps, spread over the evaluation set
HIGHER_IS_WORSE = ("loss",)  # what a score's name begins with


def out_of_patience(state: dict, cfg: Config) -> bool:
    """Whether so many evaluations in a row have not been better than the best one."""
    return cfg.early_stopping_patience is not None and state["since_best"] >= cfg.early_stopping_patience


def stops_early(run) -> bool:
    """The same of a run, which says why it ends."""
    cfg, state = run.cfg, run.state
    if not out_of_patience(state, cfg):
        return False
    best, hint = "no evaluation gave a number", ""
    if state["best_step"]:
        score = f"{cfg.metric_for_best_model} {state['best_metric']:.4f}"
        best = f"{score} of step {state['best_step']} is the best"
    if not cfg.load_best_model_at_end:
        hint = "; load_best_model_at_end=true would publish the best model"
    run.say(
        f"early stopping after step {state['step']} of {run.total}: {best}, and {state['since_best']} "
        f"evaluations since are no better (early_stopping_patience={cfg.early_stopping_patience}){hint}",
        flush=True,
    )
    return True


def questions(run) -> list:
    """The same few of the evaluation set for the whole run, without what is the same question again."""
    index = run.eval_plan.index
    numbers = {n * len(index) // QUESTIONS for n in range(QUESTIONS)}
    return [index.conversation(n) for n in sorted(numbers)]


def show_answers(run) -> None:  # all ranks
    """Prints and logs greedy answers; boxes are drawn into output_dir/samples."""
    import evaluate  # it imports generate.py, which training alone needs not

    if not hasattr(run, "questions"):
        run.questions = questions(run)
    step, how, bad = run.state["step"], evaluate.Decoding(max_new_tokens=48), []
    size = run.cfg.per_device_eval_batch_size
    run.settle()
    run.model.eval()
    try:
        with run.autocast:
            answers = list(evaluate.answer_all(run.model, run.processor, run.questions, size, how, bad))
    finally:
        parallel.reshard(run.model)
        run.model.train()
    samples = []
    for n, (asked, answer) in enumerate(zip(run.questions, answers, strict=True)):
        if answer is None:  # its image cannot be read, which is said
            continue
        about = {"where": asked.where, "question": evaluate.question(asked), "answer": answer}
        samples.append({**about, "reference": asked.answers[0]})
        said = (cut(text, 160) for text in (about["question"], answer, asked.answers[0]))
        run.say("sample | {} -> {} (reference {})".format(*said), flush=True)
        if run.world.main and asked.images:
            begun = "" if "<box>" in answer or asked.kind != "grounding" else "<box>"  # by the base's prompt
            draw_boxes(asked.images[-1], begun + answer, run.out / "samples" / f"{step:06d}-{n}.png")
    if run.log:
        run.log.write({"step": step, "samples": samples})


def probe(run) -> dict[str, float]:  # all ranks
    """The scores of the probe set: its loss, and with eval_with_do_generation its answers'."""
    scores = run.scores(run.probe_plan)
    return {name.removeprefix("eval_"): value for name, value in scores.items() if "/" not in name}


def begin_probe(run) -> None:  # all ranks
    """Before the first step; a continued run has the scores in its state."""
    if run.cfg.do_train and run.probe_plan is not None and run.state["probe"] is None:
        run.state["probe"] = probe(run)
        step = run.state["step"]
        when = f"after step {step}, the first time" if step else "before training"
        run.say(f"probe {when} | " + shown(run.state["probe"]), flush=True)


def end_probe(run) -> None:  # all ranks
    """After training: the scores, and by how much each is worse than before."""
    before = run.state["probe"]
    if run.probe_plan is None or before is None:
        return
    after = probe(run)
    # A continued run may score more, or less, than when it began.
    sign = {k: 1 if k.startswith(HIGHER_IS_WORSE) else -1 for k in after if k in before}
    worse = {k: (after[k] - before[k]) * sign[k] for k in sign}
    run.say("probe after training | " + shown(after), flush=True)
    drops = (f"{k} {'worse' if v > 0 else 'better'} by {abs(v):.4f}" for k, v in worse.items())
    run.say("probe | " + " | ".join(drops), flush=True)
    if run.log:
        names = {"before": before, "after": after, "drop": worse}
        flat = {f"probe_{name}_{k}": v for name, scores in names.items() for k, v in scores.items()}
        run.log.write({"step": run.state["step"], **flat, "final": True})


def shown(scores: dict[str, float]) -> str:
    return " | ".join(f"{name} {value:.4f}" for name, value in scores.items())
