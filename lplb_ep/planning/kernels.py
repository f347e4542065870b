"""The kernels of a plan: every variant, and the kernels loaded on a device."""

from __future__ import annotations

import functools

import torch

from ..comm.copies import barrier_program
from ..gpu.abi import Signature
from ..gpu.jit import Program
from ..gpu.launch import Kernel, Kernels, load
from . import structs
from .solvers import (
    DEVICE_SOLVERS,
    GUEST_OBJECTIVE_SOLVERS,
    GUEST_SOLVERS,
    OBJECTIVE_SOLVERS,
    DeviceSolver,
    Variant,
)

NUM_THREADS = 1024
"""Threads of a block that counts or rewrites."""
MAX_CHUNKS = 64
"""Blocks that a rank's picks are shared between."""

NUM_COPY_THREADS, CHUNK, NUM_STAGES = 256, 32768, 6
"""Of the kernels that move weights: threads of a block, bytes of a chunk, and chunks in a block's
shared memory."""


def programs(*, one_launch: bool = True) -> list[Program]:
    """Every variant of every kernel, for `lplb-ep compile`.

    Args:
        one_launch: whether those of plans in one launch are among them.
    """
    kinds = DEVICE_SOLVERS, GUEST_SOLVERS, OBJECTIVE_SOLVERS, GUEST_OBJECTIVE_SOLVERS
    records = [record for kind in kinds for record in kind.values()]
    plans = records if one_launch else []
    return [
        *(record.program(v) for record in records for v in record.variants()),
        *(record.plan_program(v) for record in plans for v in record.plan_variants()),
        *(_route_program(dtype) for dtype in (torch.int32, torch.int64)),
        weights_program(),
        barrier_program(),
    ]


def weights_program(chunk: int = CHUNK, num_stages: int = NUM_STAGES) -> Program:
    """The kernels that move guests' weights and gradients.

    Args:
        chunk: bytes that one bulk copy takes.
        num_stages: chunks in a block's shared memory.
    """
    defines = {"THREADS": NUM_COPY_THREADS, "CHUNK": chunk, "STAGES": num_stages}
    return Program("weights.cu", defines)


def solver_kernel(
    record: DeviceSolver, variant: Variant, device: int, signature: Signature
) -> Kernel:
    """A kernel of a solver, compiled now if it never was.

    Raises:
        MissingPackageError: a package that compiles or loads kernels is missing.
        CompileError: the kernel does not compile.
    """
    return _solver_kernels(record, variant, device).kernel(signature.name, signature.formats)


def plan_kernel(
    record: DeviceSolver, variant: Variant, device: int, signature: Signature
) -> Kernel:
    """A kernel of a solver's whole plans.

    Raises:
        MissingPackageError, CompileError: as `solver_kernel`.
    """
    return _plan_kernels(record, variant, device).kernel(signature.name, signature.formats)


@functools.cache
def route_kernel(dtype: torch.dtype, device: int, signature: Signature) -> Kernel:
    """A kernel of route.cu, for `topk_idx` of a dtype.

    Raises:
        MissingPackageError, CompileError: as `solver_kernel`.
    """
    return _route_kernels(dtype, device).kernel(signature.name, signature.formats)


def route_signature(every: int, least_gain: int) -> Signature:
    """The kernel that rewrites picks.

    Batches that reuse quotas or keep slots have one of their own, so that the usual one is short.

    Args:
        every, least_gain: as `Workspace` has them.
    """
    return structs.ROUTE if every == 1 and least_gain == 0 else structs.ROUTE_GENERAL


def weights_kernel(device: int, chunk: int, num_stages: int, signature: Signature) -> Kernel:
    """A kernel of weights.cu; arguments as of `weights_program`.

    Raises:
        MissingPackageError, CompileError: as `solver_kernel`.
    """
    kernels = _weights_kernels(device, chunk, num_stages)
    return kernels.kernel(signature.name, signature.formats)


@functools.cache
def _weights_kernels(device: int, chunk: int, num_stages: int) -> Kernels:
    return load(weights_program(chunk, num_stages), device)


@functools.cache
def _solver_kernels(record: DeviceSolver, variant: Variant, device: int) -> Kernels:
    return load(record.program(variant), device)


@functools.cache
def _plan_kernels(record: DeviceSolver, variant: Variant, device: int) -> Kernels:
    return load(record.plan_program(variant), device)


@functools.cache
def _route_kernels(dtype: torch.dtype, device: int) -> Kernels:
    return load(_route_program(dtype), device)


def _route_program(dtype: torch.dtype) -> Program:
    index = "int" if dtype == torch.int32 else "long long"
    return Program("route.cu", {"INDEX": index, "THREADS": NUM_THREADS})
