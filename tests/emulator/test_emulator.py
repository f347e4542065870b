"""The emulator finds what it is there to find: small kernels with a fault each."""

import shutil

import emulator
import faults
import numpy as np
import pytest
from emulator import ORDERS, EmulationError

from lplb_ep.gpu.jit import KERNELS, Program

FAULTS = {  # of two kinds where another order would show the other first
    "out[t + 1] = 0;": "small.cu:12: memcheck: 4 bytes at 0x.*, which is in no array",
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


def run(directory, order, number=64, **defines):
    kernels = directory / "kernels"
    kernels.mkdir()
    shutil.copy(emulator.HERE / "small.cu", kernels)
    program = Program("small.cu", {"INDEX": "int", **defines})
    library = emulator.Library(emulator.build(program, directory, kernels))
    memory = emulator.Memory()
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
    assert (run(tmp_path, order) == 64).all()


@pytest.mark.parametrize("body", FAULTS, ids=range(len(FAULTS)))
def test_faults_are_found(body, tmp_path):
    with pytest.raises(EmulationError, match=FAULTS[body]):
        run(tmp_path, 0, BODY=body)


def test_planted_faults_have_their_place():
    """A fault whose line is gone would plant nothing, and `make faults` is run by hand."""
    barriers = [*faults.barriers()]
    planted = [*faults.FAULTS, *barriers]
    gone = [f for f in planted if (KERNELS / f.source).read_text().count(f.old) != 1]
    assert gone == []
    # The name of a barrier's fault is the line behind it.
    assert len([f for f in barriers if f.survives]) == len(faults.SURVIVING_BARRIERS)
