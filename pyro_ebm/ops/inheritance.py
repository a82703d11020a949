"""Whether what a class knows was said of the law that it is, or inherited from another one."""


def is_own(kind: type, method: str, law: tuple[str, ...]) -> bool:
    """Whether a method is of the class that last defined one of the names, or below it.

    Args:
        kind: The class.
        method: What is asked about; ``True`` where no class has it.
        law: Names that say which law a class is.

    Example:
        >>> class Law:
        ...     def energy(self): ...
        ...     def sample(self): ...
        >>> class Other(Law):
        ...     def energy(self): ...
        >>> is_own(Law, "sample", ("energy",)), is_own(Other, "sample", ("energy",))
        (True, False)
    """
    kinds = kind.__mro__
    depth = {name: i for i, one in reversed([*enumerate(kinds)]) for name in vars(one)}
    return depth.get(method, 0) <= min(depth.get(name, len(kinds)) for name in law)
