"""What all tests share: options, threads, and the golden variants that a test is run for.

    python -m pytest          # all but slow tests, in two processes, with the golden files in tests/goldens
    python -m pytest -m slow  # the slow ones
    python -m pytest -n 0     # in one process
    python -m pytest tests -k golden --goldens DIR  # the golden tests, with another set of files

(Name `tests` there: pytest takes an existing DIR outside the repository for a test path before it has read
this file.)

A test that takes an argument named in VARIANTS (e.g. `qwen_vl_variant`) runs once per variant directory found
below the golden root; where a set lacks the kind it is skipped with the reason, and fails where the set has
none at all.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # spinning threads of several test processes starve each other

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

with contextlib.suppress(ImportError):
    import triton  # noqa: E402, F401  (before the kernels, which a torch without a GPU's code has no use for)

from small import filled  # noqa: E402

import checkpoint  # noqa: E402
import model_qwen_vl as qwen  # noqa: E402
import tokenizer_qwen_vl
import vlm  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share the cores, and so do the commands they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
else:
    torch.set_num_threads(2)

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {  # test argument -> directories below the golden root, or a file that each of them holds
    "qwen_vl_variant": "qwen_vl/tiny_*",
    "blip2_opt": "blip2/hf_opt_*",
    "blip2_t5": "blip2/hf_t5_*",
    "blip2_itm": "blip2/hf_itm_*",
    "blip2_lora": "blip2/lora_*",
    "blip2_stage1": "blip2/lavis_stage1_[!d]*",
    "blip2_stage1_ddp": "blip2/lavis_stage1_ddp*",
    "blip2_stage2": "blip2/lavis_stage2_*",
    "visualglm_variant": "visualglm/*/golden.json",
}


def pytest_addoption(parser):
    parser.addoption(
        "--goldens", metavar="DIR", default=str(ROOT / "tests" / "goldens"), help="root of golden files"
    )
    parser.addoption(
        "--tokenizers", metavar="DIR", default=None, help="real tokenizer files; without them tests skip"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in two processes, a file of tests in one of them (they share what they set up)."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = 2, "loadfile"


def pytest_configure(config):
    cwd = config.invocation_params.dir
    config.goldens = (cwd / config.getoption("--goldens")).resolve()
    if not config.goldens.is_dir():
        raise pytest.UsageError(f"--goldens {config.goldens} is no directory")
    given = config.getoption("--tokenizers")
    if given is not None:
        config.tokenizers = (cwd / given).resolve()
        if not config.tokenizers.is_dir():
            raise pytest.UsageError(f"--tokenizers {config.tokenizers} is no directory")
    else:
        beside = ROOT / "../shared/tokenizers"
        config.tokenizers = beside.resolve() if beside.is_dir() else None


def pytest_generate_tests(metafunc):
    for argument, pattern in VARIANTS.items():
        if argument in metafunc.fixturenames:
            found = sorted(p if p.is_dir() else p.parent for p in metafunc.config.goldens.glob(pattern))
            # one case that says so, not none: an empty parameter list would be a silent skip
            metafunc.parametrize(
                argument, found or [None], ids=[p.name for p in found] or ["none"], indirect=True
            )


def missing_in_the_set(config, error: FileNotFoundError) -> str | None:
    """What another set of goldens does not hold; our own set is whole."""
    inside = str(config.goldens) in str(error) and config.goldens != (ROOT / "tests/goldens").resolve()
    return f"this set of goldens lacks a file: {error}" if inside else None


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except FileNotFoundError as e:
        if reason := missing_in_the_set(pyfuncitem.config, e):
            pytest.skip(reason)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(request):
    try:
        return (yield)
    except FileNotFoundError as e:
        if reason := missing_in_the_set(request.config, e):
            pytest.skip(reason)
        raise


def variant_fixture(argument: str):
    """A fixture that gives one directory of the golden root."""

    def variant(request) -> Path:
        if request.param is None:
            missing = f"no variant {VARIANTS[argument]} below {request.config.goldens}"
            if any(next(request.config.goldens.glob(pattern), None) for pattern in VARIANTS.values()):
                pytest.skip(missing)  # a set may hold some kinds only
            pytest.fail(f"{missing}, nor any other", pytrace=False)
        return request.param

    return pytest.fixture(variant, name=argument)


for _argument in VARIANTS:
    globals()[f"_{_argument}"] = variant_fixture(_argument)


@pytest.fixture(scope="session")
def goldens(request) -> Path:
    """The root of the golden files."""
    return request.config.goldens


@pytest.fixture(scope="session")
def tokenizers_dir(request) -> Path | None:
    """Directory with real tokenizer files, or None."""
    return request.config.tokenizers


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint of a few thousand parameters, random weights."""
    path = tmp_path_factory.mktemp("base")
    shutil.copy((ROOT / "samples/tiny_qwen_vl/qwen.tiktoken"), path)
    num_tokens = len((path / "qwen.tiktoken").read_text().splitlines())
    config = {
        **vlm.shape("qwen-vl-7b"),
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 32,
        "intermediate_size": 256,
        "vocab_size": num_tokens + 228,
        "seq_length": 64,
        "torch_dtype": "float32",
        "visual": {
            "image_size": 32,
            "patch_size": 8,
            "width": 32,
            "layers": 2,
            "heads": 2,
            "mlp_ratio": 2.0,
            "output_dim": 128,
            "image_start_id": num_tokens + tokenizer_qwen_vl.SPECIAL_TOKENS.index("<img>"),
            "n_queries": 4,
        },
    }
    checkpoint.write_json(path / "config.json", config)
    checkpoint.save_weights(path, filled(qwen.build_model(config)).state_dict().items())
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """40 chats in two files, every third one without a picture, lengths from 12 to 60 tokens."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    records = []
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(path / f"{i}.png")
        tag = "" if i % 3 == 2 else f"Picture 1: <img>{i}.png</img>\n"
        records.append(
            {
                "id": str(i),
                "conversations": [[f"{tag}what {'is ' * (i % 7)}it?", f"number {i} " * (1 + i % 4)]],
            }
        )
    (path / "a.jsonl").write_text("\n".join(map(json.dumps, records[:30])))
    (path / "b.json").write_text(json.dumps(records[30:]))
    entries = [{"name": "chatml_dataset", "data_files": str(path / name)} for name in ("a.jsonl", "b.json")]
    return {"train": entries, "eval": entries[1:]}
