"""Which fields of which dataclass the package reads, by the types that its source names.

An attribute counts where the type of what stands before the dot is known to be that dataclass: from annotations of parameters,
fields and returns, through chains, assignments, loops and unpacked tuples. So `PromptPrefill.start` is no reading of
`HorizonScheduleConfig.start`, and a field that is read only in a way this cannot follow counts as unread.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

Types = dict[str, str]
# Of the package: what asks about a run or tells of one, and does nothing that an option says.
ONLY_TELLS = ("checks", "preflight.py", "model_card.py", "method_in_words.py")


def named_in(annotation: ast.expr | None) -> str | None:
    """The first class that an annotation names: C, "C", C | None, list[C] and tuple[C, ...] are C here."""
    if annotation is None:
        return None
    text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
    words = str(text).replace("[", " ").replace("]", " ").replace("|", " ").replace(",", " ").replace('"', " ").split()
    return next((word.split(".")[-1] for word in words if word.split(".")[-1][:1].isupper()), None)


@dataclass
class Source:
    """What is known of all classes and functions, and the attributes read: (class, name, class and property it is read in)."""

    attributes: dict[str, Types] = field(default_factory=dict)
    returns: Types = field(default_factory=dict)
    read: set[tuple[str, str, tuple[str, str] | None]] = field(default_factory=set)

    def learn(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and named_in(node.returns):
                self.returns[node.name] = named_in(node.returns)
            if not isinstance(node, ast.ClassDef):
                continue
            mine = self.attributes.setdefault(node.name, {})
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                    mine[part.target.id] = named_in(part.annotation) or ""
                if isinstance(part, ast.FunctionDef):
                    mine[part.name] = named_in(part.returns) or ""
                    if part.name == "__init__":
                        self.learn_init(part, mine)

    def learn_init(self, function: ast.FunctionDef, mine: Types) -> None:
        known = parameters(function)
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign):
                continue
            for target, value in pairs(node.targets[0], node.value):
                if isinstance(target, ast.Attribute) and isinstance(value, ast.Name):
                    mine[target.attr] = known.get(value.id, "")

    def type_of(self, node: ast.expr, known: Types) -> str | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attributes.get(self.type_of(node.value, known) or "", {}).get(node.attr)
        if isinstance(node, ast.Subscript):
            return self.type_of(node.value, known)
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "replace" and node.args:
                return self.type_of(node.args[0], known)
            return called if called in self.attributes else self.returns.get(called)
        return None

    def follow(self, body: list[ast.stmt], known: Types, where: tuple[str, str] | None) -> None:
        """Names that the body binds, then attributes that it reads."""
        nodes = [node for statement in body for node in ast.walk(statement)]
        for node in nodes:
            if isinstance(node, ast.Assign):
                for target, value in pairs(node.targets[0], node.value):
                    self.bind(target, value, known)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known[node.target.id] = named_in(node.annotation) or ""
            elif isinstance(node, ast.For | ast.comprehension):
                self.bind(node.target, node.iter, known)
            elif isinstance(node, ast.FunctionDef | ast.Lambda):
                known |= parameters(node)
        for node in nodes:
            if isinstance(node, ast.Attribute):
                owner = self.type_of(node.value, known)
                if owner:
                    self.read.add((owner, node.attr, where))

    def bind(self, target: ast.expr, value: ast.expr, known: Types) -> None:
        found = self.type_of(value, known)
        if isinstance(target, ast.Name) and found:
            known[target.id] = found


def parameters(function: ast.FunctionDef | ast.Lambda) -> Types:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return {argument.arg: named_in(argument.annotation) for argument in arguments if named_in(argument.annotation)}


def pairs(target: ast.expr, value: ast.expr):
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def options_read(folder: Path) -> set[tuple[str, str]]:
    """(class, field) of everything that is read in `folder`.

    In config/ only properties count, and what they read only where they are read themselves. Nothing named check_* counts, nor
    ONLY_TELLS.
    """
    source = Source()
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.py"))}
    for tree in trees.values():
        source.learn(tree)
    for path, tree in trees.items():
        relative = path.relative_to(folder)
        if relative.parts[0] in ONLY_TELLS:
            continue
        is_config = relative.parts[0] == "config"
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                for method in (part for part in node.body if isinstance(part, ast.FunctionDef)):
                    is_property = any(getattr(mark, "id", "") == "property" for mark in method.decorator_list)
                    if is_property or not is_config:
                        where = (node.name, method.name) if is_config else None
                        source.follow(method.body, {"self": node.name} | parameters(method), where)
            elif isinstance(node, ast.FunctionDef) and not is_config and not node.name.startswith("check_"):
                source.follow(node.body, parameters(node), None)
    found = {(owner, name) for owner, name, where in source.read if where is None}
    while more := {(owner, name) for owner, name, where in source.read if where in found} - found:
        found |= more
    return found
