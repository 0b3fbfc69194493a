"""What `make security` fails on, and what it only prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "audit.py"
spec = importlib.util.spec_from_file_location("audit_script", SCRIPT)
assert spec is not None
assert spec.loader is not None
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)


def package(name: str, *fix_versions: str) -> dict[str, Any]:
    """An entry of pip-audit's JSON with one finding."""
    return {"name": name, "version": "1.0", "vulns": [{"id": "CVE-1", "fix_versions": list(fix_versions)}]}


def test_only_a_direct_dependency_with_a_fixed_version_is_a_failure() -> None:
    assert audit.judge([package("PyYAML", "2.0")], {"pyyaml"})[1] == 1
    assert audit.judge([package("pyyaml")], {"pyyaml"})[1] == 0
    assert audit.judge([package("transitive", "2.0")], {"pyyaml"})[1] == 0


def test_every_finding_is_printed_with_its_fixed_versions() -> None:
    lines, _ = audit.judge([package("transitive", "2.0", "1.5"), package("pyyaml")], {"pyyaml"})
    assert lines[0].endswith("transitive 1.0: CVE-1, fixed in 2.0, 1.5")
    assert lines[1].endswith("pyyaml 1.0: CVE-1, no fixed version")


def test_packages_that_could_not_be_looked_up_are_counted_as_such() -> None:
    lines, num_actionable = audit.judge([{"name": "torch", "skip_reason": "not found"}, package("numpy")], {"torch"})
    assert lines[-1] == "audit: 1 of 2 packages looked up, 0 findings to act on"
    assert num_actionable == 0
