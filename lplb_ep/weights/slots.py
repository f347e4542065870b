"""The parameters of a rank's slots: of a list of expert modules, or rows of stacked ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


def slot_parameters(experts: nn.Module, num_local_slots: int) -> dict[str, list[Tensor]]:
    """The parameters of a rank's slots, by name and slot.

    Args:
        experts: this rank's experts, in one of two forms. Either an `nn.ModuleList` of P / R
            modules whose parameters have the same names, shapes and dtypes. Or any other module
            whose every parameter has leading dimension P / R: row i belongs to local slot i.
            A `DTensor` counts by its local part.
        num_local_slots: P / R.

    Returns:
        P / R tensors for each parameter name, in alphabetical order. They share the parameters'
        memory. For a list of modules they are the parameters, for a stacked module detached rows.

    Raises:
        TypeError: `experts` is no module.
        ValueError: the module does not have these slots. The message names the parameter, what
            was expected and what it has.
    """
    return {
        name: [slot.weight for slot in slots]
        for name, slots in slots_of(experts, num_local_slots).items()
    }


@dataclass(frozen=True)
class Slot:
    """One parameter of one local slot: a parameter of its own, or a row of a stacked one."""

    parameter: nn.Parameter
    row: int | None
    """None for a parameter of its own."""

    def _part(self, tensor: Tensor) -> Tensor:
        tensor = local_part(tensor)
        return tensor if self.row is None else tensor[self.row]

    @property
    def weight(self) -> Tensor:
        """The slot's weight, in the parameter's memory."""
        return self._part(self.parameter if self.row is None else self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        """The slot's gradient: of `main_grad` where the parameter has one, else of `grad`."""
        main_grad = getattr(self.parameter, "main_grad", None)
        gradient = self.parameter.grad if main_grad is None else main_grad
        return None if gradient is None else self._part(gradient)

    def start_gradient(self) -> None:
        """Makes a gradient of zeros where there is none."""
        if self.gradient is None:
            dtype = getattr(self.parameter, "grad_dtype", None)  # where it differs from its own
            self.parameter.grad = torch.zeros_like(self.parameter, dtype=dtype)


def slots_of(experts: nn.Module, num_local_slots: int) -> dict[str, list[Slot]]:
    """As `slot_parameters`, with the parameters behind the tensors."""
    if not isinstance(experts, nn.Module):
        raise TypeError(f"experts must be a module; got a {type(experts).__name__}")
    if isinstance(experts, nn.ModuleList):
        return _slots_of_list(experts, num_local_slots)
    return _slots_of_stack(experts, num_local_slots)


def trained_of(slots: Mapping[str, Sequence[Slot]]) -> dict[str, bool]:
    """Whether each parameter is trained, by name: in all slots alike.

    Raises:
        ValueError: some slots of a parameter are trained, and others frozen.
    """
    trained = {}
    for name, of_name in slots.items():
        flags = [slot.parameter.requires_grad for slot in of_name]
        if any(flags) and not all(flags):
            raise ValueError(
                f"parameter {name} is frozen (requires_grad=False) for some experts and trained "
                f"for others, {flags.count(False)} of {len(flags)} slots here: freeze all or none"
            )
        trained[name] = any(flags)
    return trained


def retrained(slots: Mapping[str, Sequence[Slot]], trained: Mapping[str, bool]) -> str:
    """Says which parameter is trained or frozen by now, other than before; empty: none."""
    for name, of_name in slots.items():
        for slot in of_name:
            if slot.parameter.requires_grad != trained[name]:
                now, then = ("frozen", "trained")[:: 1 if trained[name] else -1]
                return f"parameter {name} is {now} now, and was {then} before: make Guests again"
    return ""


def modules_of(experts: nn.Module, slots: set[int]) -> list[nn.Module]:
    """The modules that hold the parameters of some local slots."""
    if isinstance(experts, nn.ModuleList):
        return [experts[slot] for slot in sorted(slots)]
    return [experts] if slots else []


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a `DTensor`, which shares its memory; any other tensor itself."""
    if is_distributed(tensor):
        with torch.no_grad():
            part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
            return part
    return tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether the tensor is a `DTensor`, without importing its module."""
    return hasattr(tensor, "to_local")


def has_whole_rows(tensor: Tensor) -> bool:
    """Whether this rank's part has all of each slot, as if the tensor were no `DTensor`.

    So it is where experts are distributed over an expert-parallel mesh by their first dimension.
    """
    if not is_distributed(tensor):
        return True
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return all(
        mesh.size(number) == 1 or placement.is_replicate() or getattr(placement, "dim", None) == 0
        for number, placement in enumerate(placements)
    )


def trained_part(parameter: Tensor) -> Tensor:
    """As `local_part`, for a computation: its gradient is the parameter's."""
    if is_distributed(parameter):
        part: Tensor = parameter.to_local()  # type: ignore[attr-defined]
        return part
    return parameter


def describe(tensor: Tensor) -> str:
    """Shape and dtype of this rank's part, for messages."""
    return f"{list(local_part(tensor).shape)} {str(tensor.dtype).removeprefix('torch.')}"


def refuse_state_outside_parameters(experts: nn.Module) -> None:
    """Raises ValueError where copies of parameters would not copy all that experts compute with."""
    for path, module in experts.named_modules():
        # Not by `state_dict`, before which FSDP2 takes gathered parameters away.
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                raise ValueError(
                    f"experts must have no persistent buffers, got {f'{path}.{name}'.strip('.')}. "
                    "Make a weight a parameter with requires_grad=False, and a constant a buffer "
                    "with persistent=False"
                )
    for name, parameter in experts.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name} was made under torch.inference_mode and has no version to "
                "watch; make the module outside of it"
            )


def _slots_of_stack(experts: nn.Module, num_local_slots: int) -> dict[str, list[Slot]]:
    stacked = dict(sorted(experts.named_parameters()))
    if not stacked:
        raise ValueError("experts must have parameters, got none")
    for name, parameter in stacked.items():
        shape = list(local_part(parameter).shape)
        if shape[:1] != [num_local_slots]:
            hint = "; let FSDP2 shard another dimension" if is_distributed(parameter) else ""
            raise ValueError(
                f"parameter {name} must have leading dimension {num_local_slots}, one row per "
                f"slot of this rank, got shape {shape}{hint}"
            )
    return {
        name: [Slot(parameter, row) for row in range(num_local_slots)]
        for name, parameter in stacked.items()
    }


def _slots_of_list(experts: nn.ModuleList, num_local_slots: int) -> dict[str, list[Slot]]:
    if len(experts) != num_local_slots:
        raise ValueError(
            f"experts must be {num_local_slots} modules, one per slot of this rank, got "
            f"{len(experts)}"
        )
    slots = [dict(sorted(expert.named_parameters())) for expert in experts]
    if not slots[0]:
        raise ValueError("experts must have parameters, got none")
    seen: set[int] = set()
    for number, parameters in enumerate(slots):
        for name in sorted({*slots[0], *parameters}):
            want, got = (
                describe(of[name]) if name in of else "absent" for of in (slots[0], parameters)
            )
            if want != got:
                raise ValueError(
                    f"parameter {name} of slot {number} is {got}, expected {want} as in slot 0"
                )
            if id(parameters[name]) in seen:
                raise ValueError(
                    f"parameter {name} of slot {number} is shared with another slot, expected "
                    "each slot to have its own"
                )
        seen.update(map(id, parameters.values()))
    return {name: [Slot(parameters[name], None) for parameters in slots] for name in slots[0]}
