# SPDX-License-Identifier: MIT
"""Dockerfile, systemd unit, SROS 2 policy and the pages, as far as they can be checked."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from node_harness import ROOT, Client, save_small_model, wait_until
from node_user import running_node
from rclpy.action import get_action_server_names_and_types_by_node
from rclpy.node import NodeNameNonExistentError
from test_launch import launch_arguments

from fpt_ros.cli import app
from fpt_ros.screenshots import IMAGES, orbit

POLICY = ROOT / "config" / "sros2_policy.xml"
UNIT = ROOT / "config" / "fpt.service"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/*.md")])

# --- SROS 2 --------------------------------------------------------------------------------------

# policy.xsd of sros2: which rules a profile has, and what they list
RULES = {
    "topics": ("topic", {"publish", "subscribe"}),
    "services": ("service", {"reply", "request"}),
    "actions": ("action", {"call", "execute"}),
}


def policy_rules() -> Iterator[tuple[str, str, str]]:
    """(rule, "publish" say; qualifier; full name) of each expression of the node's profile."""
    (profile,) = ET.parse(POLICY).getroot().iterfind("enclaves/enclave/profiles/profile")
    ns, node = profile.attrib["ns"], profile.attrib["node"]
    for rules in profile:
        for expression in rules:
            name = (expression.text or "").replace("~", f"{ns}{node}")
            for what, qualifier in rules.attrib.items():
                yield what, qualifier, name if name.startswith("/") else f"{ns}{name}"


def test_policy_has_the_form_of_the_schema() -> None:
    root = ET.parse(POLICY).getroot()
    assert (root.tag, root.attrib) == ("policy", {"version": "0.2.0"})
    (enclaves,) = root
    (enclave,) = enclaves
    (profiles,) = enclave
    (profile,) = profiles
    tags = [element.tag for element in (enclaves, enclave, profiles, profile)]
    assert tags == ["enclaves", "enclave", "profiles", "profile"]
    assert enclave.attrib == {"path": "/fpt"}
    assert profile.attrib == {"ns": "/", "node": "fpt"}
    for rules in profile:
        listed, allowed = RULES[rules.tag]
        assert rules.attrib.keys() <= allowed
        assert set(rules.attrib.values()) == {"ALLOW"}
        assert {expression.tag for expression in rules} == {listed}
    names = [(what, name) for what, _, name in policy_rules()]
    assert len(names) == len(set(names)), "something is listed twice"


def names_of_node(client: Client) -> dict[str, set[str]]:
    """What the running node has, by the rule of the policy that allows it."""
    node = client.node
    services = node.get_service_names_and_types_by_node("fpt", "/")
    found = {
        "publish": node.get_publisher_names_and_types_by_node("fpt", "/"),
        "subscribe": node.get_subscriber_names_and_types_by_node("fpt", "/"),
        "reply": services,
        "execute": get_action_server_names_and_types_by_node(node, "fpt", "/"),
    }
    # those of the action are allowed by its own rule
    return {what: {n for n, _ in those if "/_action/" not in n} for what, those in found.items()}


def test_policy_allows_what_the_node_has_and_nothing_else(tmp_path: Path) -> None:
    allowed: dict[str, set[str]] = {what: set() for what, _, _ in policy_rules()}
    for what, _, name in policy_rules():
        allowed[what].add(name)
    if find_spec("tf2_ros") is None:  # nor does the node subscribe to its topics then
        allowed["subscribe"] -= {"/tf", "/tf_static"}
    model = save_small_model(tmp_path / "fpt-test.safetensors", flow_dim=3)
    found: dict[str, set[str]] = {}
    with running_node(model, use_sim_time=True, target_frame="base_link") as user:

        def same() -> bool:
            with suppress(NodeNameNonExistentError):  # not discovered yet
                found.update(names_of_node(user.client))
            return found == allowed

        wait_until(same, 30.0, lambda: f"node: {found}\npolicy: {allowed}")


# --- systemd -------------------------------------------------------------------------------------


def test_unit_starts_the_launch_file_and_stops_it_gently() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text())
    service = unit["Service"]
    shell, option, script = shlex.split(service["ExecStart"])
    assert (shell, option) == ("/bin/bash", "-c")
    assert (
        "ros2 launch --noninteractive fpt_ros fpt.launch.py required:=true $FPT_ARGUMENTS" in script
    )
    assert subprocess.run([shell, "-n", option, script]).returncode == 0
    assert (service["KillSignal"], service["KillMode"]) == ("SIGINT", "mixed")
    assert service["Restart"] == "always"
    assert unit["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_unit_is_valid_for_systemd() -> None:
    done = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True)
    of_unit = [line for line in done.stderr.splitlines() if "fpt.service" in line]
    assert (done.returncode, of_unit) == (0, [])


# --- Docker --------------------------------------------------------------------------------------


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    )
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line.strip()]


def test_dockerfile_copies_files_that_exist_and_runs_valid_shell() -> None:
    instructions = dockerfile()
    assert instructions[0] == ("FROM", "ros:jazzy")
    copied = [arguments.split() for name, arguments in instructions if name == "COPY"]
    assert [target for *_, target in copied] == [
        "src/fpt_ros/package.xml", "src/fpt_ros/fpt_msgs/package.xml", "src/fpt_ros",
    ]  # fmt: skip
    for *sources, _ in copied:
        for source in sources:
            assert (ROOT / source).exists(), source
    for name, arguments in instructions:
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", arguments]).returncode == 0, arguments
    # the order in which a workspace is put on top of others
    entry = ast.literal_eval(dict(instructions)["ENTRYPOINT"])
    sourced = re.findall(r"source (\S+)", entry[2])
    assert sourced == [
        "/opt/ros/jazzy/setup.bash", "/ws/venv/bin/activate", "/ws/install/setup.bash",
    ]  # fmt: skip
    done = subprocess.run(
        [*entry[:2], 'exec "$@"', *entry[3:], "echo", "a b"], capture_output=True, text=True
    )
    assert done.stdout == "a b\n"
    assert entry[2].endswith('exec "$@"')
    assert ast.literal_eval(dict(instructions)["CMD"]) == [
        "ros2", "launch", "fpt_ros", "fpt.launch.py",
    ]  # fmt: skip


def test_dockerfile_installs_what_setup_names() -> None:
    setup = (ROOT / "setup.py").read_text()
    pips = " ".join(arguments for name, arguments in dockerfile() if "pip install" in arguments)
    for name in ("torch", "torchvision"):
        (pinned,) = re.findall(rf'"({name}==[\d.]+)"', setup)
        assert pinned in pips.split()
    for name in ("timm", "safetensors", "onnxruntime", "rosbags"):
        assert name in pips.split()
        assert f'"{name}' in setup


def test_docker_ignores_what_git_ignores() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    listed = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()}
    assert listed - ignored == {".git"}
    assert {".venv", "build", "install", "log", "data", "runs"} <= listed


# --- pages ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert text.startswith("# ")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages


def commands_of(pages: list[Path]) -> Iterator[tuple[str, list[str]]]:
    """The commands in the shell blocks of pages, with their page's name."""
    for page in pages:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield page.name, words


def test_fpt_commands_in_the_pages_have_the_options_they_use() -> None:
    import typer

    group = typer.main.get_command(app)
    seen = set()
    for page, words in commands_of(PAGES):
        if words[0] not in ("fpt", ".venv/bin/fpt"):
            continue
        command = group.commands[words[1]]  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in parameter.opts}
        for word in words[2:]:
            if word.startswith("--") and word != "--help":
                assert word in known, f"{page}: fpt {words[1]} has no {word}"
        seen.add(words[1])
    assert {"bag", "view", "predict", "export", "check", "eval", "train"} <= seen


@pytest.mark.parametrize("module", ["sim.dataset", "training.tracks"])
def test_modules_in_the_pages_have_the_options_they_use(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [module, "--help"])
    with pytest.raises(SystemExit):
        import_module(module).main()
    usage = capsys.readouterr().out.split("\n\n")[0]
    known = set(re.findall(r"--[\w-]+", usage))
    seen = 0
    for page, words in commands_of(PAGES):
        if words[1:3] == ["-m", module]:
            used = {word for word in words if word.startswith("--")}
            assert used <= known, f"{page}: {module} has no {sorted(used - known)}"
            seen += 1
    assert seen > 0


def test_launch_commands_in_the_pages_have_the_arguments_they_use() -> None:
    pytest.importorskip("launch_ros")
    known = {file: launch_arguments(file).keys() for file in ("fpt.launch.py", "sim.launch.py")}
    seen = 0
    for page, words in commands_of(PAGES):
        for file, arguments in known.items():
            if "launch" in words and file in words:
                for word in words[words.index(file) + 1 :]:
                    if ":=" in word:
                        assert word.partition(":=")[0] in arguments, f"{page}: {word}"
                        seen += 1
    assert seen > 5


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    picture = np.full((120, 160, 3), 190, np.uint8)
    cv2.rectangle(picture, (40, 30), (110, 90), (180, 90, 60), -1)
    cv2.imwrite(str(tmp_path / "photo.jpg"), picture)
    monkeypatch.chdir(tmp_path)
    read: dict[str, Any] = {}
    exec(code, read)
    mixture, mask = read["mixture"], read["mask"]
    assert len(mixture) == 1
    assert 0.02 < mixture.mean()[0, 0] < 0.1  # the box moves, by fractions, as it is poked
    assert (mask.shape, mask.dtype) == ((64, 64), bool)
    assert mask[32, 32]
    assert not mask[0, 0]
    assert str(mixture.mean()) in capsys.readouterr().out


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for page in PAGES for target in re.findall(r"`make (\w+)", page.read_text())}
    assert named <= targets
    assert "screenshots" in named


# --- screenshots ---------------------------------------------------------------------------------


def test_the_view_of_the_rviz_set_up_looks_ahead_with_y_down() -> None:
    set_up = yaml.safe_load((ROOT / "rviz" / "fpt.rviz").read_text())
    view: dict[str, Any] = set_up["Visualization Manager"]["Views"]["Current"]
    (right, down, ahead), place = orbit(view)
    assert right[0] > 0.9
    assert down[1] > 0.9
    assert ahead[2] > 0.9
    assert place[2] < 0  # behind the optical centre


def test_the_pictures_of_the_pages_are_there() -> None:
    page = (ROOT / "docs" / "viewing.md").read_text()
    pictures = re.findall(r"\]\((images/\w+\.png)\)", page)
    assert sorted(pictures) == ["images/rviz_displays.png", "images/view_rerun.png"]
    for picture in pictures:
        data = (IMAGES.parent / picture).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 500_000, f"{picture} is too large for pre-commit"
