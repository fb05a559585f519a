"""What a build did: JUnit XML for CI servers, Markdown for people, plain values for JSON.

JUnit: one test case for each job, `classname` its model. A missed gate is a <failure>, anything else that went wrong an
<error>, what was not tried is <skipped>. Form: https://github.com/testmoapp/junitxml (what CI servers read in common).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from weightsmith.atomic import write_text
from weightsmith.builds.run import exit_code
from weightsmith.builds.unit import Outcome

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
WORDS = {
    "made": "made",
    "there": "up to date",
    "failed": "failed",
    "gate": "gate not passed",
    "blocked": "not tried",
    "interrupted": "interrupted",
}


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The whole run as plain values."""
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in WORDS}
    return {"exit_code": exit_code(outcomes), "counts": counts, "jobs": [asdict(outcome) for outcome in outcomes]}


def reason(outcome: Outcome) -> str:
    """One line on why it ended as it did: what was missed, what went wrong, why it ran."""
    if outcome.error is not None:
        return str(outcome.error["message"])
    said = "; ".join(outcome.missed or outcome.reasons)
    return f"{said}; moved {', '.join(outcome.moved)}" if outcome.moved else said


def junit(outcomes: Sequence[Outcome]) -> str:
    """The run as JUnit XML."""
    bad = {"failures": "gate", "errors": "failed"}
    numbers = {name: str(sum(outcome.status == status for outcome in outcomes)) for name, status in bad.items()}
    skipped = sum(outcome.status in ("blocked", "interrupted") for outcome in outcomes)
    numbers |= {"tests": str(len(outcomes)), "skipped": str(skipped)}
    numbers["time"] = f"{sum(outcome.seconds for outcome in outcomes):.2f}"
    root = ElementTree.Element("testsuites", {"name": "weightsmith build", **numbers})
    suite = ElementTree.SubElement(root, "testsuite", {"name": "weightsmith build", **numbers})
    for outcome in outcomes:
        _case(suite, outcome)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The run as a table for a CI server's summary page."""
    lines = ["| model | result | seconds | bytes | why |", "|---|---|---:|---:|---|"]
    for outcome in outcomes:
        cells = [
            outcome.ref,
            WORDS[outcome.status],
            f"{outcome.seconds:.1f}",
            f"{outcome.nbytes or 0:,}",
            reason(outcome),
        ]
        lines.append("| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |")
    return "### weightsmith build\n\n" + "\n".join(lines) + "\n"


def write(outcomes: Sequence[Outcome], *, junit_file: Path | None, summary_file: Path | None) -> None:
    """Write the reports that were asked for: JSON to NAME.json, else Markdown, added to what stands there."""
    if junit_file is not None:
        write_text(junit_file, junit(outcomes))
    if summary_file is not None and summary_file.suffix == ".json":
        import json  # noqa: PLC0415

        write_text(summary_file, json.dumps(summary(outcomes), indent=2) + "\n")
    elif summary_file is not None:
        with open(summary_file, "a", encoding="utf-8") as file:
            file.write(markdown(outcomes))


def _case(suite: ElementTree.Element, outcome: Outcome) -> None:
    name, _, tag = outcome.ref.partition(":")
    case = ElementTree.SubElement(suite, "testcase", {"classname": name, "name": tag, "time": f"{outcome.seconds:.2f}"})
    told: dict[str, Any] = {"result": WORDS[outcome.status], "key": outcome.key, "digest": outcome.digest}
    told |= {
        "bytes": outcome.nbytes,
        "builds": ", ".join(outcome.builds) or None,
        "moved": ", ".join(outcome.moved) or None,
    }
    properties = ElementTree.SubElement(case, "properties")
    for key, value in told.items():
        if value is not None:
            ElementTree.SubElement(properties, "property", {"name": key, "value": _clean(str(value))})
    message = _clean(reason(outcome))
    if outcome.status == "gate":
        ElementTree.SubElement(case, "failure", {"type": "QualityGateError", "message": message}).text = message
    elif outcome.status == "failed":
        error = outcome.error or {}
        found = ElementTree.SubElement(case, "error", {"type": str(error.get("kind", "")), "message": message})
        parts = (error.get("path"), error.get("tensor"), error.get("message"), error.get("hint"))
        found.text = _clean("\n".join(str(part) for part in parts if part))
    elif outcome.status in ("blocked", "interrupted"):
        ElementTree.SubElement(case, "skipped", {"message": message or WORDS[outcome.status]})


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
