"""Workflows and pages name commands that exist; the GPU machine runs only what was asked for."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def _load(path):
    return yaml.safe_load(path.read_text("utf-8"))


def _jobs():
    return [
        pytest.param(job, id=f"{path.stem}-{name}")
        for path in WORKFLOWS
        for name, job in _load(path)["jobs"].items()
    ]


def _missing(text):
    """Make targets, modules and scripts that ``text`` runs and that do not exist."""
    # words behind make, up to the first that is no target, such as OUT=...
    calls = re.findall(r"(?:^|[\s`;&])make((?: [a-z-]+)+)", text, re.MULTILINE)
    targets = {target for call in calls for target in call.split()}
    modules = set(re.findall(r"-m ((?:benchmarks|examples)[\w.]*)", text))
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    return sorted(targets - TARGETS) + sorted(missing)


def _commands(page):
    """What a page shows as code: blocks and inline."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"```(?:sh)?\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    return "\n".join(blocks)


@pytest.mark.parametrize("job", _jobs())
def test_commands_of_workflows_exist(job):
    assert _missing("\n".join(step.get("run", "") for step in job["steps"])) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_commands_of_pages_exist(page):
    assert _missing(_commands(page)) == []


def test_missing_commands_are_noticed():
    text = "make check nonsense\npython -m benchmarks.nowhere\nmake gpu-suite OUT=x"
    assert _missing(text) == ["nonsense", "benchmarks.nowhere"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_only_read(path):
    workflow = _load(path)
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        runs_code = any(s.get("uses", "").startswith("actions/checkout") for s in job["steps"])
        assert not (runs_code and "permissions" in job), "a job that runs code must not write"


@pytest.mark.parametrize("job", _jobs())
def test_nothing_from_outside_is_pasted_into_a_command(job):
    """A branch or a title can hold shell code: values reach commands as variables only."""
    for step in job["steps"]:
        assert "${{ github.event" not in step.get("run", "")
        assert "${{ github.head_ref" not in step.get("run", "")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_own_machines_run_only_what_was_asked_for(path):
    workflow = _load(path)
    # YAML reads the key "on" as true
    events = workflow[True]
    for job in workflow["jobs"].values():
        if "self-hosted" not in job["runs-on"]:
            continue
        assert "pull_request" not in events, "its definition would come from the pull request"
        assert events["pull_request_target"] == {"types": ["labeled"]}, "a push runs nothing"
        assert "github.event.label.name == 'gpu'" in job["if"]
        assert job["concurrency"]["group"] == "gpu"
        assert job["timeout-minutes"] <= 60
        checkouts = [s for s in job["steps"] if s.get("uses", "").startswith("actions/checkout")]
        assert checkouts
        assert all(step["with"]["persist-credentials"] is False for step in checkouts)
        assert not any("cache" in str(step) for step in job["steps"])


def test_what_publishes_runs_no_code_and_has_no_token():
    """Trusted publishing: the right is the workflow's own, and a job that builds has none."""
    jobs = _load(ROOT / ".github" / "workflows" / "publish.yml")["jobs"]
    assert "permissions" not in jobs["build"] and "make dist" in str(jobs["build"]["steps"])
    publish = jobs["publish"]
    assert publish["needs"] == "build" and publish["environment"]
    assert publish["permissions"] == {"id-token": "write", "attestations": "write"}
    assert [step for step in publish["steps"] if "run" in step] == []
    used = [step["uses"].partition("@")[0] for step in publish["steps"]]
    assert used[-2:] == ["actions/attest-build-provenance", "pypa/gh-action-pypi-publish"]
    assert "secrets" not in str(jobs) and publish["steps"][-1]["with"]["attestations"] is True


TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_ask_for_commands_that_exist(path, capsys):
    """A form is one that GitHub takes, and its ``pag-fast`` commands have the options it names."""
    from pag_fast.cli import _parser

    form = _load(path)
    if path.stem == "config":
        assert form.keys() == {"blank_issues_enabled"}
        return
    fields = [entry for entry in form["body"] if entry["type"] != "markdown"]
    assert {"name", "description", "body"} <= form.keys()
    assert len({entry["id"] for entry in fields}) == len(fields)
    commands = re.findall(r"`pag-fast ([^`]+)`", path.read_text("utf-8"))
    parsed = [_parser().parse_args(command.split()) for command in commands]
    assert len(parsed) >= 2
    asked = {
        entry["attributes"]["label"].strip("`").split()[1]
        for entry in fields[1:]
        if entry["attributes"]["label"].startswith("`")
    }
    assert {"env", "verify"} <= asked
