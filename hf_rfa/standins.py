"""`StandIn`: an object that answers in place of one method of one module, whose class stays what it is."""

import inspect
import weakref
from typing import Any, ClassVar

from torch import nn


class StandIn:
    """Hangs in a module's `__dict__` under the name of a method and answers its calls.

    An object and not a closure, so that the module pickles and copies: the copy's stand-in stands in for the copy. It
    holds the module weakly, so that `del model` frees it as before.
    """

    __slots__ = ("_module", "_removed", "_replaced")  # wrappers copy the `__dict__` of what they wrap
    method: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = weakref.ref(module)
        self._replaced = module.__dict__.get(self.method)  # what others had put there, as Accelerate's hooks do
        self._removed = False

    @classmethod
    def install(cls, module: nn.Module, *args: Any) -> None:
        """Let one stand in for `module`'s method."""
        module.__dict__[cls.method] = cls(module, *args)

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        """Put back what was there. One that others have wrapped in the meantime only passes calls on from now on."""
        own = module.__dict__.get(cls.method)
        if not isinstance(own, cls):
            own = next((found for found in _wrapped(own) if isinstance(found, cls)), None)
            if own is not None:
                own._removed = True
            return
        own._removed = True
        if own._replaced is None:
            del module.__dict__[cls.method]
        else:
            module.__dict__[cls.method] = own._replaced

    @property
    def module(self) -> Any:
        """What it stands in for."""
        return self._module()

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method's own answer."""
        if self._replaced is not None:
            return self._replaced(*args, **kwargs)
        module = self.module
        return getattr(type(module), self.method)(module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # Transformers, PEFT and Trainer ask which arguments a model takes.
        bound = getattr(type(self.module), self.method).__get__(self.module)
        return inspect.signature(self._replaced or bound)

    @property
    def __code__(self) -> Any:
        # torch.export asks where a forward was written.
        return inspect.unwrap(getattr(type(self.module), self.method)).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        slots = [slot for kind in type(self).__mro__ for slot in getattr(kind, "__slots__", ())]
        return {slot: getattr(self, slot) for slot in slots} | {"_module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for slot, value in state.items():
            setattr(self, slot, weakref.ref(value) if slot == "_module" else value)

    def bound_to(self, module: nn.Module) -> "StandIn":
        """The same for a shallow copy of the module."""
        other = object.__new__(type(self))
        other.__setstate__({**self.__getstate__(), "_module": module})
        return other


class Replicate(StandIn):
    """`DataParallel` copies a module's `__dict__`: the replica's stand-ins must run the replica."""

    __slots__ = ()
    method = "_replicate_for_data_parallel"

    def __call__(self) -> Any:
        replica = self.original()
        own = {name: value for name, value in replica.__dict__.items() if isinstance(value, StandIn)}
        replica.__dict__.update({name: value.bound_to(replica) for name, value in own.items()})
        return replica


def _wrapped(function: Any) -> list[Any]:
    """The chain of functions under wrappers that say what they wrap."""
    found: list[Any] = []
    while function is not None and len(found) < 16:
        found.append(function)
        function = getattr(function, "__wrapped__", None)
    return found
