"""Where the CUDA toolkit is, and what is left when a build fails. Needs no CUDA torch, no nvcc."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.utils.cpp_extension

pytest.importorskip("setuptools")
pytest.importorskip("pybind11", reason="the build tools of pyproject.toml are not installed here")
ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "build_kernels.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """cuda(nvcc's script) -> its folder, alone on PATH, beside a CUDA torch."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", build.PURE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.chdir(ROOT)

    def make(script: str | None) -> Path:
        bin = tmp_path / "bin"
        bin.mkdir()
        if script is not None:
            (bin / "nvcc").write_text(script)
            (bin / "nvcc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
        return bin

    return make


def says(top: Path | str) -> str:
    return f"#!/bin/sh\necho '#$ _SPACE_= ' >&2\necho '#$ TOP={top}' >&2\n"


def test_nvcc_says_where_its_toolkit_is(cuda, tmp_path):
    """A script that calls the real one, as distributions and modules install it."""
    home = tmp_path / "toolkit"
    bin = cuda(says(home / "bin" / ".."))
    (home / "bin").mkdir(parents=True)
    assert build.toolkit() == str(home)
    (bin / "nvcc").rename(home / "bin" / "nvcc")
    (bin / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert build.toolkit() == str(home)


def test_without_an_answer_the_folder_above_the_real_nvcc(cuda, tmp_path):
    bin = cuda(None)
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    real = tmp_path / "toolkit" / "bin" / "nvcc"
    real.write_text("#!/bin/sh\nexit 1\n")
    real.chmod(0o755)
    (bin / "nvcc").symlink_to(real)
    assert build.toolkit() == str(tmp_path / "toolkit")


def test_cuda_home_goes_first(cuda, monkeypatch):
    cuda(says("/elsewhere"))
    monkeypatch.setenv("CUDA_HOME", "/chosen")
    assert build.toolkit() == "/chosen"


def test_torch_builds_with_that_toolkit(cuda, tmp_path):
    """Also a torch that has looked before."""
    cuda(says(tmp_path))
    extensions, missing = build.plan()
    assert [each.name for each in extensions] == ["rlhf_fast._C", "rlhf_fast._cuda"]
    assert missing == {} and os.environ["CUDA_HOME"] == str(tmp_path)
    assert any(path.startswith(str(tmp_path)) for path in extensions[1].library_dirs)
    assert [p for p in extensions[0].sources if "cuda" in p] == []
    assert all("cuda" in p for p in extensions[1].sources)


@pytest.mark.parametrize("nvcc", ["", "#!/no/such/shell\n"])
def test_an_nvcc_that_does_not_run(cuda, nvcc):
    cuda(nvcc)
    extensions, missing = build.plan()
    assert [each.name for each in extensions][0] == "rlhf_fast._C"
    assert "CUDA" in missing or len(extensions) == 2  # which then fails to build: below


def test_what_keeps_a_kind_from_being_built(cuda, monkeypatch):
    cuda(says("/elsewhere"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is no CUDA build" in build.plan()[1]["CUDA"]
    monkeypatch.setattr(build, "compiler", lambda: None)
    extensions, missing = build.plan()
    assert extensions == [] and "no C++ compiler was found" in missing["C++"] == missing["CUDA"]
    monkeypatch.setattr(build, "compiler", lambda: "c++")
    monkeypatch.setenv(build.PURE, "1")
    assert build.plan()[0] == [] and build.PURE in build.plan()[1]["C++"]


def test_a_toolkit_in_which_torch_finds_nothing(cuda, monkeypatch, tmp_path):
    cuda(says(tmp_path))

    def nothing(*args, **options):
        raise OSError("CUDA_HOME environment variable is not set")

    monkeypatch.setattr(torch.utils.cpp_extension, "CUDAExtension", nothing)
    extensions, missing = build.plan()
    assert [each.name for each in extensions] == ["rlhf_fast._C"]
    assert "CUDA_HOME environment variable is not set" in missing["CUDA"]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(build, "say", messages.append)
    return messages


@pytest.fixture
def built(cuda, said, monkeypatch, tmp_path):
    """built(*broken, in_place) -> (the package's files, what was said): nothing is compiled."""
    cuda(says(tmp_path))
    monkeypatch.chdir(tmp_path)

    def make(*broken: str, in_place: bool = False) -> tuple[dict[str, str], list[str]]:
        from setuptools import Distribution, Extension

        def compile(command):
            for each in command.extensions:
                if each.name in broken:
                    raise RuntimeError("ld: cannot find -lcudart")
                path = Path(command.get_ext_fullpath(each.name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(each.name)

        said.clear()
        monkeypatch.setattr(torch.utils.cpp_extension.BuildExtension, "build_extensions", compile)
        package = tmp_path / ("rlhf_fast" if in_place else "build/rlhf_fast")
        package.mkdir(parents=True, exist_ok=True)
        extensions, missing = build.plan()
        distribution = Distribution({
            "name": "rlhf_fast", "packages": ["rlhf_fast"],
            "ext_modules": extensions or [Extension("rlhf_fast._C", [])],
            "cmdclass": {"build_ext": build.build_ext(missing)},
        })  # fmt: skip
        command = distribution.get_command_obj("build_ext")
        command.build_lib, command.inplace = str(tmp_path / "build"), in_place
        distribution.run_command("build_ext")
        return {path.name.split(".")[0]: path.read_text() for path in package.iterdir()}, [*said]

    return make


@pytest.mark.parametrize("in_place", [False, True])
def test_a_cuda_build_that_fails_leaves_the_others(built, in_place):
    files, said = built(in_place=in_place)
    assert set(files) == {"_C", "_cuda", "missing"} and said == [] and files["missing"] == "{}"

    files, said = built("rlhf_fast._cuda", in_place=in_place)
    assert set(files) == {"_C", "missing"}  # nor is the one of the build before left
    assert "their build failed: ld: cannot find -lcudart" in files["missing"]
    (message,) = said
    assert message.startswith("NO CUDA KERNELS: their build failed: ld: cannot find -lcudart")
    assert "Triton" in message and "rlhf-fast info" in message


def test_a_cpp_build_that_fails_says_how_to_do_without(built, said):
    with pytest.raises(RuntimeError, match="lcudart"):
        built("rlhf_fast._C")
    assert build.PURE in said[0]


def test_pure_python_is_said_and_kept(built, monkeypatch):
    built()
    monkeypatch.setenv(build.PURE, "1")
    files, (message,) = built()
    assert set(files) == {"missing"} and "RLHF_FAST_PURE_PYTHON=1" in files["missing"]
    assert message.startswith("NO C++ KERNELS")
