"""A kernel, and how what it is called with becomes what OpenCL wants: arrays go by address."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

import numpy as np

from uvas._core import fast
from uvas._core._allocation import Hold
from uvas.devices.committed import Committed
from uvas.devices.transport import described, extent, memory_at
from uvas.leases import Lease
from uvas.ranges import Range

__all__ = ["Bound", "Kernel", "Need", "Parameter"]

Memory = Literal["global", "constant", "local", "private"]

_NUMBERS: dict[str, type[np.number[Any]]] = {
    "char": np.int8,
    "uchar": np.uint8,
    "short": np.int16,
    "ushort": np.uint16,
    "int": np.int32,
    "uint": np.uint32,
    "long": np.int64,
    "ulong": np.uint64,
    "half": np.float16,
    "float": np.float32,
    "double": np.float64,
}
_Byte = ctypes.c_char * 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a kernel, as its source declares it."""

    name: str
    type: str
    """As OpenCL spells it: "float*"."""
    memory: Memory
    const: bool
    """Of what a pointer points to."""

    @property
    def is_pointer(self) -> bool:
        """Whether an address in global memory is passed for it."""
        return self.type.endswith("*") and self.memory in ("global", "constant")

    @property
    def wants(self) -> str:
        """What the kernel may do where it points: "r" or "rw"."""
        return "r" if self.const or self.memory == "constant" else "rw"


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that a kernel is pointed to, what it may do there, and for messages the parameter and its argument."""

    range: Range
    wanted: str
    what: str
    argument: np.ndarray[Any, Any] | int

    def __str__(self) -> str:
        if isinstance(self.argument, int):
            return f"{self.what}: the address {self.argument:#x}"
        return f"{self.what}: {described(self.argument)}"


@dataclass(frozen=True, slots=True)
class Bound:
    """Arguments as OpenCL takes them, what they need, and what must live while the kernel runs."""

    values: list[Any]
    needs: list[Need]
    holds: list[object]

    def check(self, memory: Committed, party: str) -> None:
        """See that the memory may be used so on the device now.

        Raises
        ------
        TypeError
            It is none that the device shares.
        ValueError
            Its protection is against it.
        """
        for need in self.needs:
            if memory.allows(need.range, need.wanted):
                continue
            if not memory.allows(need.range, ""):
                raise TypeError(_elsewhere(need, party))
            raise ValueError(f"{need} needs {need.wanted!r} at {need.range}, which is protected against it")


class Kernel:
    """A kernel of a program that was built for one device. Made by `OpenCLDevice.kernel`.

    Parameters
    ----------
    cl
        The module pyopencl.
    raw
        The kernel as pyopencl has it.
    party
        The device's name, for messages.
    """

    def __init__(self, cl: Any, raw: Any, party: str) -> None:
        self._cl = cl
        self._party = party
        self.raw = raw
        """The `pyopencl.Kernel`. It carries the arguments of one launch: only its device sets them."""
        self.name: str = raw.function_name
        self.parameters: tuple[Parameter, ...] = tuple(_parameter(cl, raw, i) for i in range(raw.num_args))
        """What it takes."""
        self._places = tuple((parameter, f"{parameter.name} of {self.name}") for parameter in self.parameters)

    def bind(self, arguments: tuple[object, ...]) -> Bound:
        """Turn arguments into what OpenCL takes, and lease the memory of the arrays among them.

        Raises
        ------
        TypeError, ValueError, OverflowError
            As `OpenCLDevice.submit` says.
        """
        if len(arguments) != len(self.parameters):
            names = ", ".join(parameter.name for parameter in self.parameters)
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments ({names}), not {len(arguments)}")
        bound = Bound([], [], [])
        for (parameter, what), argument in zip(self._places, arguments, strict=True):
            bound.values.append(self._value(parameter, argument, bound, what))
        return bound

    def _value(self, parameter: Parameter, argument: Any, bound: Bound, what: str) -> Any:
        if parameter.is_pointer:
            return self._pointer(parameter, argument, bound, what)
        if parameter.memory == "local":
            return self._local(argument, what)
        if isinstance(argument, np.ndarray) and argument.ndim and parameter.type in ("ulong", "long"):
            return _NUMBERS[parameter.type](self._address(argument, "r", bound, what))
        if parameter.type in _NUMBERS:
            return _number(argument, _NUMBERS[parameter.type], f"{what} is a {parameter.type}")
        if isinstance(argument, int | float):
            raise TypeError(f"{what} is a {parameter.type}: pass a NumPy scalar or array of the same bytes")
        return argument  # structures, vectors, images, samplers: pyopencl knows them

    def _pointer(self, parameter: Parameter, argument: Any, bound: Bound, what: str) -> Any:
        if isinstance(argument, np.ndarray):
            if parameter.wants == "rw" and not argument.flags.writeable:
                raise ValueError(f"{what} may be written, and {described(argument)} is read-only")
            address = self._address(argument, parameter.wants, bound, what)
            return self._at(address) if address else None
        if argument is None or isinstance(argument, self._cl.MemoryObjectHolder | self._cl.SVMPointer):
            return argument
        try:
            address = index(argument)
        except TypeError:
            raise TypeError(
                f"{what} is a {type(argument).__name__}: a pointer is a NumPy array in unified memory, an address, "
                f"None, or a buffer or SVM object of pyopencl's"
            ) from None
        if address == 0:
            return None
        bound.needs.append(Need(Range(address, 1), parameter.wants, what, address))
        return self._at(address)

    def _at(self, address: int) -> Any:
        """Return an address as pyopencl takes one: it sets pointers from buffers that may be written, and no others."""
        return self._cl.SVM(_Byte.from_address(address))

    def _address(self, array: np.ndarray[Any, Any], wanted: str, bound: Bound, what: str) -> int:
        """Return an array's address, with its memory leased; 0 if it has no elements."""
        if array.dtype.hasobject or array.dtype.kind == "T":
            raise TypeError(f"{described(array)} holds references, which mean nothing to a device")
        low, size = extent(array)
        if size == 0:
            return 0
        if not array.flags.forc:  # a kernel gets the address only, and would take what lies between for elements
            raise ValueError(
                f"{what}: {described(array)} has the strides {array.strides}, of which a kernel knows nothing: pass a "
                f"contiguous array, or its address and its strides as numbers"
            )
        need = Need(Range(low, size), wanted, what, array)
        try:
            bound.holds.append(_keeper(array, low, size))
        except ValueError:
            raise TypeError(_elsewhere(need, self._party)) from None
        bound.needs.append(need)
        return low

    def _local(self, argument: Any, what: str) -> Any:
        if isinstance(argument, self._cl.LocalMemory):
            return argument
        try:
            return self._cl.LocalMemory(index(argument))
        except TypeError:
            raise TypeError(f"{what} is local memory: pass its bytes or a pyopencl.LocalMemory") from None

    def __repr__(self) -> str:
        takes = ", ".join(f"{one.memory} {one.type} {one.name}" for one in self.parameters)
        return f"<Kernel {self.name}({takes}) of {self._party!r}>"


def _parameter(cl: Any, raw: Any, place: int) -> Parameter:
    """Read one parameter of a kernel that was built with ``-cl-kernel-arg-info``."""
    ask, info = raw.get_arg_info, cl.kernel_arg_info
    qualifier = ask(place, info.ADDRESS_QUALIFIER)
    memories: dict[int, Memory] = {
        cl.kernel_arg_address_qualifier.GLOBAL: "global",
        cl.kernel_arg_address_qualifier.CONSTANT: "constant",
        cl.kernel_arg_address_qualifier.LOCAL: "local",
    }
    const = bool(ask(place, info.TYPE_QUALIFIER) & cl.kernel_arg_type_qualifier.CONST)
    return Parameter(ask(place, info.NAME), ask(place, info.TYPE_NAME), memories.get(qualifier, "private"), const)


def _number(argument: Any, kind: type[np.number[Any]], what: str) -> np.number[Any]:
    try:
        exact = float(argument) if issubclass(kind, np.floating) else index(argument)
    except TypeError:
        raise TypeError(f"{what}, not a {type(argument).__name__}") from None
    if not isinstance(exact, float):
        limits = np.iinfo(kind)  # type: ignore[type-var] # the floating ones are gone
        if not limits.min <= exact <= limits.max:
            raise OverflowError(f"{what} and has no room for {exact:#x}")
    return kind(exact)  # type: ignore[arg-type]


def _keeper(array: np.ndarray[Any, Any], low: int, size: int) -> object:
    """Return what keeps an array's memory: the array itself, where it holds a lease or a block; else a new lease.

    Raises
    ------
    ValueError
        It lies in no reservation, or not in committed memory.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, Lease | Hold) or fast.find_allocation(low) is not None:
        return array
    return memory_at(low, size)


def _elsewhere(need: Need, party: str) -> str:
    return (
        f"{need} does not lie in memory that {party} shares; allocate it with reservation.numpy or in an arena of the "
        f"device's space, or copy it into a pyopencl.Buffer"
    )
