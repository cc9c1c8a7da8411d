"""A verdict for people and for machines: Markdown for a pull request, JUnit for whatever shows tests."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

SIGNS = {"passed": "✅", "failed": "❌", "inconclusive": "⚠️", "not run": "⚠️"}
TOLD = 2000
"""Characters that a comment, which may have 65,536, has at most of each check."""
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def headline(result: dict[str, Any]) -> str:
    """The verdict in a line."""
    counts = {status: sum(check["status"] == status for check in result["checks"]) for status in SIGNS}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    if few := len(powerless(result)):
        told = told.replace("passed", f"passed, {few} of them on too little data", 1)
    return f"{result['verdict']}: {result['candidate']} against {result['against']} ({told})"


def powerless(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The tests that passed without the data to fail."""
    return [check for check in result["checks"] if check["status"] == "passed" and not check["powered"]]


def figures(check: dict[str, Any]) -> tuple[str, str, str, str]:
    """Change with its interval, what is allowed, from where on more would be found, and p-value, as text; empty where there is none."""
    if check["value"] is None:
        return "", "" if check["bound"] is None else f"≤ {check['bound']:g}", "", ""
    low, high = check["interval"]
    found = "never" if check["detectable"] is None else f"{check['bound'] + check['detectable']:.3g}"
    return f"{check['value']:+.4g} [{low:+.3g}, {high:+.3g}]", f"≤ {check['bound']:g}", found, f"{check['adjusted']:.4f}"


def about(check: dict[str, Any]) -> str:
    """What else there is to say of a check."""
    counts = ", ".join(f"{count} {what}" for what, count in check["counts"].items())
    test = f"{check['method']}, n = {check['count']}" if check["method"] else ""
    return "; ".join(part for part in (check["detail"], counts, test) if part)


def markdown(result: dict[str, Any]) -> str:
    """A comment: the verdict first, a short table, and the rest folded."""
    bad = [check for check in result["checks"] if check["status"] != "passed"]
    lines = [f"### {SIGNS[result['verdict']]} gate {_cell(headline(result))}", ""]
    lines += ["| | check | change | allowed | found from | p |", "|---|---|---:|---:|---:|---:|"]
    tests = [check for check in result["checks"] if check["bound"] is not None and check["status"] == "passed"]
    for check in [*bad, *tests]:
        detail = f": {_short(check['detail'], 200)}" if check["detail"] and check["status"] != "passed" else ""
        lines.append(f"| {SIGNS[check['status']]} | {_cell(check['suite'])}: {_cell(check['name'] + detail)} | {' | '.join(figures(check))} |")
    if not bad and not tests:
        lines.append("| ✅ | integrity | | | | |")
    if few := powerless(result):
        lines += ["", "⚠️ That these passed says little, since there are too few data for them to fail:", ""]
        lines += [f"* {_cell(check['suite'])}: {_cell(check['name'])}: {_cell(check['detail'])}" for check in few]
    lines += [f"\n⚠️ {_cell(note)}" for note in result["notes"]]
    lines += ["", "<details><summary>All checks</summary>", "", "| | check | change, 95 % interval | allowed | found from | p, corrected | |"]
    lines.append("|---|---|---:|---:|---:|---:|---|")
    for check in result["checks"]:
        told = _short(about(check), TOLD)
        cells = (SIGNS[check["status"]], f"{check['suite']}: {check['name']}", *figures(check), told)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += ["", f"A test fails if, corrected for their number, it is significant at {result['alpha']:g} that the change is beyond what is allowed."]
    lines += ["Of models with a true change as large as in the column *found from*, it would find 80 %."]
    lines += ["", f"protocol `{result['protocol_sha256'][:16]}`", "", "</details>", ""]
    return "\n".join(lines)


def junit(result: dict[str, Any]) -> str:
    """JUnit XML: a test suite for each suite, a test case for each check; what is inconclusive or was not run is an error."""
    root = ElementTree.Element("testsuites", name="compress gate")
    by_suite: dict[str, list[dict[str, Any]]] = {}
    for check in result["checks"]:
        by_suite.setdefault(check["suite"], []).append(check)
    total = {"tests": 0, "failures": 0, "errors": 0}
    for title, checks in by_suite.items():
        failures, errors = sum(each["status"] == "failed" for each in checks), sum(each["status"] in ("inconclusive", "not run") for each in checks)
        counts = {"tests": len(checks), "failures": failures, "errors": errors}
        total = {key: total[key] + counts[key] for key in total}
        attributes = {"name": _plain(title), "skipped": "0", "time": "0"} | {key: str(value) for key, value in counts.items()}
        suite = ElementTree.SubElement(root, "testsuite", attributes)
        for check in checks:
            case = ElementTree.SubElement(suite, "testcase", classname=_plain(f"gate.{title}"), name=_plain(check["name"]), time="0")
            change, bound, found, p = figures(check)
            text = f"change {change}, allowed {bound}, found from {found}, corrected p {p}; " if change else ""
            if check["status"] == "passed":
                ElementTree.SubElement(case, "system-out").text = _plain(text + about(check))
            else:
                tag = "failure" if check["status"] == "failed" else "error"
                inner = ElementTree.SubElement(
                    case, tag, message=_plain(_short(f"{check['status']}: {text}{about(check)}", 500)), type=check["status"]
                )
                inner.text = _plain(text + about(check))
    root.attrib.update({key: str(value) for key, value in total.items()})
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _short(text: str, most: int) -> str:
    """Its first `most` characters up to the end of a word; half a number is another number."""
    return text if len(text) <= most else f"{text[:most].rpartition(' ')[0]} ... (all of it in the JSON)"


def _cell(text: str) -> str:
    """Text that cannot end a cell of a table or begin a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("@", "@\u200b")


def _plain(text: str) -> str:
    """Text without characters that XML cannot hold."""
    return NOT_XML.sub("?", text)
