"""The real interpreter, in its real worker processes."""

from __future__ import annotations

import pytest

from agent.sandbox import SandboxConfig, run_python
from memory.errors import ToolError


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("sum([1, 2, 3])", "6"),
        ("print('a')\n1 + 1", "a\n2"),
        (" 1 + 1 ", "2"),
        ("sorted('banana')", "['a', 'a', 'a', 'b', 'n', 'n']"),
        ("def f(n):\n    return 1 if n < 2 else n * f(n - 1)\nf(10)", "3628800"),
        ("x = 1", "(nothing was printed)"),
        ("import time\ntime.sleep(1000)\n'awake'", "awake"),
    ],
)
def test_code_is_run_and_shown(code: str, shown: str) -> None:
    assert run_python(code) == shown


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "[0] * 10**10",
        "x = []\nwhile True: x.append('a' * 10000)",
        "while True: print('a' * 1000)",
        "def f(): return f()\nf()",
        "9**9**9",
        "2**100000",
        "x = []\nfor _ in range(200000): x = [x]\nx",
        "(" * 5000,
        "open('/etc/passwd').read()",
        "open('made', 'w').write('x')",
        "import pathlib\npathlib.Path('/etc/passwd').read_text()",
        "import os\nos.system('true')",
        "import os\nos.environ",
        "import subprocess",
        "import socket\nsocket.socket()",
        "import urllib.request",
        "import sys\nsys.exit(1)",
        "__import__('os')",
        "input()",
        "1 +",
        "raise ValueError('first\\nsecond')",
        "raise ValueError()",
        "nobody_knows_this_name",
        "\x00",
        "'\ud800'",
    ],
)
def test_what_fails_or_is_refused_is_a_tool_error_of_one_readable_line(code: str) -> None:
    with pytest.raises(ToolError) as caught:
        run_python(code, SandboxConfig(seconds=0.5))
    line = str(caught.value)
    assert 0 < len(line) <= 400
    assert "\n" not in line


def test_an_error_says_what_was_wrong_in_all_its_lines() -> None:
    with pytest.raises(ToolError, match="ValueError: first second"):
        run_python("raise ValueError('first\\nsecond')")


def test_long_output_is_cut_to_what_the_model_may_read() -> None:
    assert run_python("print('a' * 5000)", SandboxConfig(output_chars=10)) == "a" * 10


def test_a_run_leaves_nothing_to_the_next_one() -> None:
    run_python("secret = 1")
    with pytest.raises(ToolError, match="secret"):
        run_python("secret")
