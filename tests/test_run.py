"""`hira run`: a program and the processes that it starts run as under `python`, with hira registered.

Most programs here import stand-ins for peft and for hira's registration, which take no time: what is tested is who
imports what, and when.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hira

PYTHON = [sys.executable]
HIRA = [str(Path(sys.executable).with_name("hira")), "run"]
PEFT = "registered = False"
OURS = f"__path__.append({str(Path(hira.__file__).parent)!r})\nfrom hira import peft_hook\npeft_hook.install()"
REGISTRATION = "def register():\n    import peft\n    peft.registered = True"

STARTS = """
import multiprocessing, subprocess, sys
from concurrent.futures import ProcessPoolExecutor

def registered(_=None):
    import peft
    return peft.registered

class Mine:
    pass

if __name__ == "__main__":
    print("main", registered())
    for method in ("spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        with context.Pool(1) as pool:
            print(method, *pool.map(registered, [0]))
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            print(method, "executor", *pool.map(registered, [0]))
            print(method, "pickled", type(pool.submit(Mine).result()) is Mine)
    run = [sys.executable, "-c", "import peft; print('subprocess', peft.registered)"]
    subprocess.run(run, check=True)
    subprocess.run([sys.executable, "-c", f"import subprocess; subprocess.run({run!r})"], check=True)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, text in {
        "peft/__init__.py": PEFT,
        "hira/__init__.py": OURS,
        "hira/peft_integration/__init__.py": "",
        "hira/peft_integration/registration.py": REGISTRATION,
    }.items():
        (tmp_path / "stand_ins" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stand_ins" / name).write_text(text)
    return tmp_path


def run(command: list[str], folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / "stand_ins"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **options.pop("env", {})}
    full = [*command, *arguments]
    return subprocess.run(
        full, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False, **options
    )


def test_processes_that_a_program_starts_have_hira(folder):
    (folder / "starts.py").write_text(STARTS)
    done = run(HIRA, folder, "starts.py")
    assert done.returncode == 0, done.stderr
    lines = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert set(lines) == {
        "main",
        *(f"{method}{kind}" for method in ("spawn", "forkserver") for kind in ("", " executor", " pickled")),
        "subprocess",
    }
    assert set(lines.values()) == {"True"}
    assert run(PYTHON, folder, "starts.py").stdout.count("False") == 7


def test_mapping_a_dataset_in_processes_has_hira(folder):
    (folder / "maps.py").write_text("""
import multiprocess
import datasets

def registered(row):
    import peft
    return {"registered": peft.registered}

if __name__ == "__main__":
    multiprocess.set_start_method("spawn")
    rows = datasets.Dataset.from_dict({"x": [0, 1]}).map(registered, num_proc=2)
    print(rows["registered"][:])
""")
    done = run(HIRA, folder, "maps.py", env={"HF_HOME": str(folder)})
    assert done.stdout.splitlines()[-1:] == ["[True, True]"], done.stderr


@pytest.mark.parametrize(
    "order", ["import hira, peft", "import peft, hira", "from peft import registered", "import peft"]
)
def test_hira_follows_peft_in_any_order(folder, order):
    (folder / "program.py").write_text(f"import sys\n{order}\nprint(sys.modules['peft'].registered)")
    assert run(HIRA, folder, "program.py").stdout == "True\n"


def test_nothing_is_imported_before_peft_is(folder):
    (folder / "program.py").write_text("import sys\nprint({'peft', 'torch'} & set(sys.modules), sys.path)")
    program = run(HIRA, folder, "program.py")
    assert program.stdout == run(PYTHON, folder, "program.py").stdout
    assert program.stdout.startswith("set() ")


def test_looking_for_peft_does_not_import_it(folder):
    """As transformers does to see whether it is there."""
    look = "import importlib.util, sys\nimportlib.util.find_spec('peft')\nprint('peft' in sys.modules)\n"
    (folder / "program.py").write_text(look + "import peft\nprint(peft.registered)")
    assert run(HIRA, folder, "program.py").stdout == "False\nTrue\n"


def test_a_sitecustomize_of_the_users_runs_too(folder):
    (folder / "stand_ins" / "sitecustomize.py").write_text("import sys\nsys.of_the_user = 1")
    (folder / "program.py").write_text("import sys, peft\nprint(sys.of_the_user, peft.registered)")
    assert run(HIRA, folder, "program.py").stdout == "1 True\n"
    assert run([*HIRA, *HIRA], folder, "program.py").stdout == "1 True\n"  # twice over


def test_a_broken_sitecustomize_is_reported_as_python_does(folder):
    (folder / "stand_ins" / "sitecustomize.py").write_text("import nothing_of_this_name")
    (folder / "program.py").write_text("import peft\nprint(peft.registered)")
    done = run(HIRA, folder, "program.py")
    assert done.stdout == "True\n"
    assert "Error in sitecustomize" in done.stderr
    assert "nothing_of_this_name" in done.stderr


def test_a_python_without_hira_says_that_it_has_none(folder):
    """As that of another virtual environment is."""
    shutil.copytree(folder / "stand_ins" / "peft", folder / "other" / "peft")
    (folder / "program.py").write_text(f"""
import os, subprocess, sys
startup = os.environ["PYTHONPATH"].split(os.pathsep)[0]
environment = {{**os.environ, "PYTHONPATH": os.pathsep.join([startup, {str(folder / "other")!r}])}}
subprocess.run([sys._base_executable, "-c", "import peft; print(peft.registered)"], env=environment)
""")
    done = run(HIRA, folder, "program.py")
    assert done.stdout == "False\n"
    assert "has no hira: PEFT's own HiRA is used" in done.stderr


def test_children_with_options_that_leave_the_hook_out_run(folder):
    (folder / "program.py").write_text("""
import subprocess, sys
for option in ("-S", "-I", "-E"):
    print(subprocess.run([sys.executable, option, "-c", "print(1)"], capture_output=True, text=True))
""")
    assert run(HIRA, folder, "program.py").stdout == run(PYTHON, folder, "program.py").stdout


PROGRAMS = {
    "EOFError": "raise EOFError('Ran out of input')",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "broken pipe": "import errno\nraise OSError(errno.EPIPE, 'Broken pipe')",
    "click.Abort": "import click\nraise click.Abort()",
    "click.UsageError": "import click\nraise click.UsageError('x')",
    "click.exceptions.Exit": "import click\nraise click.exceptions.Exit(0)",
    "typer.Exit": "import typer\nraise typer.Exit(3)",
    "interrupted": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)",
    "terminated": "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)",
    "exit with text": "import sys\nsys.exit('text')",
    "exit 7": "import sys\nsys.exit(7)",
    "exit -1": "import sys\nsys.exit(-1)",
    "exit": "raise SystemExit",
    "no syntax": "def f(:",
    "atexit": "import atexit, sys\natexit.register(print, 'at exit')\nraise ValueError(3)",
    "exception hook": "import sys\nsys.excepthook = lambda *a: print('hook', a[0])\nraise ValueError(3)",
    "own application": "import typer\ndef f(a: int): print(a)\ntyper.run(f)",
    "what it sees": (
        "import sys\nprint(sys.argv, sys.path, __name__, __file__, __package__, __spec__, sys.flags, sys.stdin.read())"
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_as_under_python(folder, name):
    (folder / "program.py").write_text(PROGRAMS[name])
    arguments = ["program.py", "3", "--an", "option"]
    ours, pythons = (run(command, folder, *arguments, input="text") for command in (HIRA, PYTHON))
    assert (ours.returncode, ours.stdout, ours.stderr) == (pythons.returncode, pythons.stdout, pythons.stderr)


@pytest.mark.parametrize("options", [["-O"], ["-u"], ["-W", "error"], ["-X", "utf8"], ["-B"]], ids="".join)
def test_options_of_python_are_passed_on(folder, options):
    (folder / "program.py").write_text("import sys\nprint(sys.flags, sys.warnoptions, sys.stdout.write_through)")
    ours = run([*PYTHON, *options, *HIRA], folder, "program.py")
    assert ours.stdout == run([*PYTHON, *options], folder, "program.py").stdout, ours.stderr


def test_modules_folders_and_archives_run_as_under_python(folder):
    program = "import sys, peft\nprint(sys.argv, sys.path[:2], __package__, __name__)\nprint(peft.registered)"
    (folder / "package" / "part").mkdir(parents=True)
    (folder / "package" / "__main__.py").write_text(program)
    (folder / "package" / "part" / "__init__.py").write_text("print('imported once')")
    (folder / "package" / "part" / "tool.py").write_text(program)
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", program)
    for what in (["-m", "package"], ["-m", "package.part.tool"], ["package"], ["archive.zip"]):
        ours, pythons = (run(command, folder, *what, "a", "-m").stdout for command in (HIRA, PYTHON))
        assert ours == pythons.replace("False", "True")
        assert ours.endswith("True\n")


def test_an_interrupt_reaches_the_program(folder):
    (folder / "program.py").write_text("""
import time
try:
    print("running", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("stopping", flush=True)
    raise
""")
    process = subprocess.Popen(
        [*HIRA, "program.py"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out == "stopping\n"
    assert process.returncode == -signal.SIGINT
    assert err.rstrip().endswith("KeyboardInterrupt")


WORKER = "import peft\nprint('worker', peft.HiraConfig.__module__, flush=True)"
SPAWNS = """
import torch.multiprocessing

def child(rank):
    import peft
    from peft.tuners.hira.layer import Linear
    print("worker", peft.HiraConfig.__module__, flush=True)
    assert Linear.__module__ == "hira.layers.linear"

if __name__ == "__main__":
    torch.multiprocessing.spawn(child, nprocs=1)
"""


@pytest.mark.parametrize(
    "command",
    [
        ["spawns.py"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "1", "worker.py"],
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "worker.py"],
    ],
    ids=["spawn", "torchrun", "accelerate"],
)
def test_launchers_of_training_have_hira(tmp_path, command):
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "spawns.py").write_text(SPAWNS)
    done = subprocess.run([*HIRA, *command], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "worker hira.config.hira_config" in done.stdout.splitlines()
