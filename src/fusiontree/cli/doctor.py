"""`fusiontree doctor`: what is installed, what this machine has, and which op backends work on it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

# What decides which CPU kernels torch takes: vector width, and instructions that multiply bf16.
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm")

# Used when they are there, but in no extra: their wheels have to match the CUDA and torch of the machine.
MATCHED_TO_MACHINE = ("mamba-ssm", "causal-conv1d", "flash-attn", "triton")


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Report library versions, devices, CPU features, the compiler, and which op backends work on this machine.

    Exit code 1 when a core library is missing or of a version that FusionTree does not support.
    """
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_as_text(report)))
    if report["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """The report as JSON-able data: `fusiontree, python, platform, libraries, cpu, devices, tools, backends, problems`.

    `libraries` maps a group (`core`, an extra's name or `optional`) to name -> version, None where not installed;
    `backends` maps op -> backend -> `{"usable", "reason"}`.
    """
    from fusiontree.artifacts import git_revision
    from fusiontree.version import __version__

    libraries, problems = _libraries()
    # A broken installation is what people ask a doctor about: without torch, say at least that.
    has_torch = libraries["core"].get("torch") is not None
    return {
        "fusiontree": {"version": __version__, "revision": git_revision(), "location": str(Path(__file__).parents[1])},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "libraries": libraries,
        "cpu": _cpu() if has_torch else {},
        "devices": _devices() if has_torch else [],
        "tools": {"c++": _first_line(os.environ.get("CXX"), "c++", "g++", "clang++"), "ninja": _first_line("ninja")},
        "backends": _backends() if has_torch else {},
        "problems": problems,
    }


def _libraries() -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """Installed versions by group, and a sentence for every core requirement that is not met."""
    from packaging.requirements import Requirement

    extras = metadata.metadata("fusiontree").get_all("Provides-Extra") or []
    groups: dict[str, dict[str, str | None]] = {"core": {}}
    problems = []
    for line in metadata.requires("fusiontree") or []:
        requirement = Requirement(line)
        marker, version = requirement.marker, _version(requirement.name)
        if marker is not None:
            # None of the extras: not for this platform.
            extra = next((extra for extra in extras if marker.evaluate({"extra": extra})), None)
            if extra is not None:
                groups.setdefault(extra, {})[requirement.name] = version
            continue
        groups["core"][requirement.name] = version
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            problems.append(f"{wanted} is required, {version or 'it is not'} installed: pip install '{wanted}'")
    groups["optional"] = {name: _version(name) for name in MATCHED_TO_MACHINE}
    return groups, problems


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    from fusiontree.artifacts import processor

    name, flags = processor()
    return {
        "name": name,
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "features": [feature for feature in CPU_FEATURES if feature in flags],
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": platform.processor()})
    return devices


def _backends() -> dict[str, dict[str, dict[str, Any]]]:
    from fusiontree.ops.backends import available_backends

    return {
        op: {name: {"usable": usable, "reason": reason} for name, (usable, reason) in backends.items()}
        for op, backends in available_backends().items()
    }


def _first_line(*commands: str | None) -> str | None:
    """`PATH: first line of its --version` for the first of the commands that runs, None when none does."""
    for command in commands:
        found = shutil.which(command) if command else None
        if found is None:
            continue
        try:
            shown = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return f"{found}: {shown.stdout.splitlines()[0] if shown.stdout else 'no version given'}"
    return None


def _as_text(report: dict[str, Any]) -> list[str]:
    package, cpu = report["fusiontree"], report["cpu"]
    lines = [
        f"FusionTree {package['version']} ({package['revision'] or 'installed package'}) in {package['location']}",
        f"Python {report['python']['version']}, {report['platform']}",
        "",
        "Libraries",
    ]
    listed: set[str] = set()  # an extra may name what another one has
    for group, versions in report["libraries"].items():
        missing = [name for name, version in versions.items() if version is None]
        here = {name: version for name, version in versions.items() if version is not None and name not in listed}
        lines += [f"  {name:<24}{version}" for name, version in here.items()]
        listed |= here.keys()
        if missing:
            remedy = "" if group in ("core", "optional") else f"   (pip install 'fusiontree[{group}]')"
            lines.append(f"  {group}: not installed: {', '.join(missing)}{remedy}")
    if cpu:
        lines += [
            "",
            "Devices",
            f"  cpu     {cpu['name']}, {cpu['cores_usable']} cores usable, {cpu['torch_threads']} torch threads",
            f"          kernels {cpu['torch_kernels']}; features {', '.join(cpu['features']) or 'unknown'}",
        ]
        for device in report["devices"]:
            memory = f", {device['memory_bytes'] / 2**30:.1f} GiB" if "memory_bytes" in device else ""
            capability = f", capability {device['capability']}, CUDA {device['cuda']}" if "capability" in device else ""
            lines.append(f"  {device['device']:<7} {device['name']}{memory}{capability}")
        if not report["devices"]:
            lines.append("  no GPU that torch can use")
    lines += ["", "Tools"]
    lines += [f"  {tool:<8}{found or 'not found'}" for tool, found in report["tools"].items()]
    if report["backends"]:
        lines += ["", "Op backends"]
    for op, backends in report["backends"].items():
        lines.append(f"  {op}")
        lines += [f"    {'+' if b['usable'] else '-'} {name:<14} {b['reason']}" for name, b in backends.items()]
    if report["problems"]:
        lines += ["", *(f"problem: {problem}" for problem in report["problems"])]
    return lines
