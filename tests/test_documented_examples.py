"""Every example of README and docs/ runs, page by page, as a reader would run it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from commands import run_in_this_process
from documented import ASSIGNMENT, PAGES, ROOT, examples, give, outside_blocks
from packaging.requirements import Requirement

pytestmark = pytest.mark.filterwarnings("ignore")
# packages of their own, not among those of the tests
NEEDS = {"sentence_transformers.md": "sentence_transformers"}
COMMANDS = r"(?:hira|python3?|pip|make|git|vllm|swift|axolotl|transformers|accelerate|torchrun|export) "


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Runs a block as bash does, in which `pip` and `make` check what they are asked for and install nothing."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, program in {"pip": f"{sys.executable} {Path(__file__)} pip", "make": f"make -n -C {ROOT}"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(code: str) -> None:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"

    return run


def runs_hira_alone(code: str) -> bool:
    """Whether each line of a block is the command `hira`: then it can run here, where everything is imported."""
    return all(line.startswith("hira ") and not re.search(r"[|&;<>`]", line) for line in joined(code))


def joined(code: str) -> list[str]:
    return code.replace("\\\n", "").strip().splitlines()


def run_hira(code: str, variables: dict[str, str]) -> None:
    for line in joined(code):
        _, *arguments = shlex.split(string.Template(line).substitute(variables), comments=True)
        done = run_in_this_process(*arguments)
        assert done.returncode in (0, None), f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if examples(path)])
def test_the_examples_run(page, shell):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page], reason=f"{NEEDS[page]} is not installed")
    give(PAGES[page])
    names = {"__name__": "__main__"}
    if page == "base_layers.md":  # a part of this module
        names |= vars(importlib.import_module("hira.base_weights.aqlm"))
    variables: dict[str, str] = {}  # of the shell
    for example in examples(PAGES[page]):
        if example.reason:
            continue
        if example.language == "python":
            exec(compile("\n" * (example.line - 1) + example.code, PAGES[page], "exec"), names)
        elif runs_hira_alone(example.code):
            run_hira(example.code, variables)
        else:
            assert example.language == "bash", f"{page}, line {example.line}: {example.language!r}"
            shell("".join(f"{name}={value}\n" for name, value in variables.items()) + example.code)
            variables |= ASSIGNMENT.findall(example.code)


def test_what_is_not_executed_says_why():
    """Either a test that runs it otherwise, or a program that is not installed."""
    reasons = {
        f"{page}, line {each.line}": each.reason for page in PAGES for each in examples(PAGES[page]) if each.reason
    }
    for where, reason in reasons.items():
        files, needs = re.findall(r"tests/[\w/]+\.py", reason), re.match(r"needs (\w+)$", reason)
        assert files or needs, f"{where}: {reason}"
        assert all((ROOT / file).is_file() for file in files), f"{where}: {reason}"
        assert not needs or importlib.util.find_spec(needs[1]) is None, f"{where}: it can be executed here"


@pytest.mark.parametrize("page", PAGES)
def test_no_command_stands_outside_of_the_examples(page):
    assert re.findall(rf"^ {{4,}}{COMMANDS}.*", outside_blocks(PAGES[page]), re.MULTILINE) == []


def _pip(arguments: list[str]) -> None:
    """What `pip install` is asked for is in this repository, or a package at a tested version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        if argument.startswith("."):
            extras = set(re.findall(r"\w+", argument))
            assert extras <= project["optional-dependencies"].keys(), argument
        elif not argument.startswith("-"):
            assert Requirement(argument).name.lower() in pinned, argument


if __name__ == "__main__":
    _pip(sys.argv[2:])
