"""What is looked at ever more seldom: at the first, second, fourth, ... time."""


def is_power_of_two(number: int) -> bool:
    """Whether a count is 1, 2, 4, ...; of none it is so, too.

    Example:
        >>> [n for n in range(1, 20) if is_power_of_two(n)]
        [1, 2, 4, 8, 16]
    """
    return number & (number - 1) == 0
