"""The parts of the project that say the same thing say it equally, and the package is importable as promised."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ENVIRONMENT: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
SETUP = (ROOT / "env_setup.sh").read_text(encoding="utf-8")


def requirements(lines: list[str]) -> set[str]:
    return {str(Requirement(line)) for line in lines}


def setup_extras() -> list[str]:
    found = re.search(r'^_FT_EXTRAS="([a-z,]+)"$', SETUP, re.MULTILINE)
    assert found
    return found[1].split(",")


def test_the_conda_environment_holds_what_pyproject_asks_for() -> None:
    pip = next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    *libraries, package = pip
    wanted = PROJECT["dependencies"] + [line for extra in setup_extras() for line in EXTRAS[extra]]
    assert requirements(libraries) == requirements(wanted)
    assert len(libraries) == len(set(wanted))
    assert package == "--editable ."
    python = next(entry for entry in ENVIRONMENT["dependencies"] if str(entry).startswith("python="))
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.removeprefix("python="))


def test_every_library_that_is_imported_is_asked_for() -> None:
    modules = {
        name.partition(".")[0]
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    distributions = metadata.packages_distributions()
    libraries = {
        canonicalize_name(distributions[module][0])
        # torch brings triton where it has CUDA; only the modules of optional kernels import it. DeepSpeed is an
        # extra that a run asks for.
        for module in modules - set(sys.stdlib_module_names) - {"fusiontree", "triton", "deepspeed"}
    }
    # Only the server's modules import what `serve` asks for, only one module what `eval` and one what `quant` does; the
    # commands say so where it is missing.
    optional = EXTRAS["serve"] + EXTRAS["eval"] + EXTRAS["quant"]
    asked = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"] + optional}
    assert libraries <= asked | {"pydantic-core"}  # of which each release of pydantic asks for its own version


def test_the_set_up_script_names_the_environment_the_extras_and_the_python_of_the_project() -> None:
    assert f'_FT_CONDA_ENV="{ENVIRONMENT["name"]}"' in SETUP
    assert set(setup_extras()) <= set(EXTRAS)
    oldest = Version(PROJECT["requires-python"].removeprefix(">="))
    assert f"sys.version_info < ({oldest.major}, {oldest.minor})" in SETUP
    assert f"sys.version_info < ({oldest.major}, {oldest.minor})" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(("existing", "verb"), [("base", "create"), ("fusiontree-gpu", "update")])
def test_the_set_up_script_prefers_conda_and_activates_it_when_sourced(
    tmp_path: Path, existing: str, verb: str
) -> None:
    conda = tmp_path / "conda"
    conda.write_text(
        textwrap.dedent(
            f"""\
            #!/bin/sh
            case "$1 $2" in
                "env list") echo "{existing}    /somewhere" ;;
                "shell.posix hook") echo 'conda() {{ echo "ACTIVATED $2"; }}' ;;
                *) echo "ASKED $PWD $*" ;;
            esac
            """
        )
    )
    conda.chmod(0o755)
    shown = subprocess.run(
        ["bash", "-c", f"source '{ROOT}/env_setup.sh'; echo \"left ${{_FT_EXTRAS:-nothing}} behind\""],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=True,
    )
    asked, activated, *_, left = shown.stdout.splitlines()
    assert asked.startswith(f"ASKED {ROOT} env {verb} ")
    assert asked.endswith("--file environment.yml")
    assert activated == "ACTIVATED fusiontree-gpu"
    assert left == "left nothing behind"


def test_the_set_up_script_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    shown = subprocess.run(
        ["bash", str(ROOT / "env_setup.sh"), "venv"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(old)},
    )
    assert shown.returncode == 1
    assert "needs Python 3.10 or newer" in shown.stderr


def test_the_tested_versions_satisfy_the_project() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        canonicalize_name(pin.name): pin
        for pin in map(Requirement, (line for line in lines if line and line[0] != "#"))
    }
    assert str(pins["torch"].specifier) == "==2.13.0"
    for pin in pins.values():
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert Version(specifier.version).local is None
    for line in PROJECT["dependencies"] + EXTRAS["dev"]:
        wanted = Requirement(line)
        (specifier,) = pins[canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(specifier.version), line


def test_the_commit_hooks_use_the_tested_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    pin = re.search(r"^ruff==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pin
    assert [hook["additional_dependencies"] for hook in hooks] == [[pin[0]]] * 2


def test_the_package_is_installed_with_its_command_and_its_types() -> None:
    (script,) = [entry for entry in metadata.distribution("fusiontree").entry_points if entry.name == "fusiontree"]
    assert (script.group, script.value) == ("console_scripts", "fusiontree.cli:main")
    import fusiontree

    assert script.load() is __import__("fusiontree.cli").cli.main
    assert (Path(fusiontree.__file__).parent / "py.typed").is_file()


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plain_import_registers_the_model_with_transformers() -> None:
    shown = run_python(
        """
        import fusiontree
        from transformers import AutoConfig, AutoModelForCausalLM
        sizes = dict(vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, global_heads=1, mamba_head_dim=8)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("fusiontree", **sizes))
        print(type(model).__name__, isinstance(model, fusiontree.HybridLanguageModel))
        """
    )
    assert shown.split() == ["HybridLanguageModel", "True"]


def test_every_public_name_exists_and_training_is_callable_in_any_order_of_imports() -> None:
    shown = run_python(
        """
        import fusiontree
        missing = [name for name in fusiontree.__all__ if not hasattr(fusiontree, name)]
        import fusiontree.train.settings
        from fusiontree import train
        print(missing, callable(fusiontree.train), callable(train), fusiontree.train.settings.__name__)
        """
    )
    assert shown.strip() == "[] True True fusiontree.train.settings"


def test_continuous_integration_passes_the_code_on_and_closes_with_pytests_line(tmp_path: Path) -> None:
    make = tmp_path / "make"
    closing = "===== 3 passed, 1 failed in 2.50s ====="
    make.write_text(f"#!/bin/sh\necho \"asked for $1\"\necho '{closing}'\necho 'make: Error 1'\nexit 2\n")
    make.chmod(0o755)
    shown = subprocess.run(
        [str(ROOT / ".ci" / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert shown.returncode == 2
    first, *_, last = shown.stdout.splitlines()
    assert first == "asked for test"
    assert last == closing
