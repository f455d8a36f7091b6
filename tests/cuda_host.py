"""Runs the CUDA kernel's own source on the CPU: its threads are fibers that take turns between barriers.

The source is compiled as C++ behind definitions of what CUDA has and C++ has not. A barrier gives the turn
to the next thread, of the warp where it is a shuffle, else of the block; all must come to the same one.
Between two barriers threads run one after another, upwards or downwards: a result that depends on this order
is a race. Shared memory starts as NaN, and has a border that must stay untouched. The library speaks as much
of the driver's interface as `nvrtc.Kernel` uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch

from coursepack.kernels import cuda, dispatch, nvrtc, soft_target_loss
from coursepack.kernels.cuda_source import BODY
from coursepack.kernels.request import check_request

HOST = r"""
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(threads)
#define SHARED_ROWS(name) float *name = host_shared
using std::exp2f;

struct Place { unsigned x, y, z; };
static Place threadIdx, blockIdx, blockDim, gridDim;

enum { MOST = 1024, STACK = 65536, SHARED = 60000, BORDER = 64, SHUFFLE = 1 << 20 };
static float host_shared[SHARED + BORDER];
static char host_stacks[MOST][STACK];
static ucontext_t host_fibers[MOST], host_turns;
static int host_lines[MOST];  // of the barrier that a fiber waits at; 0: it is done
static const void *host_argument;
static unsigned long long host_values[MOST];
static const char *host_error = "";
extern "C" int host_downwards;
int host_downwards = 0;

static void host_barrier(int line)
{
    const unsigned me = threadIdx.x;
    host_lines[me] = line;
    swapcontext(&host_fibers[me], &host_turns);
}

template <class T> static T host_shuffle(T value, int step, int line)
{
    static_assert(sizeof(T) <= 8, "");
    const unsigned me = threadIdx.x;
    std::memcpy(&host_values[me], &value, sizeof(T));
    host_barrier(SHUFFLE + line);
    std::memcpy(&value, &host_values[me ^ step], sizeof(T));
    host_barrier(SHUFFLE * 2 + line);
    return value;
}

static int host_any(int value, int line)
{
    host_values[threadIdx.x] = value;
    host_barrier(line);
    int any = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) any |= host_values[i] != 0;
    host_barrier(-line);
    return any;
}

#define __syncthreads() host_barrier(__LINE__)
#define __syncthreads_or(value) host_any(value, __LINE__)
#define __shfl_xor_sync(mask, value, step) host_shuffle(value, step, __LINE__)

static float __uint_as_float(unsigned bits)
{
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

static unsigned __float_as_uint(float value)
{
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

static float from_half(unsigned short bits)
{
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp((float)fraction, -24);
    return sign * std::ldexp((float)(fraction + 1024), exponent - 25);
}

static unsigned short to_half(float value)
{
    const unsigned sign = __float_as_uint(value) >> 16 & 0x8000;
    const float size = std::fabs(value);
    if (value != value) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    if (size < 6.103515625e-05f) return sign | (unsigned)std::nearbyint(std::ldexp(size, 24));
    int exponent;
    const float fraction = std::frexp(size, &exponent);
    return sign | ((exponent + 13 << 10) + (unsigned)std::nearbyint(std::ldexp(fraction, 11)));
}
"""

DRIVER = r"""
static void host_thread()
{
    soft_target_loss(*(const Arguments *)host_argument);
    host_lines[threadIdx.x] = 0;
    swapcontext(&host_fibers[threadIdx.x], &host_turns);
}

// A warp up to the next barrier of the block; its shuffles keep only its own threads together.
static bool host_warp(unsigned warp)
{
    const int *lines = host_lines + 32 * warp;
    do {
        for (unsigned i = 0; i < 32; ++i) {
            threadIdx.x = 32 * warp + (host_downwards ? 31 - i : i);
            swapcontext(&host_turns, &host_fibers[threadIdx.x]);
        }
        for (unsigned i = 1; i < 32; ++i)
            if (lines[i] != lines[0]) return false;
    } while (lines[0] >= SHUFFLE);
    return true;
}

static bool host_block()
{
    for (unsigned i = 0; i < blockDim.x; ++i) {
        getcontext(&host_fibers[i]);
        host_fibers[i].uc_stack.ss_sp = host_stacks[i];
        host_fibers[i].uc_stack.ss_size = STACK;
        host_fibers[i].uc_link = 0;
        makecontext(&host_fibers[i], host_thread, 0);
    }
    const unsigned warps = blockDim.x / 32;
    do {
        for (unsigned i = 0; i < warps; ++i)
            if (!host_warp(host_downwards ? warps - 1 - i : i)) return false;
        for (unsigned i = 1; i < warps; ++i)
            if (host_lines[32 * i] != host_lines[0]) return false;
    } while (host_lines[0]);
    return true;
}

extern "C" int cuLaunchKernel(
    void *, unsigned blocks, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned shared,
    void *, void **arguments, void **)
{
    if (threads % 32 || threads > MOST || shared > 4 * SHARED) return host_error = "a bad launch", 1;
    host_argument = arguments[0];
    blockDim.x = threads;
    gridDim.x = blocks;
    for (unsigned block = 0; block < blocks; ++block) {
        blockIdx.x = block;
        std::memset(host_shared, 0xff, sizeof host_shared);
        if (!host_block()) return host_error = "threads wait at different barriers", 719;
        const unsigned char *border = (const unsigned char *)host_shared + shared;
        for (unsigned i = 0; i < 4 * BORDER; ++i)
            if (border[i] != 0xff) return host_error = "written beyond shared memory", 700;
    }
    return 0;
}

// A thread has no context at first, and one after it was given one.
static void *host_context = 0;
extern "C" int cuCtxGetCurrent(void **context) { return *context = host_context, 0; }
extern "C" int cuCtxSetCurrent(void *context) { return host_context = context, 0; }
extern "C" int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &threadIdx, 0; }
extern "C" int cuModuleLoadData(void **module, const void *code)
{
    if (std::memcmp(code, "\177ELF", 4)) return host_error = "no machine code", 200;
    return *module = &threadIdx, 0;
}
extern "C" int cuModuleGetFunction(void **function, void *, const char *name)
{
    if (std::strcmp(name, "soft_target_loss")) return host_error = "named symbol not found", 500;
    return *function = &threadIdx, 0;
}
extern "C" int cuFuncSetAttribute(void *, int what, int value) { return !(what == 8 && value < (1 << 18)); }
extern "C" int cuGetErrorString(int, const char **text) { return *text = host_error, 0; }
"""


@functools.cache
def library(body=BODY):
    """The source as a library of the host; skips where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not there to compile the CUDA source for the CPU")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cpp").write_text(HOST + body + DRIVER)
        flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-parentheses"]
        flags += ["-ffp-contract=fast", "-o", "kernel.so", "kernel.cpp"]
        result = subprocess.run([compiler, *flags], cwd=folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return ctypes.CDLL(Path(folder, "kernel.so"))


class HostKernel(nvrtc.Kernel):
    """The kernel, run by the host instead of a device."""

    def __init__(self, shared_bytes=48 * 1024, most_threads=64, downwards=False, body=BODY):
        super().__init__(library(body), 0, shared_bytes)
        self.most_threads, self.downwards = most_threads, downwards
        self.launches = []

    def launch(self, device, blocks, threads, shared, argument):
        """As many fibers as asked for or allowed."""
        ctypes.c_int.in_dll(self._driver, "host_downwards").value = self.downwards
        self.launches.append((blocks, threads, shared))
        self.put(blocks, min(threads, self.most_threads), shared, argument, None)


@contextlib.contextmanager
def on_host(**options):
    """The CUDA path's launches go to a `HostKernel`, which is given."""
    kernel = HostKernel(**options)
    with mock.patch.object(nvrtc, "kernel_for", return_value=kernel):
        yield kernel


def cuda_loss(student_logits, teachers, labels=None, host=None, **options):
    """The CUDA path behind the door of `soft_target_loss`; the door where it is of no use.

    Run by a device if the tensors are there; else by the host with the options `host` of `HostKernel`.
    """
    request = check_request(student_logits, teachers, labels, **options)
    if student_logits.is_cuda:
        with mock.patch.dict(os.environ, {cuda.SWITCH: "1"}):
            path = dispatch.choose(student_logits, request)
            assert path[0] == dispatch.CUDA or student_logits.dtype == torch.float64, path
            return soft_target_loss(student_logits, teachers, labels, **options)
    if dispatch.choose(student_logits, request)[0] != dispatch.KERNEL:
        return soft_target_loss(student_logits, teachers, labels, **options)
    choice = dispatch.CUDA, "a test"
    with on_host(**(host or {})), mock.patch.object(dispatch, "choose", return_value=choice):
        return soft_target_loss(student_logits, teachers, labels, **options)
