"""Checks 3 and 4, as the tests make them: queries with data, hosts that doctor sees through."""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.parts import REPOSITORY, Figures

MONITORING = "tests/integration/test_monitoring.py"
DOCTOR = "tests/fineserve/test_doctor.py"
COUNTED = ("panels", "panels_with_data", "queries", "queries_with_data")


def measure() -> Figures:
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", MONITORING, DOCTOR, f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1"]
        subprocess.run(command, cwd=REPOSITORY, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    properties = {p.get("name"): p.get("value") for case in cases for p in case.iter("property")}
    doctor = [case for case in cases if "test_doctor" in str(case.get("classname"))]
    broken = [c for c in doctor if c.find("failure") is not None or c.find("error") is not None]
    return {
        **{name: int(properties[name] or 0) for name in COUNTED},
        "doctor_cases": len(doctor),
        "doctor_cases_ok": len(doctor) - len(broken),
    }
