"""The CUDA kernel from its source to a launch: NVRTC, which torch brings along, and the driver.

Neither a compiler nor CUDA's headers need to be installed. Both libraries are called through ctypes: torch's
own `torch.cuda._compile_kernel` passes no struct by value, and so would need a copy to the device, and a
place for it that lives as long as a graph, for every call.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coursepack.kernels.cuda_source import ARGUMENT_BYTES, ENTRY, SOURCE

if TYPE_CHECKING:
    from collections.abc import Sequence

OLDEST = (7, 0)
"""Compute capability that the source needs: arguments that need no copy to be indexed."""
USUAL_SHARED_BYTES = 48 * 1024
STATIC_SHARED_BYTES = 1024
"""More than the source's own arrays in shared memory take."""
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...
_lock = threading.Lock()
_kernels: dict[int, Kernel | KernelUnavailable] = {}


class KernelUnavailable(RuntimeError):
    """The CUDA kernel cannot be compiled or loaded here; the text says why."""


class Kernel:
    """A loaded kernel of one device."""

    def __init__(self, driver: Any, function: int, shared_bytes: int) -> None:
        self._driver = driver
        self._function = ctypes.c_void_p(function)
        self.shared_bytes = shared_bytes
        """Dynamic shared memory that a block may have."""

    def launch(self, device: torch.device, blocks: int, threads: int, shared: int, argument: bytes) -> None:
        """Put one launch into the device's current stream.

        Args:
            device: whose stream it is.
            blocks: how many.
            threads: of each block, a multiple of 32.
            shared: bytes of dynamic shared memory.
            argument: what the kernel is given, filled up with zeros.

        Raises:
            RuntimeError: the driver refuses.
        """
        with torch.cuda.device(device):
            _enter_context(self._driver, _index(device))
            self.put(blocks, threads, shared, argument, torch.cuda.current_stream(device).cuda_stream)

    def put(self, blocks: int, threads: int, shared: int, argument: bytes, stream: int | None) -> None:
        """`launch` into a stream of the current context."""
        given = ctypes.create_string_buffer(argument, ARGUMENT_BYTES)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(given))
        call_driver(
            self._driver, "cuLaunchKernel", self._function,
            *map(ctypes.c_uint, (blocks, 1, 1, threads, 1, 1, shared)),
            ctypes.c_void_p(stream), arguments, None,
        )  # fmt: skip


def kernel_for(device: torch.device) -> Kernel:
    """The kernel of a device, compiled and loaded when it is first asked for.

    Raises:
        KernelUnavailable: it cannot be had; said again at every later call, without another try.
    """
    index = _index(device)
    found = _kernels.get(index)
    if found is None:
        if torch.cuda.is_current_stream_capturing():
            raise KernelUnavailable("not compiled before the capture of a CUDA graph: call it once first")
        with _lock:
            found = _kernels.get(index) or _try_to_load(index)
            _kernels[index] = found
    if isinstance(found, KernelUnavailable):
        raise found
    return found


def _try_to_load(index: int) -> Kernel | KernelUnavailable:
    try:
        return _load(index)
    except KernelUnavailable as err:
        return err
    except (OSError, RuntimeError, AttributeError) as err:
        return KernelUnavailable(str(err))


def _load(index: int) -> Kernel:
    if torch.version.cuda is None:
        raise KernelUnavailable("torch is not built for CUDA")
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < OLDEST:
        raise KernelUnavailable(f"compute capability {capability}, expected at least {OLDEST}")
    code, _ = compile_source(SOURCE, [f"--gpu-architecture=sm_{capability[0]}{capability[1]}"])
    driver = find_driver()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(index):
        _enter_context(driver, index)
        call_driver(driver, "cuModuleLoadData", ctypes.byref(module), code)
        call_driver(driver, "cuModuleGetFunction", ctypes.byref(function), module, ENTRY.encode())
        shared = getattr(properties, "shared_memory_per_block_optin", 0) - STATIC_SHARED_BYTES
        if shared > USUAL_SHARED_BYTES:
            attribute = ctypes.c_int(_MAX_DYNAMIC_SHARED_SIZE_BYTES)
            call_driver(driver, "cuFuncSetAttribute", function, attribute, ctypes.c_int(shared))
    usual = USUAL_SHARED_BYTES - STATIC_SHARED_BYTES
    return Kernel(driver, function.value or 0, max(shared, usual))


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _enter_context(driver: Any, index: int) -> None:
    """Make torch's context current: a Python thread that has not used the device yet has none."""
    context = ctypes.c_void_p()
    call_driver(driver, "cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        call_driver(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(index))
        call_driver(driver, "cuCtxSetCurrent", context)


def call_driver(driver: Any, name: str, *arguments: Any) -> None:
    """Call a function of the driver.

    Raises:
        RuntimeError: it gives an error; the text has its name and the driver's words.
    """
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name} gave error {code}: {(text.value or b'unknown').decode()}")


def find_driver() -> Any:
    """The driver's library.

    Raises:
        OSError: there is none.
    """
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def find_nvrtc() -> Any:
    """The NVRTC library of the CUDA that torch is built for.

    Raises:
        KernelUnavailable: there is none.
    """
    if torch.version.cuda is None:
        raise KernelUnavailable("torch is not built for CUDA")
    major = torch.version.cuda.partition(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    packages = Path(torch.__file__).parents[1] / "nvidia"
    # By its name alone where torch has loaded it already; else from the wheels that torch depends on.
    for place in (name, *sorted(str(path) for path in packages.glob(f"*/lib/{name}"))):
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise KernelUnavailable(f"{name} is neither known to the loader nor below {packages}")


def compile_source(source: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Machine code, and what the compiler had to say.

    Raises:
        KernelUnavailable: there is no compiler, or it refuses the source or an option.
    """
    library = find_nvrtc()
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"soft_target_loss.cu", 0, None, None
    ))  # fmt: skip
    try:
        given = [option.encode() for option in options]
        result = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        log = _read(library, program, "ProgramLog").rstrip(b"\0").decode().strip()
        _check(library, result, log)
        return _read(library, program, "CUBIN"), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: Any, result: int, log: str = "") -> None:
    if result:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        text = library.nvrtcGetErrorString(result).decode()
        raise KernelUnavailable(f"NVRTC says {text}" + (f": {log}" if log else ""))
