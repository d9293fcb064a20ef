"""Settings from the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import gfx


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GFX_")} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_the_environment_is_read() -> None:
    variables = {
        "GFX_OFFLINE": "yes",
        "GFX_VERBOSITY": "1",
        "GFX_BATCH_TOKENS": "512",
        "GFX_MODEL": "",
        "GFX_ELSE": "x",
    }
    code = "from gfx import settings as s; print(s.offline, s.verbosity, s.batch_tokens, s.model)"
    assert run(code, **variables).stdout.split() == ["True", "1", "512", "None"]


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("GFX_OFFLINE", "maybe", "Expected a truth value such as 1 or 0, found 'maybe'"),
        ("GFX_VERBOSITY", "loud", "is one of [0, 1, 2, 3, 4], found 'loud'"),
        ("GFX_BATCH_TOKENS", "many", "Expected a whole number above 0, found 'many'"),
        ("GFX_DTYPE", "float8", "is one of ['float32', 'bfloat16', 'float16'] or None, found 'float8'"),
        ("GFX_DEVICE", "cuda:0,cuda:0", "several different ones, found 'cuda:0,cuda:0'"),
        ("GFX_DEVICE", "gpu", "`device` is a device of torch such as 'cpu', 'cuda', 'cuda:0' or 'mps', found 'gpu'"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(variable: str, value: str, text: str) -> None:
    said = run("import gfx", **{variable: value}).stderr.splitlines()[-1]
    assert said.startswith(f"ValueError: The environment variable {variable}={value} cannot be used.")
    assert text in said


@pytest.mark.parametrize("value", ["gpu", "cuda0", "cuda:", 0, ["cpu", None], ["cuda:0", "gpu:1"]])
def test_what_is_no_device_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="`device` is a device of torch such as"), gfx.settings.override(device=value):
        pass


@pytest.mark.parametrize("value", [0, -3, 1.5, "many"])
def test_batch_tokens_other_than_whole_numbers_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="Expected a whole number above 0"), gfx.settings.override(batch_tokens=value):
        pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("cpu", "cpu"),
        ("cuda:0, cuda:1", ("cuda:0", "cuda:1")),
        (["cuda:0", "cuda:1"], ("cuda:0", "cuda:1")),
        (["cuda:1"], "cuda:1"),
    ],
)
def test_device_is_one_name_or_several(value: object, expected: object) -> None:
    with gfx.settings.override(device=value):
        assert gfx.settings.device == expected
        with gfx.settings.override(device="cpu"):
            assert gfx.settings.device == "cpu"
        assert gfx.settings.device == expected


def test_client_is_a_dask_client() -> None:
    with pytest.raises(TypeError, match=r"dask\.distributed\.Client or None, found 'tcp://here'"):
        gfx.settings.client = "tcp://here"
