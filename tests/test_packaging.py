# SPDX-License-Identifier: MIT
"""The packages as installed: metadata, messages, executables, bootstrap, environment."""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points, version
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
from ament_index_python.packages import get_package_prefix, get_package_share_directory

from fpt_ros import environment

ROOT = Path(__file__).resolve().parents[1]
DEPENDENCY_TAGS = ("depend", "build_depend", "buildtool_depend", "exec_depend", "test_depend")
SCRIPTS = [e for e in entry_points(group="console_scripts") if e.dist and e.dist.name == "fpt_ros"]


def xml_dependencies(package_xml: Path, *tags: str) -> set[str]:
    root = ET.parse(package_xml).getroot()
    return {e.text or "" for tag in tags or DEPENDENCY_TAGS for e in root.findall(tag)}


# --- versions and dependencies -------------------------------------------------------------------


def first_match(path: str, pattern: str) -> str:
    match = re.search(pattern, (ROOT / path).read_text(), re.MULTILINE)
    assert match, f"{path} has no line that matches {pattern!r}"
    return match[1]


def test_versions_are_equal() -> None:
    versions = {
        "package.xml": first_match("package.xml", r"<version>(.+)</version>"),
        "setup.py": first_match("setup.py", r'^\s+version="(.+)",'),
        "CHANGELOG.rst": first_match("CHANGELOG.rst", r"^(\d+\.\d+\.\d+)"),
        "fpt_msgs/package.xml": first_match("fpt_msgs/package.xml", r"<version>(.+)</version>"),
        "fpt_msgs/pyproject.toml": first_match("fpt_msgs/pyproject.toml", r'^version = "(.+)"'),
        "installed fpt_ros": version("fpt_ros"),
        "installed fpt_msgs": version("fpt_msgs"),
    }
    assert len(set(versions.values())) == 1, versions


@pytest.mark.parametrize(
    ("path", "build_type"),
    [("package.xml", "ament_python"), ("fpt_msgs/package.xml", "ament_cmake")],
)
def test_package_xml(path: str, build_type: str) -> None:
    root = ET.parse(ROOT / path).getroot()
    assert root.tag == "package"
    assert root.get("format") == "3"
    assert root.findtext("license") == "MIT"
    assert root.findtext("export/build_type") == build_type
    for tag in ("name", "version", "description", "maintainer"):
        assert (root.findtext(tag) or "").strip(), f"{path} has no {tag}"
    for key in xml_dependencies(ROOT / path):
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", key), f"{key!r} is no rosdep key"
        assert not key.startswith("ros-"), f"{key!r} is a wheel or Debian package, not a rosdep key"


def imported_modules(file: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.split(".")[0])
    return modules


# What package.xml calls an imported module, where that is not the module's own name.
ROSDEP_KEYS = {"cv2": "python3-opencv", "tf2_ros": "tf2_ros_py"} | {
    module: f"python3-{module}"
    for module in ("hypothesis", "matplotlib", "numpy", "pytest", "rich", "tqdm", "typer", "yaml")
}
PIP_ONLY = {  # see the extras of setup.py
    *(
        "lightning_fabric",
        "mujoco",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "open3d",
        "rerun",
        "rosbags",
        "safetensors",
        "tensorboard",
        "timm",
        "torch",
        "webdataset",
    )
}
NEVER_IMPORTED = {"ros2launch", "python3-pytest-timeout"}  # a command, and a plugin of pytest


def rosdep_keys_of_imports(*folders: str) -> set[str]:
    files = [file for folder in folders for file in (ROOT / folder).glob("**/*.py")]
    ours = {"fpt_model", "fpt_ros", "sim", "training"}
    ours |= {f.stem for folder in ("tests", "benchmarks") for f in ROOT.glob(f"{folder}/*.py")}
    modules = set().union(*map(imported_modules, files)) - ours - sys.stdlib_module_names
    return {ROSDEP_KEYS.get(module, module) for module in modules - PIP_ONLY}


@pytest.mark.parametrize("model", sorted(p.stem for p in (ROOT / "models").glob("*.safetensors")))
def test_a_model_card_is_of_the_file_beside_it(model: str) -> None:
    digest = hashlib.sha256((ROOT / f"models/{model}.safetensors").read_bytes()).hexdigest()
    assert f"| sha256 | `{digest}` |" in (ROOT / f"models/{model}.md").read_text()


def test_package_xml_names_exactly_what_is_imported() -> None:
    run = rosdep_keys_of_imports("fpt_model", "fpt_ros", "launch", "sim", "training")
    test = rosdep_keys_of_imports("tests") - run
    package_xml = ROOT / "package.xml"
    assert xml_dependencies(package_xml, "exec_depend") - NEVER_IMPORTED == run
    assert xml_dependencies(package_xml, "test_depend") - NEVER_IMPORTED == test


# --- installation --------------------------------------------------------------------------------


def test_ament_index_knows_the_packages() -> None:
    assert Path(get_package_prefix("fpt_ros")) == Path(sys.prefix)
    assert Path(get_package_share_directory("fpt_msgs"), "msg", "Poke.msg").is_file()


@pytest.mark.parametrize("folder", ["config", "launch", "models", "rviz"])
def test_shared_files_are_installed_and_current(folder: str) -> None:
    sources = [f for f in (ROOT / folder).glob("*") if f.is_file()]
    assert sources, f"{folder}/ is empty"
    for source in sources:
        installed = Path(get_package_share_directory("fpt_ros"), folder, source.name)
        assert installed.read_bytes() == source.read_bytes(), f"{source.name}: run tools/bootstrap"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_executables_are_where_ros2_looks(script: EntryPoint) -> None:
    executable = Path(get_package_prefix("fpt_ros"), "lib", "fpt_ros", script.name)
    assert os.access(executable, os.X_OK)
    assert callable(script.load())


def test_an_executable_runs() -> None:
    executable = Path(get_package_prefix("fpt_ros"), "lib", "fpt_ros", "fpt")
    done = subprocess.run([executable, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout


def test_light_programs_start_without_heavy_libraries() -> None:
    light = (
        *("cli", "environment", "image_publisher", "node", "parameters", "planning"),
        *("poke_planner", "poke_publisher"),
    )
    program = (
        f"import sys; from fpt_ros import {', '.join(light)}; from sim import camera_node;"
        "from fpt_model import config, geometry, mixture, visualize;"
        "print(*sys.modules.keys() & {'torch', 'timm', 'mujoco'})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


# --- bootstrap -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    loader = SourceFileLoader("bootstrap", str(ROOT / "tools" / "bootstrap"))
    spec = spec_from_loader("bootstrap", loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_digest_sees_contents_names_and_modes(
    bootstrap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    file = tmp_path / "folder" / "file"
    file.parent.mkdir()
    file.write_text("contents")
    seen = [bootstrap.digest(file.parent)]
    assert bootstrap.digest(file.parent) == seen[0]

    file.write_text("other contents")
    seen.append(bootstrap.digest(file.parent))
    file.chmod(0o755)
    seen.append(bootstrap.digest(file.parent))
    file.rename(file.with_name("renamed"))
    seen.append(bootstrap.digest(file.parent))
    seen.append(bootstrap.digest(file.parent, extra="more"))
    assert len(set(seen)) == len(seen)

    (file.parent / "__pycache__").mkdir()
    (file.parent / "__pycache__" / "file.pyc").write_text("")
    assert bootstrap.digest(file.parent) == seen[3]


def test_stamps_survive_damage(bootstrap: ModuleType, tmp_path: Path) -> None:
    stamps = tmp_path / "stamps.json"
    assert bootstrap.read_stamps(stamps) == {}
    bootstrap.write_stamp(stamps, "first", "a")
    bootstrap.write_stamp(stamps, "second", "b")
    assert bootstrap.read_stamps(stamps) == {"first": "a", "second": "b"}
    assert list(tmp_path.iterdir()) == [stamps]
    for damage in ("", '{"first": "a', "[]"):
        stamps.write_text(damage)
        assert bootstrap.read_stamps(stamps) == {}


def test_second_run_does_nothing(bootstrap: ModuleType) -> None:
    stamps = bootstrap.read_stamps(bootstrap.STAMPS)
    changed = [name for name, inputs, *_ in bootstrap.steps() if stamps.get(name) != inputs]
    if changed and "FPT_BOOTSTRAPPED" not in os.environ:  # which `make test` sets
        pytest.skip("sources have changed since tools/bootstrap ran")
    assert not changed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    done = subprocess.run(
        [ROOT / "tools" / "bootstrap"], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[bootstrap] up to date\n"


def test_unsupported_python_is_named_with_the_cure(tmp_path: Path) -> None:
    for name in ("tools/bootstrap", "setup.py", "setup.cfg", "pyproject.toml", "package.xml"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    old_python = tmp_path / "python3.8"
    old_python.write_text("#!/bin/sh\necho 3 8\n")
    old_python.chmod(0o755)
    done = subprocess.run(
        [sys.executable, tmp_path / "tools" / "bootstrap"],
        env={**os.environ, "PYTHON": str(old_python)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "python3.8 is 3.8" in done.stderr
    assert "sudo apt-get install" in done.stderr


def test_missing_python_is_named_with_the_cure(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(shutil.which("make")), "-C", ROOT, "bootstrap"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "sudo apt-get install python3 python3-venv" in done.stderr


def test_missing_compiler_is_named_with_the_cure(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap.check_compiler()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(bootstrap.BootstrapError, match=r"sudo apt-get install g\+\+$"):
        bootstrap.check_compiler()


def test_missing_renderer_is_named_with_the_cure(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap.check_rendering()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_FILENAMES", "/dev/null")  # EGL without a driver
    with pytest.raises(bootstrap.BootstrapError, match=r"sudo apt-get install libegl1 libegl-mesa"):
        bootstrap.check_rendering()


# --- environment ---------------------------------------------------------------------------------


def test_environment_keeps_what_the_user_set() -> None:
    given = {
        "RMW_IMPLEMENTATION": "rmw_cyclonedds_cpp",
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "SUBNET",
        "MUJOCO_GL": "osmesa",
        "PATH": "/usr/bin",
        "AMENT_PREFIX_PATH": "/opt/other",
    }
    added = environment.defaults(given)
    assert added == {
        "PATH": f"{sys.prefix}/bin{os.pathsep}/usr/bin",
        "AMENT_PREFIX_PATH": f"{sys.prefix}{os.pathsep}/opt/other",
    }
    assert environment.defaults({**given, **added}) == added


def test_launch_files_leave_discovery_alone() -> None:
    assert set(environment.transport_defaults({})) == {"FASTRTPS_DEFAULT_PROFILES_FILE"}
    profile = {"FASTDDS_DEFAULT_PROFILES_FILE": "mine.xml"}
    assert environment.transport_defaults(profile) == {}


def test_fastdds_profile_holds_several_frames() -> None:
    tree = ET.parse(environment.fastdds_profile())
    (size,) = (e.text for e in tree.iter() if e.tag.endswith("segment_size"))
    assert int(size or 0) >= 5 * 1920 * 1080 * 3  # bytes, of full-HD colour frames


def test_domains_are_claimed_once() -> None:
    first, first_claim = environment.claim_domain_id()
    with first_claim:
        second, second_claim = environment.claim_domain_id()
        second_claim.close()
    again, again_claim = environment.claim_domain_id()
    again_claim.close()
    assert first != second
    assert again == first
    assert 0 < first <= environment.MAX_DOMAIN_ID
