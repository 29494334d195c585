"""The C++ kernels on their own: built from tests/cpp without ONNX Runtime, run for every instruction set here."""

from __future__ import annotations

import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from splitq_edge.runtime_ops import library_path

TESTS = Path(__file__).parents[1]
# Each ascending.
X86_ISAS = ("scalar", "avx2", "avx512vnni")
ARM_ISAS = ("scalar", "neon", "dotprod", "i8mm")
ISAS, FOREIGN_ISAS = (ARM_ISAS, X86_ISAS) if platform.machine() in ("aarch64", "arm64") else (X86_ISAS, ARM_ISAS)
# By the first letters of a kernel's name: those that use the one before's.
WITHOUT_OWN = {"qd8_qc": set(), "rows_": {"dotprod", "i8mm"}, "terms_": {"avx512vnni", "dotprod", "i8mm"}}
ARM_TOOLS = ("cmake", "aarch64-linux-gnu-g++", "aarch64-linux-gnu-nm", "qemu-aarch64")
EXPECT_NATIVE = os.environ.get("SPLITQ_EXPECT_NATIVE") == "1"
WITH_NATIVE = EXPECT_NATIVE or library_path() is not None
needs_native = pytest.mark.skipif(not WITH_NATIVE, reason="no native library is installed")


def run(*command: object, isa: str | None = None, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SPLITQ_ISA"}
    if isa is not None:
        environment["SPLITQ_ISA"] = isa
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


def checked(*command: object, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with kernel_test and the object files."""
    missing = next((tool for tool in ("cmake", "c++") if shutil.which(tool) is None), None)
    if missing and not EXPECT_NATIVE:
        pytest.skip(f"{missing} is not installed")
    assert not missing, f"SPLITQ_EXPECT_NATIVE=1, but {missing} is not installed"
    folder = tmp_path_factory.mktemp("kernels")
    checked("cmake", "-S", TESTS / "cpp", "-B", folder)
    checked("cmake", "--build", folder)
    return folder


def check_kernels_that_ran(printed: str, offered: tuple[str, ...]) -> None:
    for family, without_own in WITHOUT_OWN.items():
        kernels = {line.rpartition("_")[2] for line in printed.splitlines() if line.startswith(family)}
        assert kernels == set(offered) - without_own, family
    for bits, each in itertools.product((2, 3, 4, 6, 8), offered):
        assert re.search(rf"^qd8_qc{bits}w_\w+_{each}$", printed, re.MULTILINE), (bits, each)


def check_symbols(build: Path, isas: tuple[str, ...], nm: str) -> set[str]:
    """Names of the object files of `isas`; each defines functions of its instruction set alone and no weak one."""
    names = set()
    for path in build.rglob("*.o"):
        isa = re.match(r"[a-z0-9]+", path.name)[0]
        if isa not in isas:
            continue
        names.add(path.name)
        defined = [line.split() for line in checked(nm, "--defined-only", "--demangle", path).splitlines() if line]
        kinds = {words[1] for words in defined}
        assert kinds <= set("Ttr"), (path.name, defined)
        public = [" ".join(words[2:]) for words in defined if words[1] == "T"]
        assert public
        assert all(isa in name.lower() for name in public), public
    assert any("kernels_plain" in str(path) for path in build.rglob("*.o"))
    return names


@pytest.mark.slow
def test_every_kernel_equals_plain_loops_on_each_instruction_set(build: Path) -> None:
    best = ""
    for isa in reversed(ISAS):
        printed = checked(build / "kernel_test", isa=isa)
        ran = re.search(r"^isa (\w+): \d+ checks, 0 failures$", printed, re.MULTILINE)
        assert ran, printed
        best = best or ran[1]
        assert ran[1] == min(isa, best, key=ISAS.index)
        check_kernels_that_ran(printed, ISAS[: ISAS.index(ran[1]) + 1])


@pytest.mark.slow
def test_avx512_kernels_equal_plain_loops_on_emulated_intrinsics(build: Path) -> None:
    """The processor of a test machine seldom has AVX-512; SIMDe stands in for it."""
    done = run(build / "kernel_test", "emulated")
    if "_emulated" not in done.stdout:
        pytest.skip("SIMDe (libsimde-dev) is not installed")
    printed = done.stdout
    assert done.returncode == 0, printed
    assert re.search(r"^isa emulated: \d{5,} checks, 0 failures$", printed, re.MULTILINE), printed
    assert set(re.findall(r"^qd8_qc(\d)w_\w+_emulated$", printed, re.MULTILINE)) == {"2", "3", "4", "6", "8"}


@pytest.mark.slow
def test_files_of_an_instruction_set_share_no_function_with_others(build: Path) -> None:
    """A weak symbol compiled with AVX2 might be the copy that the linker keeps for every processor."""
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("nm of GNU binutils is not installed")
    names = check_symbols(build, ISAS[1:], "nm")
    if platform.machine() == "x86_64":
        assert len(names) == 13


@pytest.mark.slow
def test_processor_without_avx_runs_the_scalar_kernels(build: Path) -> None:
    """The emulator stops a program at an instruction that the processor lacks."""
    if platform.machine() != "x86_64" or shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 (qemu-user) is not installed")
    printed = checked("qemu-x86_64", "-cpu", "Nehalem", build / "kernel_test", timeout=1800)
    assert re.search(r"^isa scalar: \d{5,} checks, 0 failures$", printed, re.MULTILINE), printed


@pytest.mark.slow
def test_arm64_kernels_equal_plain_loops_under_emulation(tmp_path: Path) -> None:
    missing = next((tool for tool in ARM_TOOLS if shutil.which(tool) is None), None)
    if missing:
        pytest.skip(f"{missing} is not installed")
    printed = checked("bash", TESTS / "cpp" / "arm64.sh", tmp_path, timeout=1800)
    for processor, count in (("cortex-a53", 2), ("cortex-a76", 3), ("max", 4)):
        section = printed.partition(f"processor {processor}\n")[2].partition("processor ")[0]
        check_kernels_that_ran(section, ARM_ISAS[:count])
    assert len(check_symbols(tmp_path, ARM_ISAS[1:], "aarch64-linux-gnu-nm")) == 6


@needs_native
def test_doctor_tells_the_instruction_set_and_the_variable_lowers_it() -> None:
    doctor = (sys.executable, "-m", "splitq_edge.cli", "doctor")
    best = re.search(r"native library: \S+, (\w+) kernels$", checked(*doctor), re.MULTILINE)
    assert best
    for isa in ISAS:
        lowered = min(isa, best[1], key=ISAS.index)
        assert f", {lowered} kernels\n" in checked(*doctor, isa=isa)
    assert f", {best[1]} kernels\n" in checked(*doctor, isa="")
    for isa in FOREIGN_ISAS:
        assert ", scalar kernels\n" in checked(*doctor, isa=isa)


@needs_native
def test_unknown_instruction_set_is_one_clear_error() -> None:
    code = "import onnxruntime; from splitq_edge import runtime_ops; runtime_ops.register(onnxruntime.SessionOptions())"
    done = run(sys.executable, "-c", code, isa="avx3")
    assert done.returncode != 0
    names = "scalar, avx2, avx512vnni, neon, dotprod or i8mm"
    message = f"SPLITQ_ISA: expected {names}, got 'avx3'; correct the variable or unset it"
    assert done.stderr.splitlines()[-1].endswith(message)


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="nm lists the exports of ELF files")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_library_exports_no_more_than_it_must() -> None:
    listing = checked("nm", "-D", "--defined-only", library_path())
    assert {line.split()[-1] for line in listing.splitlines()} == {"RegisterCustomOps", "SplitQIsa"}


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_ops_pass_their_tests_on_lower_instruction_sets(isa: str) -> None:
    suites = (TESTS / "unit" / "test_ops_bodies.py", TESTS / "parity" / "test_site_parity.py")
    printed = checked(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites, isa=isa)
    assert re.search(r"^\d{3,} passed", printed, re.MULTILINE), printed
