"""The wheel: what each kind of machine builds, what is inside,
and that it runs where neither compiler nor driver is.

Nothing is downloaded: the builds run without isolation, and the clean environments borrow this one's torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import sass
import torch
import wheel_check
from wheel_check import linked, oldest, problems

ROOT = Path(__file__).resolve().parents[2]
GXX = shutil.which("g++")
NVCC = shutil.which("nvcc")
SWITCHES = (
    "ZOKERN_BUILD_CPU",
    "ZOKERN_BUILD_CUDA",
    "ZOKERN_CUDA_ARCHITECTURES",
    "CXX",
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "PYTHONPATH",
)

needs_gxx = pytest.mark.skipif(GXX is None, reason="no g++ on PATH: nothing to compile the CPU kernels with")
needs_nvcc = pytest.mark.skipif(
    GXX is None or NVCC is None, reason="no nvcc on PATH: nothing to compile the CUDA kernels with"
)


def call(*command: object, cwd: Path, fails: bool = False, **variables: str) -> str:
    """Output of a command that must succeed, or must fail, with none of the build's variables but these."""
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES} | variables
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (result.returncode != 0) == fails, f"{command} exited {result.returncode}:\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, with the objects that `make build` left, if any:
    what is compiled already is not compiled again."""
    copy = tmp_path_factory.mktemp("wheel") / "zokern"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "lib.*", "bdist.*", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache", "*.whl"
    )
    shutil.copytree(ROOT, copy, ignore=ignore, symlinks=True)
    return copy


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory) -> str:
    """A PYTHONPATH with which `import torch` raises."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('the build must not import torch')\n")
    assert "must not import torch" in call(
        sys.executable, "-c", "import torch", cwd=folder, fails=True, PYTHONPATH=str(folder)
    )
    return str(folder)


@pytest.fixture(scope="module")
def build(tree, no_torch, tmp_path_factory):
    """build(fails=False, **switches): the wheel and what the build said."""

    def make(fails: bool = False, **variables: str) -> tuple[Path | None, str]:
        out = tmp_path_factory.mktemp("dist")
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-v",
            "--no-index",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            out,
            tree,
        ]
        said = call(*command, cwd=out, fails=fails, PYTHONPATH=no_torch, **variables)
        return next(out.glob("zokern-*.whl"), None), said

    return make


@pytest.fixture
def environment(tmp_path):
    """A new environment without zokern and pip, in which this one's torch can be imported."""
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    home = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # A path in a .pth file becomes importable,
    # but the .pth files that lie there, an editable zokern's too, do not run.
    Path(home, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: object, **variables: str) -> None:
    options = ["--no-index", "--no-build-isolation", "--no-deps", "--ignore-installed", "-q"]
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        *options,
        *what,
        cwd=python.parent,
        **variables,
    )


def info(python: Path) -> dict:
    return json.loads(call(python, "-m", "zokern", "info", "--json", cwd=python.parent))


def compiled() -> list[str]:
    """The architectures that are compiled already; sm_90 where the module is older than a source."""
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".cu", ".h")]
    if not sass.MODULE.exists() or sass.MODULE.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        return ["90"]
    folders = (ROOT / "build" / "native").glob("cuda-*")
    found = max(folders, key=lambda folder: folder.stat().st_mtime, default=Path("cuda-90"))
    return found.name.split("-")[1:]


@needs_nvcc
def test_with_nvcc_it_holds_both_and_loads_without_a_driver(build, environment):
    """For the architectures that are compiled already: what setup.py chooses is tested below."""
    numbers = compiled()
    wheel, said = build(ZOKERN_CUDA_ARCHITECTURES=" ".join(numbers))
    names = zipfile.ZipFile(wheel).namelist()
    assert problems(names) == []
    names_of = [f"sm_{number}" for number in numbers]
    assert "zokern: built cpu: " in said and f"zokern: built cuda: {' '.join(names_of)} compute_" in said
    assert {n.split(".")[0] for n in names if n.endswith(".so")} == {"zokern/_cpu", "zokern/_cuda"}
    assert "none-any" not in wheel.name
    install(environment, wheel)
    # -S first: the module loads with nothing but the interpreter around it, so it links neither torch nor a
    # driver
    module = next(environment.parent.parent.rglob("_cuda*.so"))
    load = (
        f"import importlib.util as u; s = u.spec_from_file_location('_cuda', {str(module)!r}); "
        "u.module_from_spec(s)"
    )
    call(environment, "-S", "-c", load, cwd=environment.parent)
    report = info(environment)
    assert set(names_of) <= set(report["cuda_architectures"])
    *machine, newest = report["build"]["parts"]["cuda"]["architectures"]
    assert machine == names_of and newest.startswith("compute_")
    assert report["backends"]["cpu"] is None


@needs_gxx
def test_cpu_only_by_switch_and_installed_in_a_clean_environment(build, environment):
    wheel, said = build(ZOKERN_BUILD_CUDA="0", ZOKERN_BUILD_CPU="1")
    names = zipfile.ZipFile(wheel).namelist()
    assert problems(names) == []
    assert "zokern: left out cuda: ZOKERN_BUILD_CUDA is 0" in said
    assert {n.split(".")[0] for n in names if n.endswith(".so")} == {"zokern/_cpu"}, (
        "an earlier build's module was shipped"
    )
    install(environment, wheel)
    report = info(environment)
    assert report["backends"]["cpu"] is None and report["backends"]["reference"] is None
    assert "ZOKERN_BUILD_CUDA" in report["build"]["left_out"]["cuda"] and report["backends"]["cuda"]
    here = "import zokern; print(zokern.__file__)"
    assert call(environment, "-c", here, cwd=environment.parent).startswith(str(environment.parent.parent))
    same = (
        "import torch, zokern; name = dict(seed=3, who='w', step=1);"
        "assert torch.equal(zokern.draw('normal', 1001, backend='cpu', **name), zokern.draw('normal', 1001, "
        "backend='reference', **name))"
    )
    call(environment, "-c", same, cwd=environment.parent)
    call(environment, "-c", "import triton_kernels", cwd=environment.parent, fails=True)
    assert "backend" in call(environment.parent / "zokern", "info", cwd=environment.parent)


def test_without_a_compiler_it_is_pure_python(build, tree, environment, tmp_path):
    stale = tree / "zokern" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.write_bytes(b"left by a build of another day")
    empty = str(tmp_path)
    wheel, said = build(PATH=empty, CUDA_HOME=empty)
    stale.unlink()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert problems(names) == [] and not [n for n in names if n.endswith(".so")]
    assert (
        "zokern: left out cpu: no C++ compiler" in said and "zokern: left out cuda: no C++ compiler" in said
    )
    install(environment, wheel)
    report = info(environment)
    assert report["backends"]["reference"] is None
    assert report["backends"]["cpu"] and "no C++ compiler" in report["build"]["left_out"]["cpu"]


@pytest.mark.parametrize("part", ["CPU", "CUDA"])
def test_a_forced_part_that_cannot_be_built_stops_the_build(build, tmp_path, part):
    wheel, said = build(
        fails=True, PATH=str(tmp_path), CUDA_HOME=str(tmp_path), **{f"ZOKERN_BUILD_{part}": "1"}
    )
    assert (
        wheel is None and f"ZOKERN_BUILD_{part} is 1, but no C++ compiler (g++, c++, clang++) on PATH" in said
    )


def test_a_switch_with_another_value_is_refused(build):
    wheel, said = build(fails=True, ZOKERN_BUILD_CUDA="yes")
    assert wheel is None and "ZOKERN_BUILD_CUDA is 'yes'; expected 0" in said


@needs_nvcc
def test_an_unknown_architecture_is_refused(build):
    wheel, said = build(
        fails=True, ZOKERN_BUILD_CPU="0", ZOKERN_BUILD_CUDA="1", ZOKERN_CUDA_ARCHITECTURES="90;777"
    )
    assert wheel is None and "asked for 90 777" in said


def answers(*lines: str) -> str:
    """A program that prints the answer to its first argument,
    and leaves an empty file where -o asks for one."""
    cases = "".join(f"{line} ;;\n" for line in lines)
    touch = 'for word; do [ "$before" = -o ] && : > "$word"; before=$word; done'
    return f"#!/bin/sh\ncase $1 in\n{cases}esac\n{touch}; exit 0\n"


@pytest.fixture
def choice(tmp_path):
    """choice(answer of nvidia-smi, **switches):
    what setup.py says that it built, with compilers that compile nothing."""
    copy, programs = tmp_path / "zokern", tmp_path / "programs"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "tests", "benchmarks", "*.so", "*.egg-info")
    )
    programs.mkdir()
    known = " ".join(f"sm_{a}" for a in (75, 80, 86, 89, 90, 100, 103, 120))
    for name, text in {
        "c++": answers("--version) echo fake"),
        "nvcc": answers("--version) echo release 13.0, V13.0.1", f"--list-gpu-code) echo {known}"),
        "nvidia-smi": "#!/bin/sh\ncat $0.answer\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)

    def choose(answer: str, fails: bool = False, **variables: str) -> str:
        (programs / "nvidia-smi.answer").write_text(answer)
        variables |= {"PATH": f"{programs}:{os.environ['PATH']}", "CXX": "c++", "NVCC": "nvcc"}
        said = call(
            sys.executable,
            "setup.py",
            "--quiet",
            "build_ext",
            "--inplace",
            cwd=copy,
            fails=fails,
            **variables,
        )
        if "zokern: built cuda" in said:
            made = list((copy / "build").glob("native/cuda-*"))
            assert all(len(list(folder.glob("*.o"))) == 7 for folder in made)
        return next(line for line in said.splitlines()[::-1] if "cuda" in line.lower())

    return choose


def test_it_compiles_for_the_gpus_here_or_for_those_that_are_asked_for(choice):
    """The PTX in a build is that of its newest architecture, by family:
    sm_86 and sm_89 are made of compute_80's."""
    every = "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_100"
    for answer, asked, built in (
        ("9.0\n9.0\n", {}, "sm_90 compute_90"),
        ("8.6\n12.0\n", {}, "sm_86 sm_120 compute_100"),
        ("10.4\n", {}, "sm_103 compute_103"),  # newer than this nvcc
        ("7.5\n8.9\n", {}, "sm_89 compute_80"),  # the older one cannot run the kernels
        ("9.0\n", {"ZOKERN_CUDA_ARCHITECTURES": "all"}, every),
        ("9.0\n", {"ZOKERN_CUDA_ARCHITECTURES": "8.0;12.0"}, "sm_80 sm_120 compute_100"),
        ("", {"ZOKERN_CUDA_ARCHITECTURES": "all"}, every),
        ("No devices were found\n", {"ZOKERN_BUILD_CUDA": "1"}, every),
    ):
        said = choice(answer, **asked)
        assert said == f"zokern: built cuda: {built} (nvcc 13.0.1)", (answer, asked, said)


def test_without_a_gpu_one_line_says_how_to_ask_for_the_cuda_kernels(choice):
    way_out = "ZOKERN_CUDA_ARCHITECTURES=all, or a number such as 90, compiles them all the same"
    assert choice("") == f"zokern: left out cuda: nvidia-smi finds no GPU on this machine; {way_out}"
    old = "the GPU here has compute capability 7.5, and the kernels need 8.0"
    assert choice("7.5\n") == f"zokern: left out cuda: {old}; {way_out}"
    assert (
        choice("7.5\n", fails=True, ZOKERN_BUILD_CUDA="1")
        == f"zokern: ZOKERN_BUILD_CUDA is 1, but {old}; {way_out}"
    )
    assert choice("9.0\n", ZOKERN_CUDA_ARCHITECTURES="every").endswith("asked for every")


def test_make_asks_for_all_architectures_where_they_are_needed():
    """The suite reads the machine code of all of them, and a wheel is for any machine;
    the rest is for this one."""
    for target, asks in (("build", False), ("demo", False), ("gpu", False), ("test", True), ("wheel", True)):
        lines = call("make", "-n", target, f"PYTHON={sys.executable}", cwd=ROOT).splitlines()
        builds = [line for line in lines if "build_ext" in line or "pip wheel" in line]
        assert (
            len(builds) == 1
            and ('ZOKERN_CUDA_ARCHITECTURES="${ZOKERN_CUDA_ARCHITECTURES:-all}"' in builds[0]) is asks
        ), builds


def test_installed_in_place_the_kernels_are_found_in_the_package(tree, environment):
    install(environment, "-e", tree, ZOKERN_BUILD_CPU="0", ZOKERN_BUILD_CUDA="0")
    where = "import importlib.util; print(importlib.util.find_spec('zokern.triton_kernels').origin)"
    assert call(environment, "-c", where, cwd=environment.parent).strip() == str(
        tree / "triton_kernels" / "__init__.py"
    )
    call(environment, "-c", "import triton_kernels", cwd=environment.parent, fails=True)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda names: names - {"zokern/py.typed"}, "lacks zokern/py.typed"),
        (
            lambda names: names - {"zokern/triton_kernels/__init__.py"},
            "lacks zokern/triton_kernels/__init__.py",
        ),
        (lambda names: names - {"zokern-0.1.0.dist-info/licenses/LICENSE"}, "lacks LICENSE"),
        (
            lambda names: names | {"triton_kernels/__init__.py"},
            "installs triton_kernels/__init__.py beside the package",
        ),
        (
            lambda names: names | {"tests/step/test_step.py"},
            "installs tests/step/test_step.py beside the package",
        ),
        (
            lambda names: names | {"zokern/tests/step/test_step.py"},
            "ships zokern/tests/step/test_step.py, which is for developers",
        ),
        (
            lambda names: names | {"zokern/csrc/bind.cpp"},
            "ships zokern/csrc/bind.cpp, which is for developers",
        ),
    ],
)
def test_a_wrong_wheel_is_rejected(change, complaint):
    right = {*wheel_check.WANTED}
    right |= {"zokern-0.1.0.dist-info/licenses/LICENSE", "zokern-0.1.0.dist-info/entry_points.txt"}
    assert problems(sorted(right)) == []
    assert complaint in problems(sorted(change(right)))


def missing_sources(names: list[str]) -> list[str]:
    """What an sdist of zokern lacks of git's files, and what it holds that was built."""
    tracked = call("git", "ls-files", cwd=ROOT).splitlines()
    inside = {name.partition("/")[2] for name in names}
    wanted = [name for name in tracked if not name.startswith(".git")]
    return [f"lacks {name}" for name in wanted if name not in inside] + [
        f"holds {name}" for name in sorted(inside) if name.endswith((".so", ".pyc", ".o", "_build.py"))
    ]


def test_the_sdist_has_all_sources_and_nothing_that_was_built(tree, tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the list of sources is git's")
    off = {"ZOKERN_BUILD_CPU": "0", "ZOKERN_BUILD_CUDA": "0"}
    call(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree, **off)
    with tarfile.open(next(tmp_path.glob("zokern-*.tar.gz"))) as archive:
        names = archive.getnames()
    assert missing_sources(names) == []
    root = names[0].partition("/")[0]
    assert missing_sources([*names, f"{root}/zokern/_cpu.so"]) == ["holds zokern/_cpu.so"]
    assert missing_sources([n for n in names if not n.endswith("csrc/bind.cpp")]) == ["lacks csrc/bind.cpp"]


DUMP = """  NEEDED               libgomp.so.1
  NEEDED               libc.so.6
  required from libc.so.6:
    0x09691972 0x00 11 GLIBC_2.14
    0x06969192 0x00 10 GLIBC_2.28
  required from libstdc++.so.6:
    0x0297f864 0x00 09 GLIBCXX_3.4.21
    0x056bafd2 0x00 03 CXXABI_1.3
"""


@pytest.mark.parametrize(
    "more, tag, wrong",
    [
        ("", 28, []),
        ("GLIBC_2.32", 34, []),
        ("GLIBCXX_3.4.29 CXXABI_1.3.13", 34, []),
        ("GLIBC_2.36", 39, []),
        ("GLIBC_2.40", None, []),
        (
            "  NEEDED   libtorch_cpu.so\n  NEEDED   libcudart.so.13\n",
            28,
            ["libtorch_cpu.so", "libcudart.so.13"],
        ),
        ("  NEEDED   libcuda.so.1\n", 28, ["libcuda.so.1"]),
    ],
)
def test_what_a_module_links_and_the_tag_that_its_symbols_allow(more, tag, wrong):
    assert oldest(DUMP + more) == tag and linked(DUMP + more) == wrong


def test_a_wheel_that_is_too_large_or_links_torch_is_rejected(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "zokern-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [
            *wheel_check.WANTED,
            "zokern-0.1.0.dist-info/LICENSE",
            "zokern-0.1.0.dist-info/entry_points.txt",
        ]:
            archive.writestr(name, "")
    assert wheel_check.check_file(wheel) == [] and "its symbols allow any" in capsys.readouterr().out
    with zipfile.ZipFile(wheel, "a") as archive:
        for module in Path(torch.__file__).parent.rglob("_C*.so"):
            archive.write(module, f"zokern/{module.name}")
    monkeypatch.setattr(wheel_check, "LARGEST", 100)
    said = " ".join(wheel_check.check_file(wheel))
    assert "bytes; at most 100 are meant" in said and "links libtorch_python.so" in said
