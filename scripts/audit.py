"""Looks up known vulnerabilities of the versions in constraints.txt (run by `make security`).

Fails only on what can be acted on here: a vulnerable package that pyproject.toml itself asks for, with a fixed version to
move to. Everything else is printed: a transitive package waits for whoever requires it. Where no vulnerability service
answers, one line says that nothing was audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOOKUP_TIMEOUT_S = 15
# One look-up per package; a service that is there needs well under a minute.
AUDIT_TIMEOUT_S = 300


def main() -> int:
    """Prints the findings; 1 when a direct dependency is vulnerable and a fix exists, else 0."""
    packages = audit(ROOT / "constraints.txt")
    if not any("skip_reason" not in package for package in packages):
        print("audit: NOT DONE, no vulnerability service answered from here; run `make security` where one does")
        return 0
    direct = {canonicalize_name(Requirement(line).name) for line in requires("nexus-distill") or []}
    lines, num_actionable = judge(packages, direct)
    print("\n".join(lines))
    return 1 if num_actionable else 0


def judge(packages: list[dict[str, Any]], direct: set[str]) -> tuple[list[str], int]:
    """Lines to print, and how many findings concern a package of `direct` and have a fixed version."""
    lines = []
    num_actionable = 0
    audited = [package for package in packages if "skip_reason" not in package]
    for package in audited:
        for finding in package["vulns"]:
            fixes = ", ".join(finding["fix_versions"])
            actionable = bool(fixes) and canonicalize_name(package["name"]) in direct
            num_actionable += actionable
            verdict = f"fixed in {fixes}{' <- upgrade' if actionable else ''}" if fixes else "no fixed version"
            lines.append(f"audit: {package['name']} {package['version']}: {finding['id']}, {verdict}")
    lines.append(f"audit: {len(audited)} of {len(packages)} packages looked up, {num_actionable} findings to act on")
    return lines, num_actionable


def audit(requirements: Path) -> list[dict[str, Any]]:
    """What pip-audit says about each pinned package; empty when it could not ask."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", str(LOOKUP_TIMEOUT_S)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    # It exits with 1 for findings as for a lost connection; only findings come with JSON.
    return json.loads(done.stdout)["dependencies"] if done.stdout.strip().startswith("{") else []


if __name__ == "__main__":
    sys.exit(main())
