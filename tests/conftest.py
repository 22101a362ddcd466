"""What all tests share: options, threads, and the golden variants that a test is run for.

    python -m pytest                                # everything, with the golden files in tests/goldens
    python -m pytest tests -k golden --goldens DIR  # the golden tests alone, with another set of the same layout

(Name `tests` there: pytest takes an existing DIR outside the repository for a test path before it has read this file.)

A test that takes an argument named in VARIANTS (e.g. `qwen_vl_variant`) runs once per variant directory found below the
golden root, and fails where there is none.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads of several test processes starve each other

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {  # test argument -> directories below the golden root
    "qwen_vl_variant": "qwen_vl/tiny_*",
    "blip2_opt": "blip2/hf_opt_*",
    "blip2_t5": "blip2/hf_t5_*",
    "blip2_itm": "blip2/hf_itm_*",
    "blip2_lora": "blip2/lora_*",
    "blip2_stage1": "blip2/lavis_stage1_[!d]*",
    "blip2_stage1_ddp": "blip2/lavis_stage1_ddp*",
    "blip2_stage2": "blip2/lavis_stage2_*",
}


def pytest_addoption(parser):
    parser.addoption("--goldens", metavar="DIR", default=str(ROOT / "tests" / "goldens"), help="root of golden files")
    parser.addoption("--tokenizers", metavar="DIR", default=None, help="real tokenizer files; without them tests skip")


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
            found = sorted(path for path in metafunc.config.goldens.glob(pattern) if path.is_dir())
            # one failing case, not none: an empty parameter list would be a silent skip
            metafunc.parametrize(argument, found or [None], ids=[p.name for p in found] or ["none"], indirect=True)


def variant_fixture(argument: str):
    """A fixture that gives one directory of the golden root."""

    def variant(request) -> Path:
        if request.param is None:
            pytest.fail(f"no variant {VARIANTS[argument]} below {request.config.goldens}", pytrace=False)
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
