"""What a module's own code does with its norms, read from its source, and the same code with norm, add and activation in one call.

A norm takes over an activation only if every use of the norm in the code of its module is one of

    act(self.norm(x))                 self.norm(x).relu()               act(self.norm(x) + r)
    y = self.norm(x)  ...  y = act(y)                 y = self.norm(x)  ...  y += r  ...  y = act(y)

where nothing in between touches y. Source is read, not traced, because a trace sees one way through a branch and this sees all.
Branches on plain attributes of the module (``if self.se is not None``) are decided where they stand in the way; branches on
``self.training`` and the like are not. Whatever is written differently keeps its activation.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import operator
import re
import textwrap
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from ..activations import IDENTITY, Activation, from_module, module_of, parse
from .swap import PassThrough, Swapped, derived, kept_by_hooks, remembered, twin, without_act

NOTHING = "no activation follows"
_HARMLESS = {"weight", "bias", "running_mean", "running_var", "num_features", "num_groups", "num_channels", "normalized_shape", "eps"}
_SWITCHES = re.compile(r"training|checkpoint|(^|_)cp$")  # attributes that users turn on and off in a model's life
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid", "tanh": "tanh", "tanh_": "tanh"}
_NUMBERS = {"leaky_relu": ("negative_slope", "inplace"), "elu": ("alpha", "inplace"), "softplus": ("beta", "threshold")}
_BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)
_LEAVES = (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom, ast.Await)


class Refusal(Exception):
    """Why a norm cannot take over an activation."""


@dataclass
class Fusion:
    """A norm takes over ``act`` (for the norm to hold); ``silent`` are the modules that must become a pass-through then."""

    act: nn.Module
    residual: bool = False
    silent: list[nn.Module] = field(default_factory=list)


@dataclass
class Reading:
    """What the code of a module proved: fusions and refusals by the norm's name, and the methods to run in place of the written ones."""

    fusions: dict[str, Fusion] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sum:
    """An add of ``other`` in the code, ``node``; ``target`` is the name of the sum where that is all the statement does."""

    node: ast.AST
    other: ast.expr
    target: str | None


@dataclass(frozen=True)
class _Act:
    """An activation in the code: what it computes, and the child of the module it is, if any."""

    activation: Activation
    module: nn.Module | None
    name: str | None


# ------------------------------------------------------------------------------------------------------- reading a class
@remembered
def _names(code: CodeType) -> frozenset[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return frozenset(found)


@remembered
def functions(cls: type) -> tuple[tuple[str, FunctionType, bool], ...]:
    """(name, function, whether a subclass hides it) of a class and its bases below nn.Module, without constructors."""
    found, seen = [], set()
    for base in cls.__mro__:
        if base in (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, PassThrough, Swapped, object) or base is Rewritten:
            continue
        for name, member in vars(base).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(function, FunctionType) and name != "__init__":
                found.append((name, function, name in seen))
        seen |= set(vars(base))
    return tuple(found)


def mentions(cls: type, name: str) -> list[tuple[str, FunctionType, bool]]:
    """The functions of ``cls`` whose code has an attribute called ``name``."""
    return [entry for entry in functions(cls) if name in _names(entry[1].__code__)]


@remembered
def _parsed(function: FunctionType) -> ast.FunctionDef:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndentationError):
        raise Refusal(f"the source of {function.__qualname__} cannot be read") from None
    if not isinstance(tree, ast.FunctionDef) or tree.name != function.__name__:
        raise Refusal(f"{function.__qualname__} is not a plain function")
    return tree


def _self_name(function: FunctionType) -> str | None:
    code = function.__code__
    return code.co_varnames[0] if code.co_argcount else None


def _chain(node: ast.AST, root: str | None) -> tuple[str, ...] | None:
    """("a", "b") for ``self.a.b``."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == root and names else None


@remembered
def chains(cls: type, name: str) -> tuple[tuple[str, ...], ...]:
    """The ways ``self.a.b.<name>`` in which the code of ``cls`` reaches an attribute of another module."""
    found = set()
    for _, function, _ in mentions(cls, name):
        try:
            tree = _parsed(function)
        except Refusal:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == name:
                path = _chain(node.value, _self_name(function))
                if path:
                    found.add(path)
    return tuple(found)


@remembered
def takes_apart(cls: type, name: str) -> bool:
    """Whether the code of ``cls`` slices, iterates over or lists ``self.<name>`` instead of calling it whole."""
    listed = {"children", "named_children", "modules", "named_modules", "_modules"}
    for _, function, _ in mentions(cls, name):
        try:
            tree = _parsed(function)
        except Refusal:
            continue
        own = _self_name(function)
        for node in ast.walk(tree):
            parts: list[ast.AST] = []
            if (
                isinstance(node, ast.Subscript)
                or (isinstance(node, ast.Attribute) and node.attr in listed)
                or isinstance(node, ast.Starred)
            ):
                parts = [node.value]
            elif isinstance(node, (ast.For, ast.comprehension)):
                parts = [node.iter]
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("enumerate", "zip", "list", "iter", "reversed", "tuple")
            ):
                parts = list(node.args)
            if any(_chain(part, own) == (name,) for part in parts):
                return True
    return False


# ------------------------------------------------------------------------------------------------------ reading a module
def read(
    owner: nn.Module, norms: list[str], wanted: Callable[[Activation], bool], residual: bool, alone: Callable[[nn.Module, str], bool]
) -> Reading:
    """What the code of ``owner`` proves about its children ``norms``.

    Args:
        wanted: whether an activation may be fused. residual: whether the add before it may.
        alone: whether nothing but the code of ``owner`` uses a module, its child of that name.
    """
    reading = Reading()
    cls = type(owner)
    trees: dict[str, ast.FunctionDef] = {}
    for name in norms:
        try:
            _read_norm(owner, cls, name, trees, reading, wanted, residual, alone)
        except Refusal as refusal:
            reading.refusals[name] = str(refusal)
    reading.methods = {method: ast.unparse(ast.fix_missing_locations(tree)) for method, tree in trees.items()}
    return reading


def _read_norm(
    owner: nn.Module,
    cls: type,
    name: str,
    trees: dict[str, ast.FunctionDef],
    reading: Reading,
    wanted: Callable[[Activation], bool],
    residual: bool,
    alone: Callable[[nn.Module, str], bool],
) -> None:
    changed: dict[str, ast.FunctionDef] = {}
    sites: list[tuple[_Act, bool]] = []
    for method, function, hidden in mentions(cls, name):
        if hidden:
            if "super" in _names(next(f for n, f, h in functions(cls) if n == method and not h).__code__):
                raise Refusal(f"used in a {method} that a subclass extends")
            continue
        tree = deepcopy(trees.get(method) or _parsed(function))
        found = _Method(owner, function, tree, residual).fuse(name)
        if found:
            changed[method] = tree
            sites += found
    if not sites:
        raise Refusal(NOTHING)
    act = sites[0][0]
    if any(a != act for a, _ in sites):
        raise Refusal("different activations follow in different places")
    if not wanted(act.activation):
        raise Refusal(f"{act.activation} is not among the activations to fuse")
    with_residual = any(r for _, r in sites)
    if act.module is not None:
        held = twin(act.module)
        if held is None:
            raise Refusal(f"{type(act.module).__name__} after it is not fused (unknown kind, hooks, or fused elsewhere)")
    else:
        held = module_of(act.activation, 0)
        assert held is not None
    fusion = Fusion(held, with_residual)
    exclusive = act.module is not None and act.name is not None and alone(act.module, act.name) and _count(cls, act.name) == len(sites)
    if exclusive and not with_residual:
        assert act.module is not None
        fusion.silent = [act.module]  # the code stays as it is written
    else:
        for method in changed:
            _rewritable(next(f for n, f, h in functions(cls) if n == method and not h), method)
        trees |= changed
    reading.fusions[name] = fusion


def _count(cls: type, name: str) -> int:
    """How often the code of a class mentions ``self.<name>``."""
    total = 0
    for _, function, hidden in mentions(cls, name):
        own = _self_name(function)
        total += 0 if hidden else sum(_chain(node, own) == (name,) for node in ast.walk(_parsed(function)))
    return total


def _rewritable(function: FunctionType, method: str) -> None:
    tree = _parsed(function)
    if function.__closure__ or tree.decorator_list:
        raise Refusal(f"{method} is decorated, or uses super() or variables of another function")
    if any(isinstance(n, ast.Attribute) and n.attr.startswith("__") and not n.attr.endswith("__") for n in ast.walk(tree)):
        raise Refusal(f"{method} uses names with two underscores")


class _Method:
    """One method: finds where a norm is called and takes out the activation that follows, in a tree of its own."""

    def __init__(self, owner: nn.Module, function: FunctionType, tree: ast.FunctionDef, residual: bool) -> None:
        self.owner, self.function, self.tree, self.residual = owner, function, tree, residual
        self.own = _self_name(function)
        self.parents: dict[ast.AST, ast.AST] = {}

    def fuse(self, name: str) -> list[tuple[_Act, bool]]:
        """The activations taken out of the tree behind each call of ``self.<name>``, and whether an add was with them."""
        while self._fold_around(name):
            pass
        self._link()
        calls = []
        for node in ast.walk(self.tree):
            if _chain(node, self.own) != (name,):
                continue
            parent = self.parents[node]
            if self._is_harmless(node, parent):
                continue
            if not (isinstance(parent, ast.Call) and parent.func is node):
                raise Refusal(f"{self.function.__name__} uses it otherwise than by calling it")
            if len(parent.args) != 1 or parent.keywords or isinstance(parent.args[0], ast.Starred):
                raise Refusal(f"{self.function.__name__} calls it with more than one argument")
            calls.append(parent)
        return [self._site(call) for call in calls]

    @staticmethod
    def _is_harmless(node: ast.AST, parent: ast.AST) -> bool:
        """Whether the code only asks for the norm's parameters, options or type."""
        if isinstance(parent, ast.Attribute):
            return parent.attr in _HARMLESS
        if isinstance(parent, ast.Compare):
            return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
        if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.args and parent.args[0] is node:
            asked = parent.args[1].value if len(parent.args) > 1 and isinstance(parent.args[1], ast.Constant) else None
            return parent.func.id == "isinstance" or (parent.func.id in ("getattr", "hasattr") and asked in _HARMLESS)
        return False

    # -------------------------------------------------------------------------------------------------- one call
    def _site(self, call: ast.Call) -> tuple[_Act, bool]:
        self._link()
        outer = self.parents[call]
        act = self._act(outer, call)
        if act is not None:
            self._replace(outer, call)
            return act, False
        if isinstance(outer, ast.BinOp) and isinstance(outer.op, ast.Add):
            act = self._act(self.parents[outer], outer)
            if act is not None:
                other = outer.right if outer.left is call else outer.left
                self._replace(self.parents[outer], self._add(call, call.args[0], other))
                return act, True
        if isinstance(outer, ast.Assign) and len(outer.targets) == 1 and isinstance(outer.targets[0], ast.Name):
            return self._follow(outer, outer.targets[0].id, call)
        raise Refusal(NOTHING)

    def _follow(self, statement: ast.Assign, name: str, call: ast.Call) -> tuple[_Act, bool]:
        """From ``name = self.norm(x)`` on to the activation, past an add, through statements that leave ``name`` alone."""
        block = self._block(statement)
        i = block.index(statement)
        between: list[ast.stmt] = []
        while (i := i + 1) < len(block):
            following = block[i]
            if not _uses(following, name):
                between.append(following)
                continue
            branch = self._static_branch(following) if isinstance(following, ast.If) else None
            if branch is not None:
                block[i : i + 1] = branch
                i -= 1
                self._link()
                continue
            if self._is_identity(following, name):
                continue
            found = self._added(following, name)
            if found is None:
                act = self._act_on(following, name)
                if act is None:
                    raise Refusal("what follows is in a branch or a loop" if isinstance(following, _BLOCKS) else NOTHING)
                return act, False
            if not self.residual:
                raise Refusal("an add stands between it and the activation")
            if found.target is not None:
                if found.target != name and _uses_after(self.tree, following, name):
                    raise Refusal("its output is also used elsewhere")
                act = self._take_act(block, i, found.target)
            else:
                self._ends(following, name)
                act = self._act(self.parents[found.node], found.node)
            if act is None:
                raise Refusal("no activation follows the add")
            self._move(block, statement, call, between, following, name, found)
            return act, True
        raise Refusal(NOTHING)

    def _take_act(self, block: list[ast.stmt], i: int, name: str) -> _Act | None:
        """The activation of ``name`` in the statements after ``block[i]``, taken out."""
        while (i := i + 1) < len(block):
            following = block[i]
            if not _uses(following, name):
                continue
            if isinstance(following, ast.If):
                branch = self._static_branch(following)
                if branch is None:
                    return None
                block[i : i + 1] = branch
                i -= 1
                self._link()
                continue
            if self._is_identity(following, name):
                continue
            return self._act_on(following, name)
        return None

    def _act_on(self, statement: ast.stmt, name: str) -> _Act | None:
        """The activation if all that ``statement`` does with ``name`` is to apply one; it is taken out."""
        if isinstance(statement, (*_BLOCKS, ast.FunctionDef)):
            return None
        if _loads(statement, name) != 1:
            return None
        load = next(n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load))
        outer = self.parents[load]
        act = self._act(outer, load)
        if act is None:
            return None
        self._ends(statement, name)
        self._replace(outer, load)
        return act

    def _ends(self, statement: ast.stmt, name: str) -> None:
        """Refuse if ``name`` is read after ``statement``, which would now see the activated value."""
        overwritten = isinstance(statement, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in statement.targets)
        if isinstance(statement, ast.Return) or overwritten:
            return
        if _uses_after(self.tree, statement, name):
            raise Refusal("its output is also used after the activation")

    def _added(self, statement: ast.stmt, name: str) -> _Sum | None:
        """The add, if all that ``statement`` does with ``name`` is to add to it, or to apply an activation to the sum."""
        if isinstance(statement, ast.AugAssign):
            whole = isinstance(statement.op, ast.Add) and isinstance(statement.target, ast.Name) and statement.target.id == name
            return _Sum(statement, statement.value, name) if whole and not _uses(statement.value, name) else None
        if not isinstance(statement, (ast.Assign, ast.Return)) or _loads(statement, name) != 1:
            return None
        for node in ast.walk(statement):
            if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)):
                continue
            for side, other in ((node.left, node.right), (node.right, node.left)):
                if not (isinstance(side, ast.Name) and side.id == name):
                    continue
                if isinstance(statement, ast.Assign) and statement.value is node:
                    target = statement.targets[0]
                    return _Sum(node, other, target.id) if len(statement.targets) == 1 and isinstance(target, ast.Name) else None
                return _Sum(node, other, None) if self._act(self.parents[node], node) is not None else None
        return None

    def _move(
        self,
        block: list[ast.stmt],
        statement: ast.Assign,
        call: ast.Call,
        between: list[ast.stmt],
        following: ast.stmt,
        name: str,
        found: _Sum,
    ) -> None:
        """Calls the norm where the add is: what lies between must not notice, nor change what the norm is given."""
        for s in between:
            plain = isinstance(s, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.If, ast.Pass))
            if not plain or any(isinstance(n, _LEAVES) for n in ast.walk(s)):
                raise Refusal("the code between it and the add may leave or loop")
        argument = call.args[0]
        if isinstance(argument, ast.Name) and (argument.id == name or not any(_uses(s, argument.id) for s in (*between, following))):
            given: ast.expr = ast.Name(argument.id, ast.Load())
            block[block.index(statement)] = ast.copy_location(ast.Pass(), statement)
        else:
            statement.value = argument
            given = ast.Name(name, ast.Load())
        made = self._add(call, given, found.other)
        if found.target is not None:
            block[block.index(following)] = ast.copy_location(ast.Assign([ast.Name(found.target, ast.Store())], made), following)
            self._link()
        else:
            act_was_around = self.parents[found.node]
            self._replace(act_was_around, made)

    def _add(self, call: ast.Call, argument: ast.expr, other: ast.expr) -> ast.Call:
        function = ast.Attribute(ast.Name(self.own or "", ast.Load()), "_norm_add_act", ast.Load())
        return ast.copy_location(ast.Call(function, [call.func, argument, other], []), call)

    # ---------------------------------------------------------------------------------------------- activations
    def _act(self, call: ast.AST, argument: ast.AST) -> _Act | None:
        """The activation that ``call`` applies to ``argument`` and to nothing else."""
        if isinstance(call, ast.Attribute):  # y.relu()
            method = self.parents.get(call)
            if isinstance(method, ast.Call) and method.func is call and not method.args and not method.keywords and call.attr in _METHODS:
                return _Act(Activation(_METHODS[call.attr]), None, None)
            return None
        if not isinstance(call, ast.Call) or not call.args or call.args[0] is not argument:
            return None
        path = _chain(call.func, self.own)
        if path is not None:
            module = self._value(path)
            if len(call.args) != 1 or call.keywords:
                return None
            if not isinstance(module, nn.Module):  # a function kept as an attribute (detectron2's activation=F.relu)
                kept = _function_as_act(module)
                return None if kept is None else _Act(kept, None, None)
            held = twin(module)
            if held is None and kept_by_hooks(module):
                raise Refusal(f"the {type(module).__name__} after it has a hook")
            found = None if held is None else from_module(held)
            return None if found is None or found == IDENTITY else _Act(found, module, path[0] if len(path) == 1 else None)
        return self._function(call)

    def _function(self, call: ast.Call) -> _Act | None:
        function = self._global(call.func)
        found = _function_as_act(function)
        if found is None:
            return None
        names = _NUMBERS.get(found.name, ("inplace",))
        if len(call.args) - 1 > len(names):
            return None
        given = dict(zip(names, call.args[1:], strict=False)) | {k.arg or "**": k.value for k in call.keywords}
        numbers = {}
        for key, value in given.items():
            if not isinstance(value, ast.Constant):
                return None
            if key != "inplace":
                numbers[key] = value.value
        try:
            fused = parse((found.name, numbers)) if numbers else found
        except ValueError:
            return None
        return _Act(fused, None, None) if isinstance(fused, Activation) else None

    def _global(self, node: ast.AST) -> Any:
        """The object that a global name or an attribute of a global module stands for."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.function.__code__.co_varnames:
            return None
        value = self.function.__globals__.get(node.id)
        for name in reversed(names):
            if not inspect.ismodule(value):
                return None
            value = getattr(value, name, None)
        return value

    def _is_identity(self, statement: ast.stmt, name: str) -> bool:
        """``y = self.drop(y)`` with an nn.Identity."""
        if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Call) and len(statement.targets) == 1):
            return False
        target, call = statement.targets[0], statement.value
        if not (isinstance(target, ast.Name) and target.id == name and len(call.args) == 1 and not call.keywords):
            return False
        path = _chain(call.func, self.own)
        module = self._value(path) if path else None
        plain = type(module) is nn.Identity and not module._forward_hooks and not module._forward_pre_hooks
        return plain and isinstance(call.args[0], ast.Name) and call.args[0].id == name

    def _value(self, path: tuple[str, ...]) -> Any:
        value: Any = self.owner
        for name in path:
            value = getattr(value, name, None)
        return value

    # ------------------------------------------------------------------------------------------------- branches
    def _fold_around(self, name: str) -> bool:
        """Decide one branch that holds a use of ``self.<name>``, if plain attributes decide it."""
        for block in _blocks(self.tree):
            for i, statement in enumerate(block):
                if isinstance(statement, ast.If) and any(_chain(n, self.own) == (name,) for n in ast.walk(statement)):
                    branch = self._static_branch(statement)
                    if branch is not None:
                        block[i : i + 1] = branch or [ast.copy_location(ast.Pass(), statement)]
                        return True
        return False

    def _static_branch(self, statement: ast.If) -> list[ast.stmt] | None:
        known, value = self._static(statement.test)
        return (statement.body if value else statement.orelse) if known else None

    def _static(self, node: ast.expr) -> tuple[bool, Any]:
        """(whether plain attributes of the module decide the expression, its value)."""
        if isinstance(node, ast.Constant):
            return True, node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            known, value = self._static(node.operand)
            return known, not value
        if isinstance(node, ast.BoolOp):
            parts = [self._static(v) for v in node.values]
            decisive = isinstance(node.op, ast.Or)
            if any(known and bool(value) == decisive for known, value in parts):
                return True, decisive
            return all(known for known, _ in parts), not decisive
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            (left_known, left), (right_known, right) = self._static(node.left), self._static(node.comparators[0])
            compare: dict[type, Callable[[Any, Any], bool]] = {
                ast.Is: operator.is_,
                ast.IsNot: operator.is_not,
                ast.Eq: operator.eq,
                ast.NotEq: operator.ne,
            }
            test = compare.get(type(node.ops[0]))
            return (True, test(left, right)) if left_known and right_known and test is not None else (False, None)
        path = _chain(node, self.own)
        if path is None or any(_SWITCHES.search(part) for part in path):
            return False, None
        found: Any = self.owner
        for part in path:
            if not hasattr(found, part):
                return False, None
            found = getattr(found, part)
        return found is None or isinstance(found, (nn.Module, bool, int, float, str)) or _function_as_act(found) is not None, found

    # ----------------------------------------------------------------------------------------------------- trees
    def _link(self) -> None:
        ast.fix_missing_locations(self.tree)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def _block(self, statement: ast.stmt) -> list[ast.stmt]:
        return next(block for block in _blocks(self.tree) if any(s is statement for s in block))

    def _replace(self, node: ast.AST, by: ast.AST) -> None:
        if isinstance(node, ast.Attribute):  # y.relu(): its call
            node = self.parents[node]
        parent = self.parents[node]
        for name, value in ast.iter_fields(parent):
            if value is node:
                setattr(parent, name, by)
            elif isinstance(value, list):
                value[:] = [by if v is node else v for v in value]
        self._link()


def _function_as_act(function: Any) -> Activation | None:
    """The activation that a function is; a module is none here, nor is a class of modules, whose call makes one."""
    if not callable(function) or isinstance(function, (nn.Module, type)):
        return None
    found = parse(function)
    return found if isinstance(found, Activation) and found != IDENTITY else None


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in list(ast.walk(tree)):
        for part in ("body", "orelse", "finalbody"):
            block = getattr(node, part, None)
            if isinstance(block, list):
                yield block


def _uses(node: ast.AST, name: str) -> bool:
    return any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(node))


def _loads(node: ast.AST, name: str) -> int:
    return sum(isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) for n in ast.walk(node))


def _uses_after(tree: ast.FunctionDef, statement: ast.stmt, name: str) -> bool:
    """Whether ``name`` may be read after ``statement``: further down, or at all if it stands in a loop."""
    inside = {id(n) for n in ast.walk(statement)}
    loops = [n for n in ast.walk(tree) if isinstance(n, (ast.For, ast.While, ast.FunctionDef)) and n is not tree]
    in_loop = any(id(statement) in {id(n) for n in ast.walk(loop)} for loop in loops)
    end = (statement.end_lineno or statement.lineno, statement.end_col_offset or 0)
    loads = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load) and id(n) not in inside]
    return any(in_loop or (n.lineno, n.col_offset) >= end for n in loads)


# ------------------------------------------------------------------------------------------------------- rewritten classes
class Rewritten(Swapped, nn.Module):
    """A module whose norms are called with the activation, and the residual, that its code applied after them."""

    def _norm_add_act(self, norm: nn.Module, x: Tensor, residual: Any) -> Tensor:
        fits = isinstance(residual, Tensor) and residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device
        if fits:
            y: Tensor = norm(x, residual)
            return y
        # broadcast, a number, another type: as written
        acted: Tensor = norm.act(without_act(norm, x) + residual)  # type: ignore[operator]
        return acted


@remembered
def rewritten(original: type, methods: tuple[tuple[str, str], ...]) -> type:
    """``original`` with methods of the given source; names in it are those of the methods they replace."""
    members = {}
    for name, text in methods:
        written = next(f for n, f, hidden in functions(original) if n == name and not hidden)
        file = f"<normfused: {original.__module__}.{original.__qualname__}.{name} {hash(text) & 0xFFFFFFFF:08x}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        code = next(c for c in compile(_bare(text), file, "exec").co_consts if isinstance(c, CodeType))
        function = FunctionType(code, written.__globals__, name, written.__defaults__)
        function.__kwdefaults__ = written.__kwdefaults__
        function.__qualname__, function.__module__, function.__doc__ = written.__qualname__, written.__module__, written.__doc__
        members[name] = function
    return derived(original, Rewritten, members, rewritten, original, methods)


def _bare(text: str) -> ast.Module:
    """The function without annotations and defaults, which belong to the place it was written in."""
    tree = ast.parse(text)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.returns = None
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    function.args.defaults = [ast.copy_location(ast.Constant(None), d) for d in function.args.defaults]
    function.args.kw_defaults = [None if d is None else ast.copy_location(ast.Constant(None), d) for d in function.args.kw_defaults]
    return ast.fix_missing_locations(tree)


__all__ = ["NOTHING", "Fusion", "Reading", "Refusal", "Rewritten", "chains", "functions", "mentions", "read", "rewritten", "takes_apart"]
