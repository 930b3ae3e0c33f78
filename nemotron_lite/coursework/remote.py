"""A learner's function or class, as a check sees it: each use is a message to another process.

A check gets something that behaves like the learner's own function, although that function runs in
a learner's process (`session` speaks with it, `calls` carries arguments and results):

- a function forwards its calls;
- a class becomes a class whose instances stand for objects over there: attributes, methods, calls,
  `parameters`, `state_dict`;
- an object that is no plain data stays there. Here it is a `RemoteObject`, which can be handed back
  as an argument.

Nothing here believes what a learner's object says about itself: `==` on a `RemoteObject` is
identity. And nothing here runs a learner's code. `outline` compiles it, since `check` compares an
answer with the stub and knows an answer's errors by their file.
"""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any

from nemotron_lite.course.syntax import parse

if TYPE_CHECKING:
    from torch import Tensor

    from nemotron_lite.coursework.calls import Token
    from nemotron_lite.coursework.session import Session

LONGEST = 200_000  # characters of a cell
SPECIAL = ("__call__", "__getitem__", "__setitem__", "__len__", "__iter__", "__contains__")


class Method:
    """A method of an object in the other process."""

    def __init__(self, session: Session, target: int, name: str) -> None:
        self._session, self._target, self._name = session, target, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it there."""
        return self._session.use("call", self._target, method=self._name, args=args, kwargs=kwargs)


class RemoteObject:
    """Stands for an object in the learner's process. `==` is identity."""

    _session: Session
    _number: int
    _module: bool
    _upstream: dict[int, tuple[Tensor, Token]]

    def _become(self, session: Session, number: int, module: bool) -> None:
        own = {"_session": session, "_number": number, "_module": module, "_upstream": {}}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def _remember(self, leaves: list[tuple[int, Tensor]], token: Token) -> None:
        """Note that what this object holds may depend on the inputs of a call."""
        if not self._module:
            token.leaves = token.leaves or [number for number, _ in leaves]
            self._upstream.update({number: (tensor, token) for number, tensor in leaves})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in RemoteObject.__annotations__:
            raise AttributeError(name)
        if name == "zero_grad":
            return self._zero_grad
        return self._session.use("get", self._number, name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._session.use("set", self._number, name=name, value=value)

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, which lie in the twins."""
        for parameter in self.parameters():
            parameter.grad = None

    def __del__(self) -> None:
        if "_session" in vars(self):
            self._session.forget("objects", self._number)


def _special_method(name: str) -> FunctionType:
    def method(self: RemoteObject, *args: Any) -> Any:
        found = self._session.use("call", self._number, method=name, args=args, kwargs={})
        return iter(found) if name == "__iter__" else found

    def call(self: RemoteObject, *args: Any, **kwargs: Any) -> Any:
        return self._session.use("call", self._number, method=None, args=args, kwargs=kwargs)

    made = call if name == "__call__" else method
    assert isinstance(made, FunctionType)
    return made


_METHODS = {name: _special_method(name) for name in SPECIAL}


def remote_type(name: str, special: tuple[str, ...]) -> type[RemoteObject]:
    """A class for objects of a type that only the learner's process has."""
    return type(name, (RemoteObject,), {method: _METHODS[method] for method in special})


class _NamedTuple(tuple[Any, ...]):
    """A named tuple of the learner's: items, names, and the number of the object itself."""

    _remote_number: int
    _fields: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        if name in self._fields:
            return self[self._fields.index(name)]
        raise AttributeError(name)


def named_tuple(name: str, fields: list[str], items: list[Any], number: int) -> Any:
    """A named tuple that the learner's code made."""
    made = type(name, (_NamedTuple,), {"_fields": tuple(fields), "_remote_number": number})(items)
    return made


def outline(file: str, name: str) -> Any:
    """The function or class of that name in a learner's cell: compiled, and never run.

    `check` compares the code of an answer with the stub, and knows an answer's errors by their
    file. A class is returned as a dict of its methods. None if the cell does not define the name.
    """
    source = "".join(linecache.getlines(file))
    if len(source) > LONGEST:
        return None
    try:
        tree = parse(source)
        code = compile(tree, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    space: dict[str, Any] = {}
    found: dict[str, Any] = {}
    decorated = {
        (kind.name, method.name)
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.decorator_list
    }
    for constant in _codes(code):
        if constant.co_flags & inspect.CO_OPTIMIZED:
            found[constant.co_name] = space[constant.co_name] = _never_run(constant, space)
        else:
            methods = [c for c in _codes(constant) if c.co_flags & inspect.CO_OPTIMIZED]
            found[constant.co_name] = {c.co_name: _never_run(c, space) for c in methods}
            for method, function in found[constant.co_name].items():
                function.decorated = (constant.co_name, method) in decorated
    return found.get(name)


def _codes(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _never_run(code: CodeType, space: dict[str, Any]) -> FunctionType:
    """A function object that only shows its code."""
    return FunctionType(code, space, code.co_name, None, (CellType(),) * len(code.co_freevars))


def _forwarder(name: str, file: str, call: Callable[..., Any], written: Any) -> Any:
    """A function that only calls `call`. It says that it is in `file`, on a line it does not have.

    What the learner wrote is its `__wrapped__`, as with a decorator.
    """
    source = f"def {name}(*args, **kwargs):\n    return call(*args, **kwargs)\n"
    space: dict[str, Any] = {"call": call}
    exec(_moved(compile(source, file, "exec", dont_inherit=True)), space)
    if isinstance(written, FunctionType):
        space[name].__wrapped__ = written
    return space[name]


def _moved(code: CodeType) -> CodeType:
    constants = tuple(_moved(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_firstlineno=10**6, co_consts=constants)


def remote_function(session: Session, number: int, name: str, file: str, written: Any) -> Any:
    """A function that calls the learner's function."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return session.use("call", number, method=None, args=args, kwargs=kwargs)

    return _forwarder(name, file, call, written)


def remote_class(
    session: Session, number: int, name: str, file: str, special: tuple[str, ...], written: Any
) -> Any:
    """A class whose instances stand for instances of the learner's class."""

    def make(receiver: Any, *args: Any, **kwargs: Any) -> None:
        made = session.use("call", number, method=None, args=args, kwargs=kwargs, receiver=receiver)
        if made is not receiver:
            raise TypeError(f"{name}(…) made no object of its own class.")

    class Meta(type):
        """Attributes of the class itself."""

        def __getattr__(cls, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return session.use("get", number, name=attribute)

    code = written if isinstance(written, dict) else {}
    inherited = remote_type(name, special)
    first = _forwarder("__init__", file, make, code.get("__init__"))
    members = {"__init__": first} if "__init__" in code or not code else {}
    base: Any = type(name, (inherited,), {} if members else {"__init__": first})
    for method in set(special) & set(code):
        members[method] = _forwarder(method, file, _METHODS[method], code[method])
    for method, function in code.items():
        if method not in members and not method.startswith("__"):
            members[method] = (
                _Attribute(function)
                if function.decorated
                else _forwarder(method, file, _remote_method(method), function)
            )
    return Meta(name, (base,), members)


def _remote_method(name: str) -> Callable[..., Any]:
    def call(self: RemoteObject, *args: Any, **kwargs: Any) -> Any:
        return self._session.use("call", self._number, method=name, args=args, kwargs=kwargs)

    return call


class _Attribute(property):
    """A decorated method or a property of a learner's class: what it is, the other process knows.

    `fget` only shows its code, and is never called.
    """

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        name = self.fget.__name__ if self.fget else ""
        if instance is None:
            return type(owner).__getattr__(owner, name)  # type: ignore[union-attr]
        return instance._session.use("get", instance._number, name=name)
