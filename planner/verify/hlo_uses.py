"""What an all-reduce is used for: compilers also write gathers and reduce-scatters with it.

On a three-dimensional torus the TPU compiler has no other way of gathering over the whole machine;
small reductions it combines and slices afterwards. Only such patterns are recognised here; what
they mean for a comparison is said in `normalise.py`.
"""

from __future__ import annotations

from planner.verify.hlo import Computation, Instruction, Module

# Instructions that hand an array on as it is.
_PASSING = {
    "bitcast", "copy", "copy-start", "copy-done", "convert", "reshape", "transpose",
    "get-tuple-element", "all-reduce-done", "async-done",
}  # fmt: skip


def roles(module: Module, scope: Computation, reduction: Instruction) -> list[str]:
    """For every operand of an all-reduce: "all-gather" if each device contributes a slice and
    zeros, "reduce-scatter" if only slices of the result are read, else ""."""
    found = []
    for k, operand in enumerate(reduction.operands):
        if _slice_among_zeros(module, scope, scope.by_name[operand]):
            found.append("all-gather")
        else:
            index = k if len(reduction.operands) > 1 else None
            sliced = _only_sliced(module, scope, reduction.name, index)
            found.append("reduce-scatter" if sliced else "")
    return found


def _slice_among_zeros(module: Module, scope: Computation, made: Instruction) -> bool:
    """Whether a value is a slice written into zeros, perhaps by a fusion."""
    made, outer = _origin(scope, made), None
    if made.opcode == "fusion":
        scope, outer = module.computations[made.called("calls") or ""], (scope, made)
        made = _origin(scope, scope.root)
    if made.opcode != "dynamic-update-slice":
        return False
    target = _origin(scope, scope.by_name[made.operands[0]])
    if target.opcode == "parameter" and outer is not None:
        scope, fusion = outer
        target = _origin(scope, scope.by_name[fusion.operands[int(target.argument)]])
    if target.opcode == "broadcast":
        target = _origin(scope, scope.by_name[target.operands[0]])
    return target.opcode == "constant" and target.argument.strip() in ("0", "-0", "false")


def _origin(scope: Computation, made: Instruction) -> Instruction:
    while made.opcode in _PASSING and made.operands:
        made = scope.by_name[made.operands[0]]
    return made


def _only_sliced(
    module: Module, scope: Computation, name: str, index: int | None = None
) -> bool:
    """Whether every reader of a value (of element `index` of a tuple) takes a slice of it."""
    readers = scope.readers.get(name, ())
    if index is not None:
        parts = [r for r in readers if r.attribute("index") == str(index)]
        return bool(parts) and all(_only_sliced(module, scope, r.name) for r in parts)
    return bool(readers) and all(_slices(module, scope, r, name) for r in readers)


def _slices(module: Module, scope: Computation, reader: Instruction, name: str) -> bool:
    if reader.opcode == "dynamic-slice":
        return reader.operands[0] == name
    if reader.opcode in _PASSING:
        return _only_sliced(module, scope, reader.name)
    if reader.opcode != "fusion":
        return False
    inside = module.computations[reader.called("calls") or ""]
    parameters = {
        int(i.argument): i.name for i in inside.instructions if i.opcode == "parameter"
    }  # fmt: skip
    places = [k for k, operand in enumerate(reader.operands) if operand == name]
    return all(_only_sliced(module, inside, parameters[k]) for k in places)
