"""The `hira` command, in processes of its own."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from typer.testing import CliRunner

import hira.cli.app

# Says what a program sees of itself, and whose HiRA it gets; without a word about hira.
SCRIPT = """
import json, pickle, sys
from pathlib import Path
import neighbour
import peft
from peft import HiraConfig, get_peft_model
from peft.tuners.hira.layer import Linear
from torch import nn

class Mine:
    pass

def main():
    body = nn.Sequential(nn.Linear(3, 4))
    model = get_peft_model(body, HiraConfig(r=2, target_modules=["0"]))
    print(json.dumps({
        "argv": sys.argv,
        "name": __name__,
        "path": sys.path[0],
        "neighbour": neighbour.VALUE,
        "main is this": sys.modules["__main__"].Mine is Mine,
        "pickles": type(pickle.loads(pickle.dumps(Mine()))) is Mine,
        "file": Path(__file__).name,
        "layer": type(model.base_model.model[0]).__module__,
        "name of the layer under peft": Linear.__module__,
        "adapts": isinstance(model.base_model.model[0], Linear),
    }))
    print("to stderr", file=sys.stderr)
    sys.exit(int(sys.argv[-1]))

if __name__ == "__main__":
    main()
"""
BROKEN = "import sys\nsys.exit('no such luck')"
RAISES = "def f():\n    raise RuntimeError('from the script')\nf()"

ISOLATED = f"""
import sys
sys.path.insert(0, {str(Path(hira.cli.__file__).parents[1])!r})
sys.argv[1:] = ["run", "programs/script.py", "7"]
from hira.cli.app import main
main()
"""

HIRA = str(Path(sys.executable).with_name("hira"))
COMMANDS = {
    "script": [HIRA, "run", "programs/script.py", "a", "--b", "c", "-m", "--help", "7"],
    "module": [sys.executable, "-m", "hira", "run", "-m", "programs.tool", "--x", "-m", "0"],
    "message": [HIRA, "run", "programs/broken.py"],
    "traceback": [sys.executable, "-m", "hira", "run", "programs/raises.py"],
    "missing script": [HIRA, "run", "programs/none.py", "7"],
    "missing module": [HIRA, "run", "-m", "programs.none"],
    "nothing to run": [HIRA, "run"],
    "isolated": [sys.executable, "-I", "-c", ISOLATED],
    "env": [HIRA, "env"],
    "plain python": [sys.executable, "programs/script.py", "3"],
}


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict[str, subprocess.CompletedProcess[str]]:
    """All the commands, two at a time, since each spends its time importing torch."""
    folder = tmp_path_factory.mktemp("cli")
    programs = folder / "programs"
    programs.mkdir()
    (programs / "script.py").write_text(SCRIPT)
    (programs / "tool.py").write_text(SCRIPT.replace("import neighbour", "from programs import neighbour"))
    (programs / "neighbour.py").write_text("VALUE = 42")
    (programs / "broken.py").write_text(BROKEN)
    (programs / "raises.py").write_text(RAISES)
    results, waiting = {}, dict(COMMANDS)
    while waiting:
        batch = [(name, waiting.pop(name)) for name in list(waiting)[:2]]
        running = [
            (name, subprocess.Popen(c, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
            for name, c in batch
        ]
        for name, process in running:
            out, err = process.communicate(timeout=120)
            results[name] = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    results["folder"] = folder
    return results


def report(result) -> dict:
    assert result.stdout, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def words(text: str) -> str:
    """Without the frames and line breaks of a panel."""
    return " ".join(text.replace("│", " ").split())


def test_a_script_sees_what_python_would_show_it(done):
    seen = report(done["script"])
    assert seen["argv"] == ["programs/script.py", "a", "--b", "c", "-m", "--help", "7"]
    assert seen["name"] == "__main__"
    assert seen["path"] == str(done["folder"] / "programs")
    assert seen["neighbour"] == 42
    assert seen["file"] == "script.py"
    assert seen["main is this"] is seen["pickles"] is True
    assert done["script"].returncode == 7
    assert "to stderr" in done["script"].stderr
    plain = report(done["plain python"])
    for same in ("name", "path", "neighbour", "file", "main is this", "pickles"):
        assert seen[same] == plain[same], same


def test_a_module_sees_what_python_would_show_it(done):
    seen = report(done["module"])
    assert seen["argv"] == [str(done["folder"] / "programs" / "tool.py"), "--x", "-m", "0"]
    assert seen["name"] == "__main__"
    assert seen["path"] == str(done["folder"])
    assert seen["main is this"] is seen["pickles"] is True
    assert done["module"].returncode == 0


@pytest.mark.parametrize("command", ["script", "module"])
def test_an_unmodified_program_gets_our_layers(done, command):
    seen = report(done[command])
    assert seen["layer"] == seen["name of the layer under peft"] == "hira.layers.linear"
    assert seen["adapts"] is True
    stock = report(done["plain python"])
    assert stock["layer"] == stock["name of the layer under peft"] == "peft.tuners.hira.layer"


def test_exit_messages_and_tracebacks_are_the_programs_own(done):
    assert done["message"].returncode == 1
    assert done["message"].stderr.strip().endswith("no such luck")
    assert done["traceback"].returncode == 1
    assert done["traceback"].stderr.rstrip().endswith("RuntimeError: from the script")
    assert 'raises.py", line 2, in f' in done["traceback"].stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("nothing to run", "Missing argument 'SCRIPT|MODULE'"),
        ("isolated", "PYTHONPATH"),
    ],
)
def test_usage_errors(done, command, message):
    assert done[command].returncode == 2
    assert message in words(done[command].stderr)
    assert "Usage: " in done[command].stderr
    assert "Traceback" not in done[command].stderr


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [("missing script", 2, "can't open file"), ("missing module", 1, "No module named programs.none")],
)
def test_what_does_not_exist_is_reported_as_python_does(done, command, status, message):
    assert done[command].returncode == status
    assert message in done[command].stderr
    assert "Traceback" not in done[command].stderr


def test_env(done):
    assert done["env"].returncode == 0, done["env"].stderr
    found = re.findall(r"^ (\S.*?) {2,}(\S.*?) *$", done["env"].stdout, re.MULTILINE)
    rows = dict(found)
    assert rows["torch"] == torch.__version__
    assert rows["peft"] == peft.__version__
    assert rows["PEFT's type HIRA"] == "hira"
    assert rows.keys() >= {"python", "hira", "transformers", "bitsandbytes", "triton", "linear", "embedding"}
    assert rows["triton"] == "not installed" or rows["triton"][0].isdigit()


def invoke(*arguments: str):
    """The command in this process, so that a test can give it a device."""
    return CliRunner().invoke(hira.cli.app.app, list(arguments), env={"COLUMNS": "250"})


def test_bench_says_what_it_can_measure():
    assert "--kernels" in words(invoke("bench").stderr)
    assert invoke("bench").exit_code == 2


def test_bench_says_that_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("bench", "--kernels", "--size", "64")
    assert result.exit_code == 1
    assert "no CUDA device" in result.stderr
    assert not result.stdout


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A CUDA device as far as the command asks for it, whose kernels run in Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed, so its kernels cannot run, not even interpreted")
    from hira.ops import kernel_bench, kernel_choice

    machine = {"device": "A GPU", "driver": "12", "torch": "2", "triton": "3", "hira": "0"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "machine_of", lambda device: machine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: machine["device"])
    measure = kernel_bench.measure
    monkeypatch.setattr(kernel_bench, "measure", lambda device, *how: measure(torch.device("cpu"), *how))
    monkeypatch.setattr(kernel_choice, "REPEATS", 1)


def test_bench_prints_a_table_and_env_what_was_found(gpu):
    assert re.search(r"verdicts on device 0 +none yet", invoke("env").stdout)
    result = invoke("bench", "--kernels", "--size", "16", "--rank", "2", "--tokens", "16")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("A GPU; driver 12; torch 2; triton 3; hira 0\nW0 16 x 16, r = 2, 16 tokens")
    assert len(re.findall(r"^\| (?:form|factor_gradients|decode), ", result.stdout, re.MULTILINE)) == 9
    shown = invoke("env").stdout
    assert "none yet" not in shown
    for kernel in ("form", "factor_gradients", "decode"):
        assert re.search(rf"{kernel}, bfloat16, bfloat16 +(the kernel|PyTorch) serves: kernel [\d.]+ us", shown)


def test_bench_fails_for_a_wrong_kernel(gpu, monkeypatch):
    from hira.ops import triton

    monkeypatch.setattr(triton, "form", lambda W0, A, B, dtype, noise=None: W0.to(dtype))
    with pytest.warns(UserWarning, match="form"):
        result = invoke("bench", "--kernels", "--size", "16", "--rank", "2", "--tokens", "16")
    assert result.exit_code == 1
    assert "PyTorch: wrong" in result.stdout


@pytest.mark.parametrize("name", ["", "run", "env", "bench", "merge", "inspect", "verify", "convert"])
def test_help_waits_for_nothing(name):
    """Importing hira takes seconds, so help must not. Seconds are those of the processor, which others may use too."""
    command = name.split()
    program = "import sys; from hira.cli.app import app; app(standalone_mode=False); print('MODULES', *sys.modules)"
    python = [sys.executable, "-c", program, *command, "--help"]
    done = subprocess.run(python, capture_output=True, text=True, check=True)
    assert "Usage:" in done.stdout
    assert not {"torch", "peft"} & set(done.stdout.partition("MODULES")[2].split())

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([HIRA, *command, "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 0.5 for _ in range(3))
