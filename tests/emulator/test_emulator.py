"""The emulator finds what it is there to find: small kernels with a fault each."""

import emulator
import numpy as np
import pytest
from emulator import ORDERS, EmulationError

from lplb_ep.gpu.jit import Program

# They take the place of `mask`, for its arguments.
SOURCE = """
#include "ptx.cuh"
typedef INDEX Index;
extern "C" __global__ void mask(
    const Index* given, const Index* planned, Index* out, int num_picks) {
    extern __shared__ int shared[];
    __shared__ int one;
    int t = threadIdx.x;
    BODY
    (void)given; (void)planned; (void)out; (void)num_picks; (void)shared; (void)t; (void)one;
}
"""

GOOD = """
    shared[t] = given[t];
    __syncthreads();
    int other = shared[t ^ 32];
    int sum = __reduce_add_sync(~0u, other);
    for (int i = 1; i < 32; i *= 2) other += __shfl_xor_sync(~0u, other, i);
    unsigned odd = __ballot_sync(~0u, t % 2), same = __match_any_sync(~0u, t % 3);
    if (t == 0) one = 0;
    __syncthreads();
    atomicAdd(&one, 1);
    int any = __syncthreads_or(t == 40);
    out[t] = sum == other && odd == 0xaaaaaaaau && any && (same >> t % 32 & 1) ? one : -1;
"""
FAULTS = {  # of two kinds where another order would show the other first
    "out[t + 1] = 0;": "small.cu:9: memcheck: 4 bytes at 0x.*, which is in no array",
    "out[-1 - t] = 0;": "memcheck: 4 bytes at 0x.*, which is in no array",
    "shared[t + 1] = 0;": "memcheck: 4 bytes at 256 of 256 of shared memory",
    "out[t] = shared[t];": "initcheck: reads 4 bytes that nothing has written",
    "out[t] += 1;": "initcheck: reads 4 bytes that nothing has written",
    "one = t; __syncthreads(); out[t] = one;": "racecheck: writes what was written by thread",
    "shared[t] = t; out[t] = shared[t ^ 1];": "(race|init)check: reads",
    "shared[t] = t; __syncwarp(); out[t] = shared[t ^ 32];": "(race|init)check: reads",
    "if (!t) { one = 0; } __syncthreads(); atomicAdd(&one, 1); out[t] = one;": "racecheck: writes",
    "one = 0 * t; __syncthreads(); out[t] = one;": "racecheck: writes what was written by thread",
    "shared[t] = t; __ballot_sync(~0u, 1); out[t] = shared[t ^ 1];": "racecheck: reads what was",
    "if (t < 32) __syncthreads();": "synccheck: .* waits for ever: 32 threads at __syncthreads",
    "if (t % 2) __syncwarp(); else __ballot_sync(~0u, 1);": "synccheck: a thread comes to",
    "__ballot_sync(0xffff, 1);": "synccheck: __ballot_sync with the mask 0000ffff",
    "while (t < 64) nanoseconds();": "synccheck: ranks wait for each other for ever",
}


def run(directory, body, order, number=64):
    (directory / "kernels").mkdir()
    (directory / "kernels" / "abi.cuh").write_text("#pragma once\n")
    (directory / "kernels" / "small.cu").write_text(SOURCE.replace("BODY", body))
    program = Program("small.cu", {"INDEX": "int"})
    memory = emulator.Memory()
    library = emulator.Library(emulator.build(program, directory, directory / "kernels"))
    out = memory.empty(number, np.int32)
    launch = library.kernel("mask")(
        (1, 1),
        number,
        4 * number,
        given=memory.array(np.arange(number), np.int32),
        planned=memory.empty(0),
        out=out,
        num_picks=number,
    )
    memory.run([launch], order=order)
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_a_good_kernel_runs(order, tmp_path):
    assert (run(tmp_path, GOOD, order) == 64).all()


@pytest.mark.parametrize("body", FAULTS, ids=range(len(FAULTS)))
def test_faults_are_found(body, tmp_path):
    with pytest.raises(EmulationError, match=FAULTS[body]):
        run(tmp_path, body, 0)
